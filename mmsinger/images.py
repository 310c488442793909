"""Images to look at: from files, from folders, from data sets."""
import os
from typing import (Any, Callable, Dict, Iterator, List, Optional, Sequence,
                    Tuple)

import cv2
import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.utils import scandir
from torch import Tensor

from mmsinger.errors import ConfigError, near_paths
from mmsinger.schema import Count, Positive, check_value

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff',
            '.ppm', '.pgm')

Size = Tuple[int, int]


class ImageFolder:
    """A seeded choice of the images below a folder.

    Iterating yields ``(name, image)`` with the image in RGB, 0 to 255, uint8,
    shape (3, H, W), see :func:`cover`. Grey images become colour. What cannot
    be used is skipped, and the next one taken; :attr:`unreadable` and
    :attr:`too_small` list it.

    Args:
        folder (str): Searched with all folders below it.
        size (tuple[int, int]): H and W wanted.
        patch (tuple[int, int]): Images smaller than this are skipped.
        count (int): The most images to yield.
        seed (int): Seeds the choice. Defaults to 0.

    Raises:
        ConfigError: If there is no such folder, or no image in it.
    """

    def __init__(self, folder: str, size: Size, patch: Size, count: int,
                 seed: int = 0) -> None:
        check_value('--num', count, Count)
        if not os.path.isdir(folder):
            kind = 'a file, not' if os.path.exists(folder) else 'no such'
            raise ConfigError(f'--images {folder!r}: {kind} folder (working '
                              f'directory {os.getcwd()}).'
                              f'{near_paths(folder)} Give a folder of '
                              'images.')
        names = sorted(scandir(folder, SUFFIXES, recursive=True,
                               case_sensitive=False))
        if not names:
            raise ConfigError(
                f'--images {folder!r} holds no image: no file in it or below '
                f'ends with {", ".join(SUFFIXES)}. Give a folder of images.')
        self.folder = folder
        self.size = size
        self.patch = patch
        self.count = min(count, len(names))
        order = torch.randperm(
            len(names), generator=torch.Generator().manual_seed(seed))
        self.names = [names[i] for i in order]
        self.unreadable: List[str] = []
        self.too_small: List[str] = []

    def __len__(self) -> int:
        """How many images there will be, if all can be used."""
        return self.count

    def __iter__(self) -> Iterator[Tuple[str, Tensor]]:
        self.unreadable, self.too_small = [], []
        found = 0
        for name in self.names:
            image = read_image(os.path.join(self.folder, name))
            if image is None:
                self.unreadable.append(name)
            elif is_smaller(image.shape, self.patch):
                self.too_small.append(name)
            else:
                found += 1
                yield name, cover(image, self.size)
                if found == self.count:
                    return
        if not found:
            raise ConfigError(
                f'--images {self.folder!r}: none of its {len(self.names)} '
                f'images can be used; {self.skipped()}. Give larger or '
                'intact images.')

    def skipped(self) -> str:
        """What was skipped, in words; empty if nothing was."""
        parts = [
            f'{len(names)} {what} (the first is {names[0]!r})'
            for names, what in (
                (self.unreadable, 'cannot be read'),
                (self.too_small, 'smaller than a patch of '
                 f'{self.patch[0]} x {self.patch[1]} px')) if names
        ]
        return ', '.join(parts)


def check_patch(what: str, size: Sequence[int], patch: Size) -> None:
    """Raise :class:`ConfigError` for a size without a single patch.

    Args:
        what (str): Names it in the message.
        size (Sequence[int]): H and W.
        patch (tuple[int, int]): Height and width of a patch.
    """
    if is_smaller(size, patch):
        raise ConfigError(
            f'{what} is smaller than a patch of {patch[0]}x{patch[1]} pixels, '
            'so that it has no tokens. Make it larger.')


def is_smaller(size: Sequence[int], patch: Size) -> bool:
    """Whether a height or width is less than a patch's."""
    return size[0] < patch[0] or size[1] < patch[1]


def read_image(path: str) -> Optional[np.ndarray]:
    """An image in RGB, uint8, shape (H, W, 3); None if it cannot be read."""
    try:
        return mmcv.imread(path, flag='color', channel_order='rgb')
    except (cv2.error, OSError, ValueError):
        return None


