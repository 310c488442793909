"""A distiller and images to measure it on, from a recipe."""
import itertools
import math
from typing import Iterator, Optional

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor

from mmsinger.checkpoint import load_checkpoint, load_strict, weights_of
from mmsinger.engine.config import check_checkpoint_files, check_data_folders
from mmsinger.engine.hooks.target_norm_hook import (NUM_IMAGES,
                                                    preserved_random_states)
from mmsinger.errors import ConfigError
from mmsinger.export import is_distiller
from mmsinger.models.distillers import FeatureDistiller
from mmsinger.registry import MODELS


def load_distiller(cfg: Config, checkpoint: Optional[str] = None
                   ) -> FeatureDistiller:
    """Build the distiller of a recipe, with its teacher.

    Args:
        cfg (Config): The recipe.
        checkpoint (str, optional): A training checkpoint of it. Defaults to
            None: the student as initialised; :func:`prepare` does the rest.

    Returns:
        FeatureDistiller: On the CPU.

    Raises:
        ConfigError: If the recipe has no distiller of block outputs, or the
            checkpoint does not fit.
    """
    model_type = (cfg.get('model') or {}).get('type')
    if not is_distiller(dict(type=model_type)):
        raise ConfigError(
            f'{cfg.filename!r}: model.type={model_type!r} is no distiller of '
            "mmsinger's, so there is no teacher to measure against. Give a "
            'recipe such as configs/singer_vitl_to_vits_in1k.py.')
    cls = MODELS.get(model_type)
    if not issubclass(cls, FeatureDistiller):
        raise ConfigError(
            f'{cfg.filename!r}: a {cls.__name__} does not compare block '
            'outputs, which is what is measured. Give a recipe of a method '
            'that does: SiNGERDistiller, FitNetDistiller, ViTKDDistiller.')
    check_checkpoint_files(cfg)
    model_cfg = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:  # as a Runner does
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    distiller = MODELS.build(model_cfg)
    distiller.teacher.remember = 0  # some measures watch its blocks
    if checkpoint is None:
        distiller.init_weights()
        return distiller
    distiller.load_teacher()
    load_strict(
        distiller, weights_of(load_checkpoint(checkpoint), checkpoint),
        what=f'{type(distiller).__name__} of {cfg.filename!r} and checkpoint '
        f'{checkpoint!r}',
        fix='Give a training checkpoint (epoch_3.pth, not '
        'epoch_3_student.pth) and the config that it was trained with, which '
        'is dumped in its work dir; or leave the checkpoint out to measure '
        'the recipe as it starts.')
    return distiller


class ImageBatches:
    """Preprocessed images of a recipe, the same ones each time.

    From ``val_dataloader`` if the recipe has one, else from
    ``train_dataloader`` with its training transforms. They are a random
    choice, and random transforms are seeded too.

    Args:
        cfg (Config): The recipe.
        distiller (FeatureDistiller): Its data preprocessor is used.
        count (int): How many images; all if there are fewer.
        seed (int): Of choice and transforms. Defaults to 0.

    Raises:
        ConfigError: If there are no images.
    """

    def __init__(self, cfg: Config, distiller: FeatureDistiller, count: int,
                 seed: int = 0) -> None:
        if count < 1:
            raise ConfigError(f'--images={count}: at least 1 is needed.')
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
        self.dataset = DATASETS.build(loader['dataset'])
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
            chosen = self.indices[start:start + self.batch_size]
            with preserved_random_states(self.seed + start):
                batch = pseudo_collate([self.dataset[i] for i in chosen])
                batch = self._preprocess(
                    batch, self.source == 'train_dataloader')
            yield batch['inputs']


def prepare(distiller: FeatureDistiller, batches: ImageBatches) -> None:
    """Do what a training run does before its first step, where no checkpoint
    has: start the adapters, calibrate ``target_norm`` (on these images)."""
    if getattr(distiller, 'needs_adapters', False):
        distiller.initialise_adapters()
    if distiller.needs_calibration:
        count = math.ceil(NUM_IMAGES / batches.batch_size)
        distiller.calibrate_target_norms(itertools.islice(batches(), count))
