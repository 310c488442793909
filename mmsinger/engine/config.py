"""From a config file to a config that a runner can be built from.

``tools/train.py`` and ``tools/test.py`` go through these functions; a script
of your own may too::

    cfg = load_config('configs/singer_vitl_to_vits_ade20k.py')
    prepare_training(cfg)
    Runner.from_cfg(cfg).train()
"""
import difflib
import inspect
import os
import tempfile
from typing import Iterator, Optional, Tuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import ConfigParsingError
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmsinger.compat import onedl_config_packages
from mmsinger.engine.resume import (check_checkpoint_files,
                                    resume_from_intact_checkpoint)
from mmsinger.errors import ConfigError, near_paths
from mmsinger.models import FeatureDistiller
from mmsinger.registry import MODELS


def load_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file; ``mmseg::`` bases work on OneDL too.

    Args:
        path (str): The config file.
        options (dict, optional): Overrides, as from ``--cfg-options``.

    Returns:
        Config: The merged config, with a ``work_dir``.

    Raises:
        ConfigError: If the file cannot be read, or an option does not fit.
    """
    if not os.path.isfile(path):
        raise ConfigError(f'config {path!r}: no such file (working directory '
                          f'{os.getcwd()}).{near_paths(path)}')
    try:
        with onedl_config_packages():
            cfg = Config.fromfile(path)
    except (ConfigParsingError, FileNotFoundError, KeyError, SyntaxError,
            TypeError) as error:
        raise ConfigError(f'config {path!r} cannot be read: '
                          f'{_said(error)}') from error
    if options:
        check_options(cfg, options)
        try:
            cfg.merge_from_dict(options)
        except (KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f'--cfg-options {" ".join(options)}: cannot be set in '
                f'{path!r}: {_said(error)}') from error
    if cfg.get('work_dir') is None:
        stem = os.path.splitext(os.path.basename(path))[0]
        cfg.work_dir = os.path.join('work_dirs', stem)
    return cfg


def _said(error: Exception) -> str:
    # str() of a KeyError puts its message in quotes
    return str(error.args[0] if isinstance(error, KeyError) else error)


def check_options(cfg: Config, options: dict) -> None:
    """Raise :class:`ConfigError` for overrides whose path is misspelt.

    Merging makes whatever is not there, so that ``train_dataloadr.batch_size``
    would be set and never read. A part of the path that is not in the config
    is taken for a mistake where another key is nearly the same.

    Args:
        cfg (Config): The config before the merge.
        options (dict): Overrides by dotted path.
    """
    settings = set(inspect.signature(Runner.__init__).parameters)
    for option in options:
        *parents, _ = option.split('.')
        node, known = cfg, settings
        for i, name in enumerate(parents or [option]):
            if not isinstance(node, dict) and not isinstance(node, Config):
                break
            if name in node:
                node, known = node[name], ()
                continue
            if name not in known:
                near = difflib.get_close_matches(
                    name, {*node.keys(), *known}, 1, 0.85)
                if near:
                    right = '.'.join([*parents[:i], near[0]])
                    raise ConfigError(
                        f'--cfg-options {option}: the config has no '
                        f'{".".join([*parents[:i], name])!r}. Did you mean '
                        f'{right!r}?')
            break


def prepare_training(cfg: Config) -> None:
    """Complete and check a config before a runner is built from it.

    Adds the hooks that the distiller needs, if the config does not list them
    (a stock config that was wrapped by one line has none of ours), and ends
    in a :class:`ConfigError` where training could not start: a work dir that
    is not writable, a data folder that is missing or empty, a teacher
    checkpoint that is not there.

    Args:
        cfg (Config): The config; changed in place.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    add_required_hooks(cfg)
    keep_workers(cfg)
    compile_blocks_alone(cfg)
    use_cpu_amp(cfg)
    use_cpu_processes(cfg)
    use_strategy(cfg)
    compare_batch_size(cfg)
    check_work_dir(cfg.work_dir)
    check_data_folders(cfg, ('train_dataloader', 'val_dataloader'))
    resume_from_intact_checkpoint(cfg)
    check_checkpoint_files(cfg)


