"""From a recipe to the linear evaluation of its student or teacher."""
import copy
from typing import Any, Dict, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmsinger.engine.loading import preprocessor_settings, teacher_settings
from mmsinger.engine.prepare import converts_to_rgb
from mmsinger.errors import ConfigError
from mmsinger.models.distillers import is_distiller
from mmsinger.models.probes.frozen_backbone import FrozenBackbone


def evaluation_config(task: Config, source: Config,
                      checkpoint: Optional[str] = None,
                      teacher: bool = False) -> Config:
    """The config of one linear evaluation.

    The backbone, its normalisation and its channel order come from the
    source; data, head, schedule and metrics from the task.

    Args:
        task (Config): One of configs/linear_eval, or the like: a model whose
            backbone is a :class:`FrozenBackbone`.
        source (Config): A distillation recipe, a plain model's config, or
            one of configs/_base_/teachers alone.
        checkpoint (str, optional): The weights. Of a student: a
            ``*_student.pth``, a training checkpoint or a plain one. Defaults
            to None, the one that the config names.
        teacher (bool): Evaluate the teacher. Defaults to False, the student.

    Returns:
        Config: A plain config for ``tools/train.py``; neither argument is
        changed.

    Raises:
        ConfigError: If the task has no FrozenBackbone, or the source has no
            teacher, no backbone or no weights.
    """
    cfg = copy.deepcopy(task)
    frozen = cfg.model.get('backbone') or {}
    if frozen.get('type') not in (FrozenBackbone, 'mmsinger.FrozenBackbone'):
        raise ConfigError(
            'The task config has model.backbone.type='
            f'{frozen.get("type")!r}; a linear evaluation needs '
            "'mmsinger.FrozenBackbone'. Take a config of configs/linear_eval.")
    weights, preprocessor = _teacher(source, checkpoint) if teacher \
        else _student(source, checkpoint)
    if 'prefix' in frozen:  # the task's own word
        weights.pop('prefix')
    frozen.update(weights)
    if preprocessor is not None:
        _normalise_alike(cfg.model.setdefault('data_preprocessor', {}),
                         preprocessor)
    _set_in_channels(cfg.model)
    return cfg


def _student(source: Config, checkpoint: Optional[str]
             ) -> Tuple[Dict[str, Any], Optional[dict]]:
    """Arguments of FrozenBackbone, and the data preprocessor's config."""
    if 'model' not in source:
        raise ConfigError('The source config has no model. Give a recipe or '
                          "a plain model's config; for a file of "
                          'configs/_base_/teachers add --teacher.')
    student = source.model.student if is_distiller(source.model) \
        else source.model
    backbone = _scoped(student.get('backbone', student), source)
    pretrained = (backbone.get('init_cfg') or {}).get('type') == 'Pretrained'
    if checkpoint is None and not pretrained:
        raise ConfigError(
            'No checkpoint to evaluate: the source config is a recipe to '
            'train with. Name the checkpoint that it led to, for instance '
            'work_dirs/NAME/iter_400_student.pth, or give --teacher to '
            'evaluate its teacher.')
    prefix = 'backbone.' if checkpoint and 'backbone' in student else ''
    return dict(backbone=backbone, checkpoint=checkpoint, prefix=prefix), \
        preprocessor_settings(source)


def _teacher(source: Config, checkpoint: Optional[str]
             ) -> Tuple[Dict[str, Any], Optional[dict]]:
    """Arguments of FrozenBackbone for a recipe's teacher, and the data
    preprocessor's config."""
    part, teacher = teacher_settings(source)
    if part == 'model.backbone':
        raise ConfigError(
            f'{source.filename or "The config"} is a '
            f'{source.model.get("type")}, which has no teacher: give a '
            'distillation recipe or a file of configs/_base_/teachers.')
    given = {key: teacher[key] for key in ('ignore_keys', 'input_size')
             if key in teacher}
    weights = dict(
        backbone=_scoped(teacher['backbone'], source),
        checkpoint=checkpoint or teacher.get('checkpoint'),
        prefix=teacher.get('prefix', ''), **given)
    preprocessor = preprocessor_settings(source)
    if preprocessor is not None or teacher.get('mean') is not None:
        # Without a student's, a teacher is fed in the order that it takes
        in_rgb = preprocessor is None or converts_to_rgb(preprocessor) != \
            teacher.get('swap_channels', False)
        preprocessor = preprocessor or {}
        if teacher.get('mean') is not None:
            mean, std = teacher['mean'], teacher['std']
        else:  # the student's, which the teacher sees in its own order
            mean, std = (
                values[::-1] if values and teacher.get('swap_channels')
                else values for values in (
                    preprocessor.get('mean'), preprocessor.get('std')))
        preprocessor = dict(mean=mean, std=std, to_rgb=in_rgb)
    return weights, preprocessor


def _scoped(backbone: dict, source: Config) -> dict:
    """A backbone's config that means the same in another default scope."""
    scope = source.get('default_scope')
    return dict(_scope_=scope, **backbone) \
        if scope and '_scope_' not in backbone else dict(backbone)


def _normalise_alike(preprocessor: dict, source: dict) -> None:
    """Give the task's data preprocessor the source's mean, std and channel
    order; mmpretrain and mmseg name the latter differently."""
    name = 'bgr_to_rgb' if str(preprocessor.get('type')).split('.')[-1] == \
        'SegDataPreProcessor' else 'to_rgb'
    preprocessor.update({'mean': source.get('mean'), 'std': source.get('std'),
                         name: converts_to_rgb(source)})


def _set_in_channels(model: dict) -> None:
    """Fit the head to the backbone's width."""
    head = model.get('decode_head') or model.get('head')
    if head is None:
        return
    frozen = {k: v for k, v in model.backbone.items() if k != 'type'}
    # Beside a model that is being built in another scope
    with DefaultScope.overwrite_default_scope('mmsinger'):
        width = FrozenBackbone(**frozen).out_channels
    head.in_channels = width
    if 'channels' in head:  # of FCNHead, which has no other layer
        head.channels = width
