"""From a config file to a config that a runner can be built from.

``tools/train.py`` and ``tools/test.py`` go through these functions; a script
of your own may too::

    cfg = load_config('configs/singer_vitl_to_vits_ade20k.py')
    prepare_training(cfg)
    build_runner(cfg).train()
"""
import os
from datetime import timedelta
from typing import Any, Optional, Sequence, Tuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import to_2tuple

from mmsinger.compat import onedl_config_packages
from mmsinger.engine.checks import (check_counting, check_data_folders,
                                    check_pretrained, check_validation,
                                    check_work_dir, inner_datasets)
from mmsinger.engine.logs import (ParameterGroupsHook, demote_details,
                                  drop_starts)
from mmsinger.engine.optim import check_custom_keys
from mmsinger.engine.options import apply_options, check_variables
from mmsinger.engine.parts import check_parts
from mmsinger.engine.resume import (check_checkpoint_files,
                                    resume_from_intact_checkpoint)
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, no_file, type_name, walk_config
from mmsinger.files import lock_folder
from mmsinger.models.distillers import FeatureDistiller, is_distiller
from mmsinger.registry import find_type

# Of a model that is no distiller of ours
PLAIN_HOOKS = ('SafeCheckpointHook', 'RunGuardHook', 'RandomStateHook')

TIMEOUT = 1800  # seconds until what hangs ends a run


class RunConfig(Config):
    """mmengine's config, which formats its text once for each content: yapf
    takes seconds for a long path in it, and a run asks five times at its
    start and at each checkpoint."""

    @property
    def pretty_text(self) -> str:
        """The config as formatted Python."""
        content = repr(self._cfg_dict)
        if self.__dict__.get('_formatted', ('', ''))[0] != content:
            # Config's own __setattr__ writes settings
            try:
                text = super().pretty_text
            except SyntaxError as error:  # whatever it was
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise
            self.__dict__['_formatted'] = (content, text)
        return self.__dict__['_formatted'][1]


def load_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file; ``mmseg::`` bases work on OneDL too.

    Args:
        path (str): The config file.
        options (dict, optional): Overrides, as from ``--cfg-options``; see
            :func:`~mmsinger.engine.options.apply_options`.

    Returns:
        Config: The merged config, with a ``work_dir``.

    Raises:
        ConfigError: If the file cannot be read, an option does not fit, or
            nothing would read what it sets; see
            :func:`~mmsinger.engine.parts.check_parts`.
    """
    if not os.path.isfile(path):
        raise ConfigError(f'config {path!r}: {no_file(path)}')
    try:
        with onedl_config_packages():
            cfg = Config.fromfile(path)
            list(walk_config(cfg._cfg_dict))  # imports what a lazy one names
    except Exception as error:  # it is a program, and may raise anything
        said = f'{type(error).__name__}: {error}'
        if 'U+FEFF' in said:
            said += '. Save the file without a byte order mark (plain UTF-8)'
        raise ConfigError(f'config {path!r} cannot be read: {said}'
                          ) from error
    check_variables(cfg)
    object.__setattr__(cfg, '__class__', RunConfig)
    if options:
        apply_options(cfg, options)
    if 'default_scope' in cfg:  # bases leave it to their recipe
        check_parts(cfg)
    if cfg.get('work_dir') is None:
        stem = os.path.splitext(os.path.basename(path))[0]
        cfg.work_dir = os.path.join('work_dirs', stem)
    return cfg


def prepare_training(cfg: Config) -> None:
    """Complete and check a config before a runner is built from it.

    Adds the hooks that the model needs (recipes and stock configs list none
    of ours), fits the config to the machine, and ends in a
    :class:`ConfigError` where training could not start: a work dir that is
    not writable or in use, a data folder that is missing or empty, weights
    that are not there, data preprocessors that contradict each other.

    Args:
        cfg (Config): The config; changed in place.
    """
    if not isinstance(cfg.get('model'), dict):
        raise ConfigError(
            f'config {cfg.filename!r} has no model to train. Give a recipe, '
            'not one of the bases that it is made of.')
    scope = cfg.get('default_scope') or 'mmengine'
    init_default_scope(scope)
    check_parts(cfg)
    check_validation(cfg)
    check_counting(cfg)
    add_required_hooks(cfg)
    fit_workers(cfg)
    compile_blocks_alone(cfg)
    use_cpu_amp(cfg)
    use_student_constructor(cfg)
    use_data_preprocessor(cfg)
    refuse_separate_wrapper(cfg)
    use_cpu_processes(cfg)
    use_strategy(cfg)
    compare_batch_size(cfg)
    check_work_dir(cfg.work_dir, 'work_dir')
    checkpoints = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if '://' not in (checkpoints.get('out_dir') or '://'):
        check_work_dir(checkpoints.out_dir, 'default_hooks.checkpoint.out_dir')
    if launched(cfg)[0] == 0:
        lock_folder(cfg.work_dir)
    check_data_folders(cfg, ('train_dataloader', 'val_dataloader'))
    resume_from_intact_checkpoint(cfg)
    check_checkpoint_files(cfg)


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a prepared config, whose log begins with what
    matters: a summary of the parameter groups instead of a line a parameter.

    Args:
        cfg (Config): See :func:`prepare_training`.

    Returns:
        Runner: mmengine's, of the config's ``runner_type`` if it has one.
    """
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg \
        else Runner.from_cfg(cfg)
    model = unwrap(runner.model)
    check_pretrained(cfg.model, model)
    if isinstance(model, torch.nn.Module):  # FlexibleRunner builds it later
        check_custom_keys(model, (
            (cfg.get('optim_wrapper') or {}).get('paramwise_cfg')
            or {}).get('custom_keys', {}))
    runner.logger.addFilter(demote_details)
    if cfg.get('resume') and cfg.get('load_from'):
        runner.logger.addFilter(drop_starts)
    runner.register_hook(ParameterGroupsHook())
    return runner


