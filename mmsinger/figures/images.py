"""Image files to what a distiller takes, and back to pictures."""
import os
from typing import Any, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmsinger.errors import ConfigError, near_paths
from mmsinger.models import FeatureDistiller
from mmsinger.models.features.anatomy import find_blocks, patch_stride

Size = Tuple[int, int]


def read_images(paths: Sequence[str], distiller: FeatureDistiller,
                size: Optional[Size] = None) -> Tensor:
    """Read image files as the student is fed with them.

    An image is resized until it covers ``size`` and cut to it in the middle.

    Args:
        paths (Sequence[str]): Files.
        distiller (FeatureDistiller): Its data preprocessor is used.
        size (tuple[int, int], optional): H and W. Defaults to None: the
            student's own ``img_size``, 224 if it names none.

    Returns:
        Tensor: Preprocessed images, shape (B, 3, H, W).

    Raises:
        ConfigError: If a file is missing, is no image, or is smaller than a
            patch of teacher or student; or if ``size`` is.
    """
    if not paths:
        raise ConfigError('No image files were given. Name at least one.')
    size = size or student_size(distiller)
    patch = largest_patch(distiller)
    _check_size(f'size {size[0]}x{size[1]}', size, patch)
    pictures = [torch.from_numpy(_read(path, size, patch)).permute(2, 0, 1)
                for path in paths]
    # mmseg's asks for samples where it pads pictures
    samples = [BaseDataElement() for _ in pictures] if getattr(
        distiller.data_preprocessor, 'test_cfg', None) else None
    batch = distiller.data_preprocessor(
        dict(inputs=pictures, data_samples=samples), False)
    inputs = batch['inputs']
    return inputs if torch.is_tensor(inputs) else \
        torch.stack([image.float() for image in inputs])


def student_size(distiller: FeatureDistiller) -> Size:
    """The student's own input size (H, W), 224 if it names none."""
    size = getattr(distiller.student_backbone, 'img_size', None) or 224
    return (size, size) if isinstance(size, int) else tuple(size)


def largest_patch(distiller: FeatureDistiller) -> Size:
    """Rows and columns of pixels in a patch, the larger of teacher's and
    student's."""
    student = find_blocks(distiller.student_backbone, 'student')
    strides = [patch_stride(blocks.patch_embed)
               for blocks in (distiller.teacher.blocks, student)]
    return tuple(map(max, *strides))


def _read(path: str, size: Size, patch: Size) -> np.ndarray:
    import cv2
    if not os.path.isfile(path):
        raise ConfigError(f'image {path!r}: no such file (working directory '
                          f'{os.getcwd()}).{near_paths(path)}')
    image = cv2.imread(path, cv2.IMREAD_COLOR)  # BGR, grey ones too
    if image is None:
        raise ConfigError(f'image {path!r} cannot be read: it is damaged or '
                          'no image. Leave it out, or save it as PNG or '
                          'JPEG.')
    _check_size(f'image {path!r} of {image.shape[0]}x{image.shape[1]} pixels',
                image.shape[:2], patch)
    scale = max(want / have for want, have in zip(size, image.shape))
    height, width = (max(want, round(scale * have))
                     for want, have in zip(size, image.shape))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA
                       if scale < 1 else cv2.INTER_LINEAR)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return image[top:top + size[0], left:left + size[1]].copy()


def _check_size(what: str, size: Sequence[int], patch: Size) -> None:
    if size[0] < patch[0] or size[1] < patch[1]:
        raise ConfigError(
            f'{what} is smaller than a patch of {patch[0]}x{patch[1]} pixels, '
            'so that it has no tokens. Take a larger image.')


def pictures_of(distiller: FeatureDistiller, inputs: Tensor) -> np.ndarray:
    """Preprocessed images as one sees them.

    Args:
        distiller (FeatureDistiller): Whose data preprocessor made them.
        inputs (Tensor): Shape (B, 3, H, W).

    Returns:
        np.ndarray: RGB, (B, H, W, 3), uint8.
    """
    images = inputs.detach().float().cpu()
    mean, std = distiller.student_normalisation
    if mean is not None:
        images = images * torch.tensor(std).view(-1, 1, 1) + \
            torch.tensor(mean).view(-1, 1, 1)
    if not _is_rgb(distiller.data_preprocessor):
        images = images.flip(1)
    return images.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def _is_rgb(preprocessor: Any) -> bool:
    """Whether it turns images, which are read as BGR, into RGB: mmpretrain's
    names for it, OneDL's mmseg's and the original mmseg's."""
    return any(getattr(preprocessor, name, False) for name in (
        'to_rgb', '_channel_conversion', 'channel_conversion'))
