"""Teachers and distillers that are looked at, not trained, and the images for
it: from a config."""
import itertools
import math
from statistics import fmean
from typing import (Any, Dict, Iterator, List, NamedTuple, Optional, Sequence,
                    Tuple)

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from mmsinger.checkpoint import load_strict, read_weights
from mmsinger.engine.checks import check_data_folders
from mmsinger.engine.hooks.calibration_hook import NUM_IMAGES
from mmsinger.engine.prepare import converts_to_rgb, load_config
from mmsinger.engine.random_states import preserved_random_states
from mmsinger.engine.resume import check_checkpoint_files
from mmsinger.engine.samples import guard_samples
from mmsinger.errors import ConfigError
from mmsinger.images import Size, dataset_batches, with_channels
from mmsinger.models.distillers import FeatureDistiller, is_distiller
from mmsinger.models.features.anatomy import image_channels, image_size
from mmsinger.models.teachers.frozen import (FrozenTeacher, Normalisation,
                                             feature_settings)
from mmsinger.registry import MODELS, check_arguments
from mmsinger.schema import Count, check_value

IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def open_config(path: str, options: Optional[dict] = None) -> Config:
    """A config of what is looked at, see
    :func:`~mmsinger.engine.prepare.load_config`. Its scope becomes the default
    one, and the log has warnings alone: initialisation logs a paragraph for
    each parameter."""
    cfg = load_config(path, options)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    MMLogger.get_current_instance().setLevel('WARNING')
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, with the data preprocessor beside it, as a
    Runner builds it."""
    model = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(model)


def load_distiller(cfg: Config, checkpoint: Optional[str] = None
                   ) -> FeatureDistiller:
    """Build the distiller of a recipe, with its teacher.

    Args:
        cfg (Config): The recipe.
        checkpoint (str, optional): A training checkpoint of it. Defaults to
            None: the student as initialised; see :func:`calibrate_on`.

    Returns:
        FeatureDistiller: On the CPU.

    Raises:
        ConfigError: If the recipe has no distiller of block outputs, or the
            checkpoint does not fit.
    """
    model = cfg.get('model') or {}
    if not is_distiller(model, FeatureDistiller):
        raise ConfigError(
            f'{cfg.filename!r}: model.type={model.get("type")!r} is no '
            "distiller of mmsinger's that compares block outputs, which is "
            'what is measured. Give a recipe of a method that does, such as '
            'configs/singer_vitl_to_vits_ade20k.py.')
    check_checkpoint_files(cfg)
    distiller = build_model(cfg)
    distiller.teacher.feature_cache = 0  # some measures watch its blocks
    distiller.init_weights()
    if checkpoint is None:
        return distiller
    load_strict(
        distiller, read_weights(checkpoint),
        what=f'{type(distiller).__name__} of {cfg.filename!r} and checkpoint '
        f'{checkpoint!r}',
        fix='Give a training checkpoint (epoch_3.pth, not '
        'epoch_3_student.pth) and the config that it was trained with, which '
        'is dumped in its work dir; or leave the checkpoint out to measure '
        'the recipe as it starts.')
    return distiller


class ImageBatches:
    """Preprocessed images of a recipe, equal each time they are read.

    From ``val_dataloader`` if the recipe has one, else from
    ``train_dataloader`` with its training transforms. They are a random
    choice, and random transforms are seeded too.

    Args:
        cfg (Config): The recipe.
        distiller (FeatureDistiller): Its data preprocessor is used.
        count (int): How many images; all if there are fewer.
        seed (int): Seeds choice and transforms. Defaults to 0.

    Raises:
        ConfigError: If there are no images.
    """

    def __init__(self, cfg: Config, distiller: FeatureDistiller, count: int,
                 seed: int = 0) -> None:
        check_value('--images', count, Count)
        self.source = next(
            (name for name in ('val_dataloader', 'train_dataloader')
             if cfg.get(name)), None)
        if self.source is None:
            raise ConfigError(
                f'{cfg.filename!r} has no val_dataloader and no '
                'train_dataloader, so there are no images to measure on. Add '
                'one of them.')
        check_data_folders(cfg, (self.source, ))
        loader = cfg[self.source]
        self.dataset = guard_samples(DATASETS.build(loader['dataset']),
                                     f'{self.source}.dataset')
        total = len(self.dataset)
        if not total:
            raise ConfigError(
                f'{self.source}.dataset has no images. Point its data_root '
                '(and ann_file, if it has one) to your data set.')
        self.batch_size = loader.get('batch_size', 1)
        self.seed = seed
        self._preprocess = distiller.data_preprocessor
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(total, generator=generator)[:count]
        self.indices = chosen.tolist()  # any part of them is a fair sample

    def __len__(self) -> int:
        """The number of images."""
        return len(self.indices)

    def __call__(self) -> Iterator[Tensor]:
        """Yield images (B, 3, H, W)."""
        for start in range(0, len(self), self.batch_size):
            with preserved_random_states(self.seed + start):
                batch, = dataset_batches(
                    self.dataset, self.indices[start:start + self.batch_size],
                    self.batch_size, self._preprocess,
                    self.source == 'train_dataloader')
            yield batch['inputs']


def calibrate_on(distiller: FeatureDistiller, batches: ImageBatches) -> None:
    """Calibrate ``target_norm`` and the steps in ``targets`` on these images,
    as a training run does before its first step, where no checkpoint has."""
    if distiller.needs_calibration:
        count = math.ceil(NUM_IMAGES / batches.batch_size)
        distiller.calibrate(itertools.islice(batches(), count))


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
            Tensor: Shape (B, 3, H, W), float32; (B, 1, H, W) for a teacher
            of grey images.
        """
        images = with_channels(images.float(), image_channels(
            self.teacher.backbone))
        if self.channels == 'bgr':
            images = images.flip(1)
        return self.normalisation.apply(images)


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
    if (mean is None) != (std is None):
        raise ConfigError('--mean and --std belong together: got '
                          f'--mean {mean}, --std {std}.')
    source, settings = teacher_settings(cfg)
    if checkpoint is not None:
        settings['checkpoint'] = checkpoint
    if source == 'model.backbone':  # whose file may hold more than that
        path = settings.setdefault('checkpoint', cfg.get('load_from'))
        if path is not None and any(
                key.startswith('backbone.') for key in read_weights(path)):
            settings['prefix'] = 'backbone.'
    if mean is not None:
        settings.update(mean=mean, std=std, swap_channels=False)
    check_arguments(source, FrozenTeacher, settings)
    teacher = FrozenTeacher(**settings)
    teacher.feature_cache = 0  # constant memory
    teacher.load_weights()

    notes = []
    if teacher.checkpoint is None:
        notes.append('No checkpoint was given: the weights are random, and '
                     'the report says nothing about a trained teacher.')
    normalisation, channels = (Normalisation(), 'rgb') \
        if mean is not None else _feeding(cfg, source, teacher)
    if normalisation.mean is None and teacher.normalisation is None:
        normalisation = IMAGENET
        if image_channels(teacher.backbone) == 1:
            normalisation = Normalisation(*(
                (fmean(values), ) for values in IMAGENET))
        notes.append(
            'The config does not say how images are normalised: ImageNet\'s '
            'mean and std were taken. Set them with --mean and --std, or '
            'give a recipe.')
    kind = str((cfg.get('model') or {}).get('type', '')).split('.')[-1]
    return Subject(teacher, normalisation, channels, source, notes,
                   source == 'model.teacher' and 'SiNGER' in kind,
                   distilled_layers(cfg, source))