def add_required_hooks(cfg: Config) -> None:
    """Append the hooks that the model needs and ``custom_hooks`` lacks: its
    class's ``required_hooks``, or of a plain model :data:`PLAIN_HOOKS`.

    One that the config lists keeps its arguments.

    Raises:
        ConfigError: If ``custom_hooks`` is no list of hooks.
    """
    hooks = cfg.get('custom_hooks') or []
    if not isinstance(hooks, (list, tuple)) or not all(
            isinstance(hook, dict) and 'type' in hook for hook in hooks):
        raise ConfigError(
            f'custom_hooks={hooks!r} must be a list of dict(type=…), on the '
            "command line custom_hooks=\"[dict(type='EMAHook')]\".")
    present = {type_name(hook['type']) for hook in hooks}
    added = [name for name in getattr(
        find_type(cfg.model.get('type')), 'required_hooks', PLAIN_HOOKS)
        if name not in present]
    if added:
        print_log(f'Added to custom_hooks: {", ".join(added)}',
                  logger='current')
    cfg.custom_hooks = [*hooks, *(
        ConfigDict(type=f'mmsinger.{name}') for name in added)]


def compile_blocks_alone(cfg: Config) -> None:
    """Hand mmengine's ``compile`` over to a distiller that compares block
    outputs: traced as a whole, a step breaks into pieces where it reads
    them."""
    if cfg.get('compile') and is_distiller(cfg.model, FeatureDistiller):
        cfg.model.setdefault('compile', cfg.pop('compile'))


def use_cpu_amp(cfg: Config) -> None:
    """Replace mmengine's ``AmpOptimWrapper``, which needs an accelerator, by
    our own where there is none."""
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and get_device() == 'cpu' and \
            type_name(wrapper.get('type')) == 'AmpOptimWrapper':
        if wrapper.get('dtype') not in (None, 'bfloat16', torch.bfloat16):
            raise ConfigError(
                f'optim_wrapper.dtype={wrapper.dtype!r} needs an accelerator, '
                "and there is none. Set it to 'bfloat16', or leave it out.")
        print_log('No accelerator: mixed precision in bfloat16 on the CPU',
                  logger='current')
        wrapper.type = 'mmsinger.CPUAmpOptimWrapper'
        wrapper.pop('loss_scale', None)
        wrapper.pop('dtype', None)


def use_student_constructor(cfg: Config) -> None:
    """Let the toolbox's own optimizer constructor see the student as a plain
    model (:class:`~mmsinger.engine.optim.StudentFirstConstructor`)."""
    wrapper = cfg.get('optim_wrapper')
    constructor = wrapper.get('constructor') if isinstance(wrapper, dict) \
        else None
    ours = 'mmsinger.StudentFirstConstructor'
    if constructor in (None, 'DefaultOptimWrapperConstructor', ours) or \
            not is_distiller(cfg.model):
        return
    wrapper.constructor = ours
    wrapper.paramwise_cfg = dict(wrapper.get('paramwise_cfg') or {},
                                 student_constructor=constructor)


def use_data_preprocessor(cfg: Config) -> None:
    """Make the data preprocessors that a distiller's config holds agree: the
    first of the student's, the one in ``model`` and the one at the top is
    used, and mmengine passes over the others.

    Raises:
        ConfigError: If they contradict each other, and the crop of the
            training pipeline does not decide it.
    """
    if not is_distiller(cfg.model):
        return
    given = {
        'model.student.data_preprocessor':
            (cfg.model.get('student') or {}).get('data_preprocessor'),
        'model.data_preprocessor': cfg.model.get('data_preprocessor'),
        'data_preprocessor': cfg.get('data_preprocessor')}
    (used, own), *others = [(place, found) for place, found in given.items()
                            if found] or [('', {})]
    for place, other in others:
        for key, value in other.items():
            if key not in own:
                print_log(f'{place}.{key}={value!r} is not used: {used} '
                          f'stands before it. Set {used}.{key}.',
                          logger='current', level=30)
            elif _plain(own[key]) != _plain(value):
                crop = _plain(_crop_size(cfg))
                if key != 'size' or crop not in (_plain(own[key]),
                                                 _plain(value)):
                    raise ConfigError(
                        f'{place}.{key}={value!r} and {used}.{key}='
                        f'{own[key]!r} contradict each other. The latter is '
                        'used: set it, and remove the other or make it the '
                        'same.')
                print_log(f'data_preprocessor.size={crop}, as the training '
                          'pipeline crops', logger='current')
                own.size = other.size = crop
    teacher = cfg.model.get('teacher') or {}
    if own.get('mean') and not converts_to_rgb(own) and \
            teacher.get('mean') and 'swap_channels' not in teacher:
        print_log(
            f'{used} leaves images in BGR, and model.teacher.mean suggests a '
            'teacher of RGB. Say which by model.teacher.swap_channels=True, '
            'or False if the teacher takes BGR.', logger='current', level=30)


