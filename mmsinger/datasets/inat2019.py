"""iNaturalist-2019 in torchvision's layout, with the official split."""
import os
from typing import List, Literal

import torch
from mmpretrain.datasets import BaseDataset

from mmsinger.errors import ConfigError
from mmsinger.registry import DATASETS

TRAIN_SHARE = 0.8
SEED = 1234


def split_indices(count: int, split: str) -> List[int]:
    """The official code's division of iNaturalist-2019.

    Args:
        count (int): Number of images in all.
        split (str): ``'train'``, the first 80 % of a permutation drawn with
            seed 1234, or ``'val'``, the rest.

    Returns:
        list[int]: Indices into the list of all images, ascending.
    """
    order = torch.randperm(
        count, generator=torch.Generator().manual_seed(SEED))
    size = int(TRAIN_SHARE * count)
    chosen = order[:size] if split == 'train' else order[size:]
    return chosen.sort().values.tolist()


@DATASETS.register_module()
class INaturalist2019(BaseDataset):
    """iNaturalist-2019: 268,243 images of 1,010 species.

    Labels (the folders' numbers) and the list of images are those of
    ``torchvision.datasets.INaturalist(version='2019')``, of which the
    official code takes its split::

        data_root/2019/
        ├── Amphibians/153/….jpg
        ├── …
        └── Reptiles/….jpg

    torchvision lists a folder's files in the order of the file system, so
    that a copy of the data may be split otherwise. All parts of an
    experiment have to read the same copy, or set ``file_order='sorted'``.

    Args:
        data_root (str): The folder that holds ``2019``.
        split (str): ``'train'`` or ``'val'``. Defaults to ``'train'``.
        data_prefix (str): The folder of the super categories, below
            ``data_root``. Defaults to ``'2019'``, torchvision's name;
            unpacked by hand, it is ``'train_val2019'``.
        file_order (str): ``'torchvision'``: the order of the file system, or
            ``'sorted'``: by name, the same wherever the files are. Defaults
            to ``'torchvision'``.
        **kwargs: As for mmpretrain's ``BaseDataset``.

    Raises:
        ConfigError: If a value is not valid, or the folders are not
            numbered 0, 1, 2, …
    """

    def __init__(self,
                 data_root: str,
                 split: Literal['train', 'val'] = 'train',
                 data_prefix: str = '2019',
                 file_order: Literal['torchvision', 'sorted'] = 'torchvision',
                 **kwargs) -> None:
        self.split = split
        self.file_order = file_order
        super().__init__(ann_file='', data_root=data_root,
                         data_prefix=data_prefix, **kwargs)

    def load_data_list(self) -> List[dict]:
        """List all images, and keep those of the split."""
        categories = self._categories()
        self._metainfo['classes'] = tuple(categories)
        arrange = sorted if self.file_order == 'sorted' else list
        images = [
            dict(img_path=os.path.join(self.img_prefix, category, name),
                 gt_label=label)
            for label, category in enumerate(categories)
            for name in arrange(
                os.listdir(os.path.join(self.img_prefix, category)))
        ]
        return [images[i] for i in split_indices(len(images), self.split)]

    def _categories(self) -> List[str]:
        root = self.img_prefix
        if not os.path.isdir(root):
            raise ConfigError(
                f'INaturalist2019: no folder {root!r}. Unpack '
                'train_val2019.tar.gz, and rename train_val2019 to 2019 or '
                "set data_prefix='train_val2019'.")
        categories = [
            os.path.join(group, species) for group in sorted(os.listdir(root))
            for species in _entries(os.path.join(root, group))
        ]
        by_number = {os.path.basename(c): c for c in categories}
        numbers = [str(i) for i in range(len(categories))]
        if by_number.keys() != set(numbers):
            raise ConfigError(
                f'INaturalist2019: the folders in {root!r} must be '
                'SUPERCATEGORY/NUMBER, numbered 0, 1, 2, … once each; got '
                f'{len(categories)} folders, {categories[:3]} … Unpack '
                'train_val2019.tar.gz again into an empty folder.')
        return [by_number[number] for number in numbers]


def _entries(folder: str) -> List[str]:
    if not os.path.isdir(folder):
        raise ConfigError(
            f'INaturalist2019: {folder!r} is no folder of a super category. '
            'Remove it: torchvision, whose list of images is used, does not '
            'take other files there.')
    return os.listdir(folder)
