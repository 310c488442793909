"""What the command lines of all tools share."""
import argparse
import os
from typing import Any, List

from mmsinger.engine.options import ConfigOptions
from mmsinger.schema import Count, reader


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there is one and the text names none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or \
                '(default' in action.help:
            return action.help
        return super()._get_help_string(action)


class _Size(argparse.Action):
    """Keeps a tuple (H, W)."""

    def __call__(self, parser: argparse.ArgumentParser,
                 namespace: argparse.Namespace, values: List[int],
                 option_string: Any = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(
                self, 'give one number, or height and width')
        setattr(namespace, self.dest, (values[0], values[-1]))


class ToolParser(argparse.ArgumentParser):
    """A command line whose options are not empty texts.

    An empty shell variable in a script would otherwise choose another thing
    in silence: ``--resume "$CHECKPOINT"`` would begin anew.

    Args:
        description (str): What the tool does; of a docstring the first line.
        **kwargs: See :class:`argparse.ArgumentParser`.
    """

    def __init__(self, description: str, **kwargs: Any) -> None:
        super().__init__(description=description.splitlines()[0],
                         formatter_class=_Help, **kwargs)

    def add_cfg_options(self, of: str, name: str = '--cfg-options') -> None:
        """Add an option that changes settings of a config.

        Args:
            of (str): Of which config, for the help.
            name (str): Of the option. Defaults to ``'--cfg-options'``.
        """
        self.add_argument(name, nargs='+', action=ConfigOptions,
                          metavar='KEY=VALUE',
                          help=f'override settings of {of}')

    def add_size(self, name: str, of: str, default: str) -> None:
        """Add an option for the size of images, read as a tuple (H, W).

        Args:
            name (str): Of the option.
            of (str): What has that size, for the help.
            default (str): What is taken without the option, for the help.
        """
        self.add_argument(
            name, nargs='+', type=reader(Count), action=_Size, metavar='PX',
            help=f'{of}: height and width, or one number for both (default: '
            f'{default})')

    def add_launcher(self) -> None:
        """Add what a distributed job is started with, as OpenMMLab's tools
        have it; sets ``LOCAL_RANK`` where the launcher does not."""
        self.add_argument(
            '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
            default='none', help='how a distributed job was started')
        self.add_argument(
            '--local_rank', '--local-rank', type=int,
            default=int(os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', 0)),
            help=argparse.SUPPRESS)

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        """See :class:`argparse.ArgumentParser`; of a prefix, an empty text
        means none."""
        found = super().parse_args(*args, **kwargs)
        for name, value in vars(found).items():
            if name != 'prefix' and value != self.get_default(name) and \
                    (value == '' or isinstance(value, list) and '' in value):
                option = next((action.option_strings[0]
                               for action in self._actions
                               if action.dest == name
                               and action.option_strings), name)
                self.error(f'argument {option}: the value is empty')
        if 'local_rank' in found:
            os.environ.setdefault('LOCAL_RANK', str(found.local_rank))
        return found
