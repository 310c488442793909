"""The images that a distiller is looked at with."""
from typing import Iterator

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from mmsinger.engine.checks import check_data_folders
from mmsinger.engine.random_states import preserved_random_states
from mmsinger.engine.samples import guard_samples
from mmsinger.errors import ConfigError
from mmsinger.images import Size, dataset_batches
from mmsinger.models.distillers import FeatureDistiller
from mmsinger.models.features.anatomy import image_size
from mmsinger.schema import Count, check_value


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