def add_required_hooks(cfg: Config) -> None:
    """Append the hooks that ``cfg.model`` asks for and the config lacks."""
    model_type = cfg.model.get('type')
    required = getattr(_model_class(cfg), 'required_hooks', ())
    hooks = list(cfg.get('custom_hooks') or [])
    present = {str(hook.get('type')).split('.')[-1] for hook in hooks}
    for name in required:
        if name not in present:
            print_log(f'{name} is added to custom_hooks: {model_type} '
                      'needs it', logger='current')
            hooks.append(ConfigDict(type=f'mmsinger.{name}'))
    cfg.custom_hooks = hooks


def compile_blocks_alone(cfg: Config) -> None:
    """Hand mmengine's ``compile`` over to a distiller that compares block
    outputs: traced as a whole, a step breaks into pieces where it reads
    them."""
    model_class = _model_class(cfg)
    if cfg.get('compile') and isinstance(model_class, type) and \
            issubclass(model_class, FeatureDistiller):
        cfg.model.setdefault('compile', cfg.pop('compile'))


def _model_class(cfg: Config) -> Optional[type]:
    model_type = cfg.model.get('type')
    return MODELS.get(model_type) if isinstance(model_type, str) \
        else model_type


def use_cpu_amp(cfg: Config) -> None:
    """Replace mmengine's ``AmpOptimWrapper``, which needs an accelerator, by
    our own where there is none."""
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and get_device() == 'cpu' and \
            str(wrapper.get('type')).split('.')[-1] == 'AmpOptimWrapper':
        print_log('No accelerator: mixed precision in bfloat16 on the CPU',
                  logger='current')
        wrapper.type = 'mmsinger.CPUAmpOptimWrapper'
        wrapper.pop('loss_scale', None)


def use_cpu_processes(cfg: Config) -> None:
    """Set up ``tools/dist_train.sh`` on CPUs: mmengine's own set-up asks for
    a GPU, in the process group and in DistributedDataParallel.

    Does nothing with another launcher, or where there is an accelerator.
    """
    if cfg.get('launcher') != 'pytorch' or get_device() != 'cpu':
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = dict(device_ids=None, **wrapper) \
        if 'device_ids' not in wrapper else wrapper


def scale_learning_rate(cfg: Config) -> None:
    """Scale the learning rate by the actual over the recipe's batch size.

    mmengine multiplies images a process and processes; iterations that are
    accumulated count here too.

    Args:
        cfg (Config): The config; changed in place.

    Raises:
        ConfigError: If it does not say the recipe's batch size.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ConfigError(
            '--auto-scale-lr: the config has no auto_scale_lr = '
            'dict(base_batch_size=N), the batch size that its learning '
            'rate was chosen for. Add it.')
    cfg.auto_scale_lr.enable = True
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    if accumulated > 1:
        base = cfg.auto_scale_lr.base_batch_size
        cfg.auto_scale_lr.base_batch_size = base / accumulated
        print_log(f'--auto-scale-lr: {accumulated} iterations are accumulated '
                  f'for the base batch size of {base}, {base / accumulated:g} '
                  'an iteration', logger='current')


def compare_batch_size(cfg: Config) -> None:
    """Warn if a step has another number of images than the learning rate was
    chosen for (``auto_scale_lr.base_batch_size``) and nothing scales it."""
    scaling = cfg.get('auto_scale_lr') or {}
    base = scaling.get('base_batch_size')
    loader, optimizer = cfg.get('train_dataloader'), cfg.get('optim_wrapper')
    if not base or scaling.get('enable') or not optimizer or \
            not loader or 'batch_size' not in loader:
        return
    processes = world_size(cfg)
    accumulated = optimizer.get('accumulative_counts', 1)
    images = loader.batch_size * processes * accumulated
    if images != base:
        print_log(
            f'A step has {images} images (train_dataloader.batch_size='
            f'{loader.batch_size} x {processes} processes x {accumulated} '
            f'accumulated), and the learning rate is made for {base:g}. Change '
            "train_dataloader.batch_size, or use tools/train.py's "
            '--auto-scale-lr.', logger='current', level=30)


def world_size(cfg: Config) -> int:
    """How many processes ``cfg.launcher`` has started."""
    variable = dict(pytorch='WORLD_SIZE', slurm='SLURM_NTASKS',
                    mpi='OMPI_COMM_WORLD_SIZE').get(cfg.get('launcher'), '')
    return int(os.environ.get(variable, 1))


def use_strategy(cfg: Config) -> None:
    """Choose the runner that reads ``strategy``; mmengine's usual one passes
    it over."""
    if cfg.get('strategy') and 'runner_type' not in cfg:
        print_log("strategy is set: runner_type is 'FlexibleRunner'",
                  logger='current')
        cfg.runner_type = 'FlexibleRunner'


def keep_workers(cfg: Config) -> None:
    """Keep data workers alive between epochs unless the config says
    otherwise, as mmpretrain's own ``tools/train.py`` does."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if isinstance(loader, dict) and loader.get('num_workers', 0) > 0:
            loader.setdefault('persistent_workers', True)


