"""What a run goes on from: checkpoints that were written to their end."""
import glob
import os
import zipfile

from mmengine.config import Config
from mmengine.logging import print_log

from mmsinger.errors import ConfigError


def resume_from_intact_checkpoint(cfg: Config) -> None:
    """Choose what ``--resume`` without a path goes on from: the newest
    checkpoint in the work dir that was written to its end.

    mmengine follows the path in ``last_checkpoint``, which leads elsewhere
    after the folder was moved or copied, and fails on a file that was cut off.

    Raises:
        ConfigError: If there are checkpoints and none is intact.
    """
    if not cfg.get('resume') or cfg.get('load_from'):
        return
    found = [path for kind in ('iter_*.pth', 'epoch_*.pth')
             for path in glob.glob(os.path.join(cfg.work_dir, kind))
             if not path.endswith('_student.pth')]
    pointer = os.path.join(cfg.work_dir, 'last_checkpoint')
    last = ''
    if os.path.isfile(pointer):
        with open(pointer) as file:
            last = os.path.basename(file.read().strip())
    found.sort(key=lambda path: (os.path.basename(path) == last,
                                 os.path.getmtime(path)), reverse=True)
    for path in found:
        if _is_intact(path):
            cfg.load_from = path
            return
        print_log(f'--resume: {path!r} was not written to its end, it is '
                  'passed over', logger='current', level=30)
    if found:
        raise ConfigError(
            f'--resume: none of the checkpoints in {cfg.work_dir!r} was '
            f'written to its end: {", ".join(map(os.path.basename, found))}. '
            'Remove them to begin anew.')


def _is_intact(path: str) -> bool:
    """Whether all parts of a file of torch.save are there."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def check_checkpoint_files(cfg: Config) -> None:
    """Raise :class:`ConfigError` for a checkpoint to start from that is a
    local path without a file. What is in it shows when it is loaded."""
    teacher = cfg.model.get('teacher')
    paths = {'load_from (or --resume)': cfg.get('load_from')}
    if isinstance(teacher, dict):
        paths['model.teacher.checkpoint'] = teacher.get('checkpoint')
    backbone = cfg.model.get('backbone')
    if isinstance(backbone, dict):  # a FrozenBackbone's
        paths['model.backbone.checkpoint'] = backbone.get('checkpoint')
    if cfg.get('resume') and str(cfg.get('load_from')).endswith(
            '_student.pth'):
        raise ConfigError(
            f'--resume {cfg.load_from!r} is a student alone: it has no '
            'optimizer and no adapters to go on with. Resume from '
            f'{cfg.load_from.replace("_student.pth", ".pth")!r}, or begin '
            'anew from these weights with --cfg-options '
            f'load_from={cfg.load_from}.')
    for key, path in paths.items():
        if isinstance(path, str) and '://' not in path and \
                not os.path.isfile(path):
            raise ConfigError(
                f'{key}={path!r}: no such file (working directory '
                f'{os.getcwd()}). Download the weights, or set {key} to '
                'where they are.')
