"""What matters at the start of a run, and not what hides it."""
import logging
from typing import Dict, List, Tuple

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from torch import nn

from mmsinger.engine.unwrap import unwrap

# Of mmengine, a line a parameter or what no config can change
DETAILS = (
    'paramwise_options -- ',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
)


def demote_details(record: logging.LogRecord) -> bool:
    """A logging filter that turns :data:`DETAILS` into debug messages."""
    if str(record.msg).startswith(DETAILS):
        record.levelno, record.levelname = logging.DEBUG, 'DEBUG'
    return True


def drop_starts(record: logging.LogRecord) -> bool:
    """A logging filter, for a run that goes on from a checkpoint: how the
    adapters would have started is not how they are."""
    return not str(record.msg).startswith('SiNGER adapter of layer')


class ParameterGroupsHook(Hook):
    """Logs the learning rates and weight decays before the first step: how
    many parameters have which, and in what parts of the model.

    The list of all parameters is mmengine's, at ``log_level='DEBUG'``.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner) -> None:
        runner.logger.info(parameter_groups(runner))


def parameter_groups(runner) -> str:
    """What :func:`describe_groups` says of a runner's model."""
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) \
        else [wrapper]
    return describe_groups(unwrap(runner.model), [
        group for each in wrappers for group in each.optimizer.param_groups])


def describe_groups(model: nn.Module, groups: List[dict]) -> str:
    """A line for each learning rate and weight decay.

    Args:
        model (nn.Module): Whose parameters they are.
        groups (list[dict]): ``param_groups`` of an optimizer.

    Returns:
        str: The rates as they are before a schedule.
    """
    parts = {id(parameter): name.split('.')[0]
             for name, parameter in model.named_parameters()}
    alike: Dict[Tuple, List[nn.Parameter]] = {}
    for group in groups:
        rate = group.get('initial_lr', group['lr'])
        for parameter in group['params']:
            key = (rate, group.get('weight_decay', 0)) \
                if parameter.requires_grad else ()
            alike.setdefault(key, []).append(parameter)
    lines = ['Parameters by learning rate and weight decay:']
    for key, members in sorted(alike.items(), reverse=True):
        what = f'lr {key[0]:.3g}, weight decay {key[1]:.3g}' if key \
            else 'frozen'
        where = sorted({parts.get(id(member), '?') for member in members})
        lines.append(f'  {what}: {len(members)} tensors, '
                     f'{sum(m.numel() for m in members) / 1e6:.3g} M '
                     f'({", ".join(where)})')
    return '\n'.join(lines)
