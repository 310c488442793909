"""A run's first steps, for what they show: ``tools/train.py --dry-run``."""
import resource
import tempfile
from typing import List, Optional, Sequence

import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from mmengine.utils import to_2tuple

from mmsinger.engine.checks import (check_counting, check_data_folders,
                                    inner_datasets)
from mmsinger.engine.hooks import CalibrationHook
from mmsinger.engine.logs import parameter_groups
from mmsinger.engine.prepare import build_runner, prepare_training
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError

STEPS = 3


def dry_run(cfg: Config) -> str:
    """Build what a config describes and take its first steps, in a folder
    that is removed.

    Args:
        cfg (Config): A recipe or a plain config; changed in place.

    Returns:
        str: What is distilled into what, what trains at which rate, seconds a
        step, memory, and how long the whole run would take.

    Raises:
        ConfigError: As a run would; without a validation.
    """
    check_counting(cfg)
    length = dict(cfg.train_cfg)
    missing = _use_random_images(cfg)
    cfg.resume = False
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_cfg = dict(type='mmengine.IterBasedTrainLoop', max_iters=STEPS)
    cfg.param_scheduler = None
    cfg.visualizer = dict(type='mmengine.Visualizer')  # a report is kept
    if cfg.get('log_level') in (None, 'INFO'):
        cfg.log_level = 'WARNING'  # what matters is in the report
    for hook in cfg.get('custom_hooks') or ():
        if isinstance(hook, dict):  # EMAHook's may be after these few steps
            hook.update({key: 0 for key in ('begin_iter', 'begin_epoch')
                         if key in hook})
    hooks = dict(cfg.get('default_hooks') or {})
    hooks.pop('timer', None)  # mmengine's own is there then
    hooks['checkpoint'] = dict(
        hooks.get('checkpoint') or dict(type='CheckpointHook'),
        interval=STEPS + 1, save_last=False, by_epoch=False, out_dir=None)
    cfg.default_hooks = hooks
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cfg.work_dir = folder
        prepare_training(cfg)
        runner = build_runner(cfg)
        runner.train()
    # By mmengine's IterTimerHook, after RunGuardHook has waited for a GPU
    seconds, _ = runner.message_hub.get_scalar('train/time').data
    steps = length.get('max_iters')
    if steps is None and not missing:
        steps = length['max_epochs'] * len(runner.train_dataloader)
    found = [hook.found for hook in runner.hooks
             if isinstance(hook, CalibrationHook) and hook.found]
    return '\n'.join(['', *missing, *_taps(runner), *found,
                      parameter_groups(runner),
                      *_costs(seconds, steps)])


def _use_random_images(cfg: Config) -> List[str]:
    """Put RandomImages in the place of training data that are not there, and
    return a line that says so."""
    try:
        check_data_folders(cfg, ('train_dataloader', ))
        return []
    except ConfigError as error:
        datasets = inner_datasets(cfg.train_dataloader.dataset, '')
        pipeline = next(
            (dataset['pipeline'] for _, dataset in datasets
             if dataset.get('pipeline')), None)
        if pipeline is None:
            raise
        student = cfg.model.get('student', cfg.model)
        size = (student.get('data_preprocessor') or {}).get('size') or (
            student.get('backbone') or student).get('img_size') or 512
        cfg.train_dataloader.dataset = ConfigDict(
            type='mmsinger.RandomImages', pipeline=pipeline,
            size=list(to_2tuple(size)))
        return ['Random images, through the pipeline of the data that are '
                f'missing: {error}']


def _taps(runner: Runner) -> List[str]:
    model = unwrap(runner.model)
    lines = []
    for layer, student_layer in zip(getattr(model, 'layers', ()),
                                    getattr(model, 'student_layers', ())):
        projector = model.projectors[str(layer)]
        shapes = ', '.join(str(tuple(weight.shape))
                           for weight in projector.parameters())
        lines.append(f'Teacher layer {layer} -> student layer '
                     f'{student_layer}, projected by {shapes}')
    return lines


def _costs(seconds: Sequence[float], steps: Optional[int]) -> List[str]:
    each = min(seconds[1:])  # the first one warms up
    if torch.cuda.is_available():
        memory, where = torch.cuda.max_memory_allocated(), 'GPU'
    else:  # kilobytes on Linux
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        where = 'process'
    return [f'A step: {each:.3g} s, {memory / 2**30:.2f} GiB ({where}, peak)',
            f'The run: {steps} steps, about {each * steps / 3600:.3g} h '
            'without validation' if steps else
            'The run: how many steps an epoch has, the data would say']