def check_work_dir(work_dir: str) -> None:
    """Raise :class:`ConfigError` unless files can be written there."""
    try:
        os.makedirs(work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f'work_dir={work_dir!r} is not writable: {error.strerror}. '
            'Choose another one with --work-dir, or mend its permissions.'
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
        for key, dataset in _datasets(loader['dataset'], f'{name}.dataset'):
            for path_key, path in _folders(dataset):
                _check_folder(f'{key}.{path_key}', path)
                if path_key == 'data_prefix.img_path':
                    _check_suffix(key, path, dataset)


def _datasets(dataset: dict, key: str) -> Iterator[Tuple[str, dict]]:
    """The innermost dataset configs (inside Repeat-, ConcatDataset, …)."""
    inner = dataset.get('dataset')
    if isinstance(inner, dict):
        yield from _datasets(inner, f'{key}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for i, one in enumerate(dataset['datasets']):
            yield from _datasets(one, f'{key}.datasets[{i}]')
    else:
        yield key, dataset


def _folders(dataset: dict) -> Iterator[Tuple[str, str]]:
    root = dataset.get('data_root') or ''
    if root:
        yield 'data_root', root
    prefix = dataset.get('data_prefix') or {}
    prefixes = prefix.items() if isinstance(prefix, dict) else [('', prefix)]
    for name, folder in prefixes:
        if isinstance(folder, str) and folder:
            key = f'data_prefix.{name}' if name else 'data_prefix'
            yield key, os.path.join(root, folder)


def _check_suffix(key: str, path: str, dataset: dict) -> None:
    """mmengine ends in "need at least one array to concatenate" where no
    image has the suffix that a dataset lists."""
    suffix = dataset.get('img_suffix')
    if not suffix or '://' in path or dataset.get('ann_file'):
        return
    if not any(name.endswith(suffix) for _, _, names
               in os.walk(path, followlinks=True) for name in names):
        raise ConfigError(
            f'{key}: no file in {path!r} ends with img_suffix={suffix!r}. '
            f'Set {key}.img_suffix to what the images end with, or point '
            'data_root to your data set.')


def _check_folder(key: str, path: str) -> None:
    if '://' in path:
        return
    if not os.path.isdir(path):
        raise ConfigError(
            f'{key}: no folder {path!r} (working directory {os.getcwd()}). '
            'Point data_root to your data set.')
    if not any(files for _, _, files in os.walk(path, followlinks=True)):
        raise ConfigError(f'{key}: the folder {path!r} holds no files. '
                          'Point data_root to your data set.')
