"""The teacher to look at, from a config of any of three kinds."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from mmengine.config import Config
from torch import Tensor

from mmsinger.checkpoint import load_checkpoint, weights_of
from mmsinger.errors import ConfigError, check_keys
from mmsinger.models.distillers.base import argument_names
from mmsinger.models.features.anatomy import patch_stride
from mmsinger.models.teachers.frozen import (FrozenTeacher, Normalisation,
                                             feature_settings)

IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class Subject(NamedTuple):
    """A teacher and how it is to be fed.

    Attributes:
        teacher (FrozenTeacher): With its weights, on the CPU.
        normalisation (Normalisation): What images get before the teacher.
        channels (str): ``'rgb'`` or ``'bgr'``, their channel order.
        source (str): Which part of the config it is.
        notes (list[str]): What had to be assumed.
        recipe (bool): Whether the config is a SiNGER recipe.
        layers (list, optional): The blocks that the config distils, where it
            says so.
    """
    teacher: FrozenTeacher
    normalisation: Normalisation
    channels: str
    source: str
    notes: List[str]
    recipe: bool
    layers: Optional[list] = None

    def feed(self, images: Tensor) -> Tensor:
        """Images as the teacher's data pipeline would hand them over.

        Args:
            images (Tensor): RGB, 0 to 255, shape (B, 3, H, W).

        Returns:
            Tensor: Shape (B, 3, H, W), float32.
        """
        images = images.float()
        if self.channels == 'bgr':
            images = images.flip(1)
        if self.normalisation.mean is None:
            return images
        mean, std = (images.new_tensor(values)[:, None, None]
                     for values in self.normalisation)
        return (images - mean) / std


def load_subject(cfg: Config, checkpoint: Optional[str] = None,
                 mean: Optional[Sequence[float]] = None,
                 std: Optional[Sequence[float]] = None) -> Subject:
    """Build the teacher of a config and load its weights.

    Args:
        cfg (Config): A distillation recipe (``model.teacher``), a file of
            ``configs/_base_/teachers`` (``teacher``), or a plain model
            (``model.backbone``).
        checkpoint (str, optional): Instead of the config's own. Defaults to
            None.
        mean (Sequence[float], optional): RGB, 0 to 255, instead of what the
            config says. Defaults to None.
        std (Sequence[float], optional): See ``mean``.

    Returns:
        Subject: Ready to look at images.

    Raises:
        ConfigError: If the config has no teacher, it is no vision
            transformer, or the checkpoint does not fit.
    """
    model = cfg.get('model') or {}
    if isinstance(model.get('teacher'), dict):
        source, settings = 'model.teacher', feature_settings(model.teacher)
    elif isinstance(cfg.get('teacher'), dict):
        source, settings = 'teacher', feature_settings(cfg.teacher)
    elif isinstance(model.get('backbone'), dict):
        source, settings = 'model.backbone', dict(backbone=model.backbone)
    else:
        raise ConfigError(
            f'{cfg.filename!r} has no teacher to look at: no model.teacher, '
            'no teacher and no model.backbone. Give a recipe such as '
            'configs/singer_vitl_to_vits_in1k.py, a file of '
            'configs/_base_/teachers, or a model whose backbone is a vision '
            'transformer.')
    if checkpoint is not None:
        settings['checkpoint'] = checkpoint
    if source == 'model.backbone' and _prefixed(settings, cfg):
        settings['prefix'] = 'backbone.'
    if (mean is None) != (std is None):
        raise ConfigError('--mean and --std belong together: got '
                          f'--mean {mean}, --std {std}.')
    settings['remember'] = 0  # constant memory
    if mean is not None:
        settings.update(mean=mean, std=std, swap_channels=False)
    check_keys(source, settings, argument_names(FrozenTeacher))
    teacher = FrozenTeacher(**settings)
    teacher.load_weights()

    notes = []
    if teacher.checkpoint is None:
        notes.append('No checkpoint was given: the weights are random, and '
                     'the report says nothing about a trained teacher.')
    normalisation, channels = (Normalisation(None, None), 'rgb') \
        if mean is not None else _feeding(cfg, source, teacher)
    if normalisation.mean is None and teacher.normalisation is None:
        normalisation = IMAGENET
        notes.append(
            'The config does not say how images are normalised: ImageNet\'s '
            'mean and std were taken. Set them with --mean and --std, or '
            'give a recipe.')
    kind = str(model.get('type', '')).split('.')[-1]
    return Subject(teacher, normalisation, channels, source, notes,
                   source == 'model.teacher' and 'SiNGER' in kind,
                   distilled_layers(cfg, source))


def distilled_layers(cfg: Config, source: str) -> Optional[list]:
    """``layers`` as the config has them; None for what does not read them."""
    owners = []
    if source == 'teacher':
        owners = [cfg.teacher]
    elif source == 'model.teacher' and \
            'ViTKD' not in str(cfg.model.get('type')):
        owners = [cfg.model, cfg.model.teacher]
    return next((list(owner['layers']) for owner in owners
                 if owner.get('layers') is not None), None)


def _prefixed(settings: Dict[str, Any], cfg: Config) -> bool:
    """Whether a plain model's checkpoint holds more than the backbone."""
    settings.setdefault('checkpoint', cfg.get('load_from'))
    path = settings['checkpoint']
    return path is not None and any(
        key.startswith('backbone.')
        for key in weights_of(load_checkpoint(path), path))


def _feeding(cfg: Config, source: str, teacher: FrozenTeacher
             ) -> Tuple[Normalisation, str]:
    """The normalisation and channel order of the images in the config's own
    data pipeline."""
    if source == 'teacher':
        return Normalisation(None, None), \
            'bgr' if teacher.swap_channels else 'rgb'
    model = cfg.model
    preprocessor = (model.get('data_preprocessor')
                    or (model.get('student') or {}).get('data_preprocessor')
                    or cfg.get('data_preprocessor') or {})
    rgb = preprocessor.get('to_rgb') or preprocessor.get('bgr_to_rgb')
    # Without a word about colours: as the teacher is meant to be fed
    channels = 'rgb' if rgb or (not preprocessor and
                                not teacher.swap_channels) else 'bgr'
    if preprocessor.get('mean') is None:
        return Normalisation(None, None), channels
    return Normalisation(tuple(preprocessor['mean']),
                         tuple(preprocessor['std'])), channels


def natural_size(teacher: FrozenTeacher) -> Tuple[int, int]:
    """The image size (H, W) that a teacher was made for; 224 if it does not
    say."""
    if teacher.input_size is not None:
        return teacher.input_size
    size = next((module.img_size for module in teacher.backbone.modules()
                 if getattr(module, 'img_size', None)), 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def check_size(size: Sequence[int], teacher: FrozenTeacher) -> None:
    """Raise :class:`ConfigError` for a size that is no height and width, or
    has not a single patch."""
    if len(size) != 2:
        raise ConfigError(f'--size {" ".join(map(str, size))}: give one '
                          'number, or height and width.')
    patch = patch_stride(teacher.blocks.patch_embed)
    if size[0] < patch[0] or size[1] < patch[1]:
        raise ConfigError(
            f'--size {size[0]} {size[1]} is smaller than a patch of the '
            f'teacher, {patch[0]} x {patch[1]} px. Leave --size out for its '
            'own size, or make it a multiple of the patch.')