def converts_to_rgb(preprocessor: dict) -> bool:
    """Whether a data preprocessor's config turns images, which are read as
    BGR, into RGB: mmpretrain's key for it, or mmseg's."""
    return bool(preprocessor.get('to_rgb') or preprocessor.get('bgr_to_rgb'))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _crop_size(cfg: Config) -> Optional[Sequence[int]]:
    """What the last crop of the training pipeline leaves."""
    loader = cfg.get('train_dataloader') or {}
    crops = [step['crop_size'] for _, dataset in inner_datasets(
        loader.get('dataset') or {}, '')
        for step in dataset.get('pipeline') or () if 'crop_size' in step]
    return to_2tuple(crops[-1]) if crops else None


def refuse_separate_wrapper(cfg: Config) -> None:
    """Raise :class:`ConfigError` for mmengine's wrapper of a model's parts:
    a distiller takes its step as a whole."""
    kind = (cfg.get('model_wrapper_cfg') or {}).get('type')
    if 'MMSeparateDistributedDataParallel' in str(kind) and \
            is_distiller(cfg.model):
        raise ConfigError(
            f'model_wrapper_cfg.type={str(kind)!r} wraps the parts of a model '
            'one by one, for models that train them with several optimizers. '
            'A distiller takes one step as a whole: remove model_wrapper_cfg, '
            "or set its type to 'MMDistributedDataParallel'.")


def use_cpu_processes(cfg: Config) -> None:
    """Set up ``tools/dist_train.sh`` on CPUs: mmengine's own set-up asks for
    a GPU, in the process group and in DistributedDataParallel.

    Does nothing with another launcher, or where there is an accelerator.
    """
    if cfg.get('launcher') != 'pytorch' or get_device() != 'cpu':
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo', timeout=timedelta(
            seconds=cfg.env_cfg.dist_cfg.timeout))
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
    if cfg.auto_scale_lr.get('enable'):  # of a dumped config, which is done
        print_log('--auto-scale-lr: the config has it already',
                  logger='current')
        return
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
    _, processes = launched(cfg)
    accumulated = optimizer.get('accumulative_counts', 1)
    images = loader.batch_size * processes * accumulated
    if images != base:
        print_log(
            f'A step has {images} images (train_dataloader.batch_size='
            f'{loader.batch_size} x {processes} processes x {accumulated} '
            f'accumulated), and the learning rate is made for {base:g}. '
            "Change train_dataloader.batch_size, or use tools/train.py's "
            '--auto-scale-lr.', logger='current', level=30)


def launched(cfg: Config) -> Tuple[int, int]:
    """Which process this is of those that ``cfg.launcher`` has started, and
    how many these are."""
    rank, processes = dict(
        pytorch=('RANK', 'WORLD_SIZE'), slurm=('SLURM_PROCID', 'SLURM_NTASKS'),
        mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE')
    ).get(cfg.get('launcher'), ('', ''))
    return int(os.environ.get(rank, 0)), int(os.environ.get(processes, 1))


def use_strategy(cfg: Config) -> None:
    """Choose the runner that reads ``strategy``; mmengine's usual one passes
    it over."""
    if cfg.get('strategy') and 'runner_type' not in cfg:
        print_log("strategy is set: runner_type is 'FlexibleRunner'",
                  logger='current')
        cfg.runner_type = 'FlexibleRunner'


def fit_workers(cfg: Config) -> None:
    """Keep data workers alive between epochs unless the config says
    otherwise, as mmpretrain's own ``tools/train.py`` does, and wait for them,
    and for other processes, :data:`TIMEOUT` seconds; without workers, drop
    what torch takes for a mistake then."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if not isinstance(loader, dict):
            continue
        if loader.get('num_workers', 0) > 0:
            loader.setdefault('persistent_workers', True)
            loader.setdefault('timeout', TIMEOUT)
        else:
            for key in ('persistent_workers', 'prefetch_factor', 'timeout'):
                loader.pop(key, None)
    env = cfg.setdefault('env_cfg', ConfigDict())
    env.setdefault('dist_cfg', ConfigDict(backend='nccl'))
    env.dist_cfg.setdefault('timeout', TIMEOUT)