def teacher_settings(cfg: Config) -> Tuple[str, Dict[str, Any]]:
    """Where a config has its teacher, and :class:`FrozenTeacher`'s arguments
    there."""
    model = cfg.get('model') or {}
    if isinstance(model.get('teacher'), dict):
        return 'model.teacher', feature_settings(model.teacher)
    if isinstance(cfg.get('teacher'), dict):
        return 'teacher', feature_settings(cfg.teacher)
    if isinstance(model.get('backbone'), dict):
        return 'model.backbone', dict(backbone=model.backbone)
    raise ConfigError(
        f'{cfg.filename!r} has no teacher to look at: no model.teacher, no '
        'teacher and no model.backbone. Give a recipe such as '
        'configs/singer_vitl_to_vits_ade20k.py, a file of '
        'configs/_base_/teachers, or a model whose backbone is a vision '
        'transformer.')


def distilled_layers(cfg: Config, source: str) -> Optional[list]:
    """``layers`` in a config; None for what does not read them.

    Args:
        cfg (Config): The config.
        source (str): Which part of it the teacher is, see :class:`Subject`.
    """
    owners = []
    if source == 'teacher':
        owners = [cfg.teacher]
    elif source == 'model.teacher' and \
            'ViTKD' not in str(cfg.model.get('type')):
        owners = [cfg.model, cfg.model.teacher]
    return next((list(owner['layers']) for owner in owners
                 if owner.get('layers') is not None), None)


def _feeding(cfg: Config, source: str, teacher: FrozenTeacher
             ) -> Tuple[Normalisation, str]:
    """The normalisation and channel order of the images in the config's own
    data pipeline."""
    preprocessor = preprocessor_settings(cfg) if source != 'teacher' else None
    if preprocessor is None:  # as the teacher is meant to be fed
        return Normalisation(), 'bgr' if teacher.swap_channels else 'rgb'
    channels = 'rgb' if converts_to_rgb(preprocessor) else 'bgr'
    if preprocessor.get('mean') is None:
        return Normalisation(), channels
    return Normalisation(tuple(preprocessor['mean']),
                         tuple(preprocessor['std'])), channels


def preprocessor_settings(cfg: Config) -> Optional[dict]:
    """The config of the data preprocessor: the student's in a recipe, else
    the model's or the whole config's; None if there is none."""
    model = cfg.get('model') or {}
    return next((owner['data_preprocessor'] for owner in (
        model.get('student') or {}, model, cfg)
        if owner.get('data_preprocessor')), None)


def natural_size(model: nn.Module) -> Size:
    """The image size (H, W) that a model was made for.

    Args:
        model (nn.Module): A teacher, or a backbone.

    Returns:
        tuple[int, int]: A teacher's ``input_size``, or the first ``img_size``
        of a module; 224 if it does not say.
    """
    return tuple(to_2tuple(
        getattr(model, 'input_size', None) or image_size(model) or 224))