def write_png(path: str, image: np.ndarray) -> None:
    """Write a picture without loss.

    Args:
        path (str): Where; its folder exists.
        image (np.ndarray): BGR or grey, uint8.

    Raises:
        OSError: If it cannot be written; ``cv2.imwrite`` returns False.
    """
    if not cv2.imwrite(path, image, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f'{path} could not be written; is the disk full?')


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Colour images for a backbone that takes them, or a grey one.

    Args:
        images (Tensor): RGB, shape (..., 3, H, W).
        channels (int): That it takes.

    Returns:
        Tensor: Shape (..., channels, H, W); grey as OpenCV weighs colours.

    Raises:
        ConfigError: If it takes neither 3 nor 1 channel.
    """
    if channels == 3:
        return images
    if channels != 1:
        raise ConfigError(
            f'The backbone takes images of {channels} channels. Photographs '
            'have 3, or 1 where they are grey: it cannot be shown any.')
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    grey = (images.float() * weights[:, None, None]).sum(-3, keepdim=True)
    return grey if images.is_floating_point() else grey.round().to(images)


def cover(image: np.ndarray, size: Sequence[int]) -> Tensor:
    """Scale an image until it covers a size, and crop the middle.

    Args:
        image (np.ndarray): Shape (H', W', 3).
        size (Sequence[int]): H and W.

    Returns:
        Tensor: Shape (3, H, W).
    """
    scale = max(size[0] / image.shape[0], size[1] / image.shape[1])
    shape = [max(wanted, round(scale * length))
             for wanted, length in zip(size, image.shape)]
    if tuple(shape) != image.shape[:2]:
        image = mmcv.imresize(
            image, (shape[1], shape[0]),
            interpolation='area' if scale < 1 else 'bicubic')
    top, left = ((length - wanted) // 2
                 for length, wanted in zip(shape, size))
    image = image[top:top + size[0], left:left + size[1]]
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def first_view(inputs: Any) -> Tensor:
    """The images of a batch, or their first view where a data preprocessor
    gives several; shape (B, 3, H, W)."""
    while isinstance(inputs, (list, tuple)):
        inputs = inputs[0]
    return inputs


def dataset_batches(dataset: Any, indices: Sequence[int], batch_size: int,
                    preprocess: Callable, training: bool = False,
                    collate: Callable = pseudo_collate
                    ) -> Iterator[Dict[str, Any]]:
    """Images of a data set as a model gets them, past any sampler.

    Args:
        dataset (Dataset): Gives what ``collate`` takes.
        indices (Sequence[int]): Which images, in order.
        batch_size (int): Images at a time.
        preprocess (Callable): The model's data preprocessor.
        training (bool): Whether it is to treat them as in training. Defaults
            to False.
        collate (Callable): Puts samples together. Defaults to mmengine's
            ``pseudo_collate``.

    Yields:
        dict: ``inputs``, preprocessed images of shape (B, 3, H, W), the first
        view of several, and ``data_samples``, their annotations.
    """
    for start in range(0, len(indices), batch_size):
        batch = collate([dataset[i]
                         for i in indices[start:start + batch_size]])
        batch = preprocess(batch, training)
        yield dict(inputs=first_view(batch['inputs']),
                   data_samples=batch.get('data_samples'))


def check_scale(place: str, mean: Any, std: Any) -> None:
    """Raise :class:`ConfigError` for a mean or std that no images have, of
    unequal length, or that images from 0 to 1 have: here they go from 0 to
    255.

    Args:
        place (str): Where they stand, as the user writes it.
        mean (Sequence[float], optional): By channel.
        std (Sequence[float], optional): By channel.
    """
    for name, values, rule in (('mean', mean, float), ('std', std, Positive)):
        if values is not None:
            check_value(f'{place}.{name}', values, Sequence[rule])
    if mean is None or std is None:
        return
    if len(mean) != len(std):
        raise ConfigError(
            f'{place}.mean={list(mean)} and {place}.std={list(std)} are of '
            f'{len(mean)} and {len(std)} channels. Give one value for each '
            'channel in both.')
    if 0 < max(std) < 1:
        raise ConfigError(
            f'{place}.mean={list(mean)}, std={list(std)} are of images from '
            '0 to 1; here they go from 0 to 255. Set mean='
            f'{[round(255 * value, 3) for value in mean]}, std='
            f'{[round(255 * value, 3) for value in std]}.')
