"""Position embeddings: of another size, with or without a class token."""
import math
from typing import Iterable, Optional, Tuple

import torch
from torch import Tensor, nn

from mmsinger.converters.layouts import LAYOUTS
from mmsinger.errors import ConfigError
from mmsinger.models.features.tokens import Grid


def split_positions(pos_embed: Tensor, prefix: Iterable[int]
                    ) -> Tuple[Tensor, Tensor, Grid]:
    """Split position embeddings into prefix tokens and a square of patches.

    Args:
        pos_embed (Tensor): Shape (1, n + h * h, C).
        prefix (Iterable[int]): What n may be; the first that leaves a square
            counts.

    Returns:
        tuple[Tensor, Tensor, tuple[int, int]]: Embeddings of the prefix
        (1, n, C), of the patches (1, h * h, C), and (h, h).

    Raises:
        ConfigError: If none leaves a square.
    """
    if pos_embed.dim() != 3 or len(pos_embed) != 1:
        raise ConfigError(f'pos_embed has shape {tuple(pos_embed.shape)}, '
                          'expected (1, rows, channels).')
    rows = pos_embed.shape[1]
    prefix = tuple(prefix)
    for count in prefix:
        side = math.isqrt(max(rows - count, 0))
        if side and side * side == rows - count:
            return pos_embed[:, :count], pos_embed[:, count:], (side, side)
    raise ConfigError(
        f'pos_embed has {rows} rows: less {" or ".join(map(str, prefix))} '
        'for class and register tokens, they are no square grid of patches. '
        'Only weights of square images can be converted.')


def resample(patches: Tensor, grid: Grid, target: Grid, family: str,
             registers: bool) -> Tensor:
    """Position embeddings for another image size, as the family's own code
    computes them.

    timm, and DINOv2 with registers: bicubic with antialiasing. DINOv2 and
    UNIC: bicubic without, with 0.1 patches added to the size that the scale
    comes from (a workaround of theirs, which the weights have been used with
    ever since). transformers' ViT, CLIP and SigLIP: bicubic without either.

    Args:
        patches (Tensor): Shape (1, h * w, C).
        grid (tuple[int, int]): h and w.
        target (tuple[int, int]): The h' and w' wanted.
        family (str): A key of :data:`LAYOUTS`.
        registers (bool): Whether the model has registers.

    Returns:
        Tensor: Shape (1, h' * w', C), in the same precision; the input
        itself if the grids agree.
    """
    if tuple(grid) == tuple(target):
        return patches
    image = patches.float().transpose(1, 2).reshape(1, -1, *grid)
    how = 'antialias' if registers else LAYOUTS[family].interpolation
    size = dict(size=target)
    if how == 'offset':
        size = dict(scale_factor=[(new + 0.1) / old
                                  for new, old in zip(target, grid)])
    image = nn.functional.interpolate(
        image, mode='bicubic', antialias=how == 'antialias', **size)
    return image.flatten(2).transpose(1, 2).to(patches.dtype)


def place(pos_embed: Tensor, prefix: Iterable[int], wanted: int,
          target: Grid, family: str, registers: bool
          ) -> Tuple[Tensor, Optional[str]]:
    """Position embeddings for a backbone of mmpretrain's.

    Prefix tokens without a position get zeros, which is the same thing.

    Args:
        pos_embed (Tensor): Of the source, shape (1, n + h * h, C).
        prefix (Iterable[int]): What n may be.
        wanted (int): Prefix tokens of the backbone, m.
        target (tuple[int, int]): The backbone's grid, h' and w'.
        family (str): A key of :data:`LAYOUTS`.
        registers (bool): Whether the model has registers.

    Returns:
        tuple[Tensor, str | None]: Shape (1, m + h' * w', C), and what was
        done, None if nothing.
    """
    first, patches, grid = split_positions(pos_embed, prefix)
    done = []
    missing = wanted - first.shape[1]
    if missing > 0:
        first = torch.cat(
            [first, first.new_zeros(1, missing, first.shape[2])], dim=1)
        done.append(f'padded with {missing} zero row'
                    + ('s' if missing > 1 else ''))
    if tuple(grid) != tuple(target):
        done.append(f'resampled {grid[0]}x{grid[1]} -> '
                    f'{target[0]}x{target[1]}')
    patches = resample(patches, grid, target, family, registers)
    return torch.cat([first, patches], dim=1), ', '.join(done) or None
