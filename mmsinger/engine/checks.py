"""What a run needs, looked at before it costs time: folders, and
pretrained weights."""
import os
import re
import tempfile
from typing import Iterator, Mapping, Optional, Tuple

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import nn

from mmsinger.checkpoint import read_weights, refuse_foreign
from mmsinger.errors import ConfigError, type_name, walk_config
from mmsinger.registry import arguments_of, find_type

COUNTS_EPOCHS = 'counts epochs, and train_cfg iterations'


def check_work_dir(work_dir: str, key: str) -> None:
    """Raise :class:`ConfigError` unless files can be written there.

    Args:
        work_dir (str): The folder; made if it is not there.
        key (str): The setting that names it, for the message.
    """
    try:
        os.makedirs(work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        with_option = ' with --work-dir' if key == 'work_dir' else ''
        raise ConfigError(
            f'{key}={work_dir!r} is not writable: {error.strerror}. '
            f'Choose another one{with_option}, or mend its permissions.'
        ) from error


def check_data_folders(cfg: Config, loaders: Tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` for a data folder that is missing or empty.

    Only local folders that the config names are looked at; what a dataset
    makes of them is the dataset's business.
    """
    for name in loaders:
        loader = cfg.get(name)
        if not isinstance(loader, dict) or 'dataset' not in loader:
            continue
        for key, dataset in inner_datasets(loader['dataset'],
                                           f'{name}.dataset'):
            if _downloads(dataset):
                continue
            for path_key, path in _folders(dataset):
                _check_folder(
                    f'{key}.{path_key}', path, dataset.get('img_suffix')
                    if path_key == 'data_prefix.img_path'
                    and not dataset.get('ann_file') else None)


def _downloads(dataset: dict) -> bool:
    """Whether a data set fetches what is missing itself (CIFAR)."""
    with DATASETS.switch_scope_and_registry(None) as registry:
        cls = find_type(dataset.get('type'), registry)
    defaults = arguments_of(cls).defaults if cls else {}
    return 'download' in defaults and bool(
        dataset.get('download', defaults['download']))


def inner_datasets(dataset: dict, key: str) -> Iterator[Tuple[str, dict]]:
    """The innermost dataset configs (inside Repeat-, ConcatDataset, …)."""
    inner = dataset.get('dataset')
    if isinstance(inner, dict):
        yield from inner_datasets(inner, f'{key}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for i, one in enumerate(dataset['datasets']):
            yield from inner_datasets(one, f'{key}.datasets[{i}]')
    else:
        yield key, dataset


def _folders(dataset: dict) -> Iterator[Tuple[str, str]]:
    root = dataset.get('data_root') or ''
    if root:
        yield 'data_root', root
    prefix = dataset.get('data_prefix') or {}
    if not isinstance(prefix, dict):
        prefix = {'': prefix}
    for name, folder in prefix.items():
        if isinstance(folder, str) and folder:
            key = f'data_prefix.{name}' if name else 'data_prefix'
            yield key, os.path.join(root, folder)


def _check_folder(key: str, path: str, suffix: Optional[str]) -> None:
    if '://' in path:
        return
    if not os.path.isdir(path):
        raise ConfigError(
            f'{key}: no folder {path!r} (working directory {os.getcwd()}). '
            'Point data_root to your data set.')
    # mmengine would end in "need at least one array to concatenate"
    if not any(name.endswith(suffix or '') for _, _, names
               in os.walk(path, followlinks=True) for name in names):
        raise ConfigError(
            f'{key}: the folder {path!r} holds no files. Point data_root to '
            'your data set.' if not suffix else
            f'{key}: no file in {path!r} ends with img_suffix={suffix!r}. '
            'Set img_suffix to what the images end with, or point data_root '
            'to your data set.')


def check_pretrained(cfg: dict, model: nn.Module) -> None:
    """Raise :class:`ConfigError` if a local file that a student, or a plain
    model, is to begin with (``pretrained``, ``init_cfg``) fits next to none
    of it; the toolboxes log that and train from random weights.

    Args:
        cfg (dict): Config of the model; it has been built.
        model (nn.Module): The model.
    """
    top = 'student' if hasattr(model, 'student') else ''
    for key, place, source, prefix in _pretrained(
            cfg.get(top, {}) if top else cfg, top):
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        weights = read_weights(source, f'model.{key}')
        found = [key[len(prefix):] for key in weights
                 if key.startswith(prefix)]
        expected = list(module.state_dict())
        # Loaders drop prefixes of their own: the ends of keys have to fit
        ends = {'.'.join(key.split('.')[i:]) for key in found
                for i in range(key.count('.') + 1)}
        own_ends = set(expected) | {key.partition('.')[2] for key in expected}
        fitting = ends & own_ends - {''}
        refuse_foreign(
            f'model.{key}={source!r} fits next to nothing of the '
            f'{type(module).__name__}', found, expected, len(fitting),
            'Convert it with tools/convert_checkpoint.py, or set the prefix '
            'that its keys begin with (init_cfg.prefix).')


def _pretrained(cfg: dict, place: str) -> Iterator[Tuple[str, str, str, str]]:
    """Key, module path, file and prefix of each local file."""
    nodes = {place: cfg, **dict(walk_config(cfg, place))}
    for key, node in nodes.items():
        found = re.fullmatch(
            r'(?:(.+)\.)?(?:pretrained|init_cfg(?:\.\d+)?)', key)
        owner = nodes[found[1] or ''] if found else {}
        # mmdet's own conversion renames what is in the file
        if not found or owner.get('convert_weights'):
            continue
        module, source, prefix = found[1] or '', node, ''
        if isinstance(node, dict) and node.get('type') == 'Pretrained':
            key, source = f'{key}.checkpoint', node.get('checkpoint')
            prefix = (node.get('prefix') or '').rstrip('.')
        elif 'backbone' in owner:
            module = f'{module}.backbone' if module else 'backbone'
        if isinstance(source, str) and os.path.isfile(source):
            yield key, module, source, prefix and f'{prefix}.'


def check_counting(cfg: Config) -> None:
    """Hold what counts epochs against a training that counts iterations, and
    samplers against loops that go through the data once; mmengine passes over
    both without a word.

    Warns of a learning rate whose schedule goes on after the last step.

    Raises:
        ConfigError: For a schedule that would never step, checkpoints that
            would not be written before the end, or a loop without an end.
    """
    loop = cfg.get('train_cfg') or {}
    by_epoch = loop.get('by_epoch', dict(
        EpochBasedTrainLoop=True, IterBasedTrainLoop=False).get(
            type_name(loop.get('type'))))
    for kind in ('train', 'val', 'test'):
        sampler = (cfg.get(f'{kind}_dataloader') or {}).get('sampler') or {}
        if type_name(sampler.get('type')) == 'InfiniteSampler' and (
                kind != 'train' or by_epoch):
            raise ConfigError(
                f"{kind}_dataloader.sampler.type='InfiniteSampler' has no "
                f'end, and {kind}_cfg waits for it. Take DefaultSampler' + (
                    ', or count iterations (train_cfg.by_epoch=False).'
                    if kind == 'train' else '.'))
    if by_epoch is None:
        return  # no training, or a loop of its own kind
    hooks = cfg.get('default_hooks') or {}
    _check_schedules(cfg, hooks, by_epoch)
    saver = hooks.get('checkpoint', {})
    if saver is None:
        print_log('default_hooks.checkpoint=None: this run writes no '
                  'checkpoint.', logger='current', level=30)
    elif not by_epoch and saver.get('by_epoch', True) and \
            saver.get('interval', 1) > 0:
        raise ConfigError(
            f'default_hooks.checkpoint.by_epoch=True (the default) '
            f'{COUNTS_EPOCHS}: no checkpoint would be written before the end. '
            'Set default_hooks.checkpoint.by_epoch=False, with interval in '
            'iterations.')


def _check_schedules(cfg: Config, hooks: Mapping, by_epoch: bool) -> None:
    schedules = cfg.get('param_scheduler') or []
    if isinstance(schedules, dict):  # or those of several optimizers
        schedules = [schedules] if 'type' in schedules else []
    if schedules and hooks.get('param_scheduler', '') is None and not any(
            'Scheduler' in type_name(hook.get('type'))
            for hook in cfg.get('custom_hooks') or ()):
        raise ConfigError(
            'default_hooks.param_scheduler=None: nothing would step '
            'param_scheduler. Remove the former, or set the latter to None.')
    length = cfg.train_cfg.get('max_epochs' if by_epoch else 'max_iters')
    for i, schedule in enumerate(schedules):
        key = f'param_scheduler.{i}'
        epochs = schedule.get('by_epoch', True)
        if epochs and not by_epoch and not schedule.get(
                'convert_to_iter_based') and not type_name(
                schedule.get('type')).startswith('ReduceOnPlateau'):
            raise ConfigError(
                f'{key}.by_epoch=True (the default) {COUNTS_EPOCHS}: it would '
                f'never step. Set {key}.by_epoch=False, with begin and end in '
                'iterations.')
        begin, end = schedule.get('begin', 0), schedule.get('end')
        if epochs == by_epoch and all(isinstance(number, int) for number in (
                begin, length, end)) and begin < length < end:
            print_log(
                f'{key} ends at {end}, the run at {length}: its last learning '
                f'rate is not reached. Set {key}.end={length}, or scale all '
                'of param_scheduler.', logger='current', level=30)


def check_validation(cfg: Config) -> None:
    """Raise :class:`ConfigError` for a part of a validation or a test."""
    for kind in ('val', 'test'):
        names = [f'{kind}_{part}' for part in ('cfg', 'dataloader',
                                               'evaluator')]
        lacking = [name for name in names if cfg.get(name) is None]
        if 0 < len(lacking) < len(names):
            raise ConfigError(
                f'{", ".join(names)} belong together, but '
                f'{", ".join(lacking)} is None. Set all three, or none of '
                'them' + (' (--no-validate).' if kind == 'val' else '.'))
