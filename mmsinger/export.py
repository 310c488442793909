"""The student alone: its weights and its config, without mmsinger.

A training checkpoint holds the student under ``student.``, beside the
projectors, the adapters and the optimizer. What leaves this module has the
key layout of the plain mmpretrain or mmseg model and loads with
``strict=True`` where mmsinger is not installed.
"""
import copy
import os
from typing import Any, Dict, Optional, Union

import torch
from mmengine.config import Config

from mmsinger.checkpoint import (STUDENT, load_checkpoint, load_strict,
                                 read_weights, student_state_dict, weights_of)
from mmsinger.errors import ConfigError, check_output_file
from mmsinger.files import atomic_save
from mmsinger.models.distillers import is_distiller
from mmsinger.registry import MODELS

SUFFIX = '_student'


def student_config(cfg: Config) -> Config:
    """The config of the plain student: the same data, schedule and metrics.

    Nothing of mmsinger is in it, unless its data are.

    Args:
        cfg (Config): A recipe. It is not changed.

    Returns:
        Config: ``model`` is the recipe's ``model.student``; a config that
        has no distiller comes back as a copy.
    """
    plain = copy.deepcopy(cfg)
    if not is_distiller(cfg.model):
        return plain
    preprocessor = plain.model.get('data_preprocessor')
    plain.model = plain.model.student
    if preprocessor and 'backbone' in plain.model:  # a whole model
        plain.model.setdefault('data_preprocessor', preprocessor)
    plain.custom_hooks = [
        hook for hook in plain.get('custom_hooks') or []
        if not _is_ours(hook.get('type'))
    ]
    for name, hook in list((plain.get('default_hooks') or {}).items()):
        if _is_ours((hook or {}).get('type', '')):
            plain.default_hooks.pop(name)
    wrapper = plain.get('optim_wrapper') or {}
    if wrapper.get('type') == 'mmsinger.CPUAmpOptimWrapper':
        wrapper.type = 'AmpOptimWrapper'  # which it stands in for
    if wrapper.get('constructor') == 'mmsinger.StudentFirstConstructor':
        wrapper.constructor = wrapper.paramwise_cfg.pop('student_constructor')
    if _is_ours((plain.get('strategy') or {}).get('type', '')):
        plain.pop('strategy')
        plain.pop('runner_type', None)
    if cfg.model.get('compile'):  # of the blocks alone
        plain.compile = cfg.model.compile
    for key in ('teacher', 'student', 'distiller'):
        plain.pop(key, None)
    plain.load_from, plain.resume = None, False  # they are the distiller's
    imports = plain.get('custom_imports')
    if imports and "'mmsinger." not in str(plain.to_dict()):  # data of ours
        names = imports.get('imports', [])
        imports['imports'] = [
            name for name in ([names] if isinstance(names, str) else names)
            if name != 'mmsinger']
    return plain


def _is_ours(kind: Union[str, type]) -> bool:
    name = kind if isinstance(kind, str) else f'{kind.__module__}.'
    return name.startswith('mmsinger.')


def save_student(weights: Dict[str, torch.Tensor], meta: Dict[str, Any],
                 path: str) -> None:
    """Write a student file: complete or not at all.

    Args:
        weights (dict[str, Tensor]): In the plain layout.
        meta (dict): Of the training checkpoint; what a plain model can use
            (classes and palette, epoch, iteration, versions) is kept.
        path (str): Where to write.
    """
    kept = ('dataset_meta', 'epoch', 'iter', 'seed', 'mmengine_version')
    content = dict(
        meta={key: meta[key] for key in kept if key in meta},
        state_dict={k: v.detach().cpu().clone() for k, v in weights.items()})
    atomic_save(content, path)


def student_path(checkpoint: str, ending: str = '') -> str:
    """``work_dirs/x/epoch_3.pth`` -> ``work_dirs/x/epoch_3_student.pth``; with
    another ending of a student's file too."""
    stem, extension = os.path.splitext(checkpoint)
    if ending:
        stem = stem.removesuffix(SUFFIX)
    return f'{stem}{SUFFIX}{ending or extension}'


def load_student(checkpoint: str) -> Dict[str, torch.Tensor]:
    """The student's weights, in the plain layout, of a training checkpoint or
    a student file."""
    weights = read_weights(checkpoint)
    return student_state_dict(weights) or weights


def check_not_itself(out: str, checkpoint: str) -> None:
    """Raise ConfigError if ``out`` cannot be written or is what is read."""
    if os.path.realpath(out) == os.path.realpath(checkpoint):
        raise ConfigError(
            f'--out={out!r} is the checkpoint itself, which would be lost. '
            'Name another file.')
    check_output_file(out)


def export_student(checkpoint: str, out: Optional[str] = None,
                   cfg: Optional[Config] = None) -> str:
    """Write the student-only file of a training checkpoint.

    Training does this by itself (``StudentCheckpointHook``); this is for
    older checkpoints.

    Args:
        checkpoint (str): A training checkpoint.
        out (str, optional): Where to write. Defaults to
            ``CHECKPOINT_student.pth`` beside it.
        cfg (Config, optional): The recipe. If given, the plain student is
            built and the weights are loaded into it strictly before anything
            is written. Defaults to None, no such check.

    Returns:
        str: The path written.

    Raises:
        ConfigError: If the checkpoint holds no student, or does not fit, or
            would be overwritten.
    """
    out = out or student_path(checkpoint)
    check_not_itself(out, checkpoint)
    content = load_checkpoint(checkpoint)
    weights = student_state_dict(weights_of(content, checkpoint))
    if not weights:
        raise ConfigError(
            f'{checkpoint!r} holds no student: no key begins with '
            f'{STUDENT!r}. Give a checkpoint that a distiller wrote.')
    if cfg is not None:
        load_strict(
            MODELS.build(student_config(cfg).model), weights,
            what=f'the student of {checkpoint!r} and the config',
            fix='Give the config that the checkpoint was trained with (it is '
            'dumped in the work dir).')
    save_student(weights, content.get('meta', {}), out)
    return out
