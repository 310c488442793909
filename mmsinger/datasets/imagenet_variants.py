"""ImageNet-R and ImageNet-v2: other images, ImageNet-1K's class indices."""
import os
from typing import Callable, Iterable, List, Tuple

from mmpretrain.datasets import CustomDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
from mmpretrain.datasets.custom import find_folders, get_samples

from mmsinger.errors import ConfigError
from mmsinger.registry import DATASETS


def imagenet_wnids() -> List[str]:
    """The WordNet ids of ImageNet-1K in the order of the class indices, which
    is that of a sorted training folder.

    Returns:
        list[str]: 1,000 names such as ``'n01440764'``.
    """
    import mmsinger
    path = os.path.join(os.path.dirname(mmsinger.__file__), 'assets',
                        'imagenet_wnids.txt')
    with open(path) as file:
        return file.read().split()


class _LabelledByFolder(CustomDataset):
    """A folder per class, whose name alone decides the ImageNet-1K index.

    Args:
        data_root (str): The folder that holds the class folders.
        **kwargs: As for mmpretrain's ``CustomDataset``.
    """

    METAINFO = {'classes': IMAGENET_CATEGORIES}
    expected: str
    folder_names: Callable[[], Iterable[str]]  # in the order of the indices

    def _find_samples(self) -> List[Tuple[str, int]]:
        folders, _ = find_folders(self.img_prefix)
        indices = {name: i for i, name in enumerate(self.folder_names())}
        unknown = [folder for folder in folders if folder not in indices]
        if unknown:
            raise ConfigError(
                f'{type(self).__name__}: the folder {unknown[0]!r} in '
                f'{self.img_prefix!r} names no class. Expected '
                f'{self.expected}. Set data_root to the folder that holds '
                'the class folders, and nothing else.')
        self.folder_to_idx = {folder: indices[folder] for folder in folders}
        samples, _ = get_samples(
            self.img_prefix, self.folder_to_idx, self.is_valid_file)
        if not samples:
            raise ConfigError(
                f'{type(self).__name__}: no images in {self.img_prefix!r}. '
                f'Expected {self.expected}.')
        return samples


@DATASETS.register_module()
class ImageNetR(_LabelledByFolder):
    """ImageNet-R(endition), arXiv 2006.16241: 30,000 renditions of 200 of
    ImageNet-1K's classes.

    Labels are ImageNet-1K's indices, 0 to 999, found through the folders'
    WordNet ids::

        data_root/
        ├── n01443537/art_0.jpg …    class 1
        ├── n01484850/…              class 2
        └── …                        200 folders

    Args:
        data_root (str): The unpacked ``imagenet-r`` folder.
        **kwargs: As for mmpretrain's ``CustomDataset``.
    """

    expected = "folders named by WordNet ids of ImageNet-1K, 'n01443537'"
    folder_names = staticmethod(imagenet_wnids)


@DATASETS.register_module()
class ImageNetV2(_LabelledByFolder):
    """ImageNet-v2, arXiv 1902.10811: ten new images for each class of
    ImageNet-1K.

    A folder's name is the class index. (Sorted as text, '10' comes before
    '2': an ordinary folder data set gives most classes a wrong label.) ::

        data_root/
        ├── 0/….jpeg        class 0
        ├── 1/…
        ├── 10/…            class 10
        └── …               1,000 folders

    Args:
        data_root (str): The unpacked
            ``imagenetv2-matched-frequency-format-val`` folder.
        **kwargs: As for mmpretrain's ``CustomDataset``.
    """

    expected = "folders named '0' to '999'"
    folder_names = staticmethod(lambda: map(str, range(1000)))
