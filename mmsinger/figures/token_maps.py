"""Patch tokens arranged as images: norms, similarities, colours."""
from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from mmsinger.metrics import cosine_gram, token_norms
from mmsinger.models.features.tokens import Grid, Tokens
from mmsinger.schema import Point, check_value


def norm_map(tokens: Tokens) -> Tensor:
    """Norms of patch tokens (Figure 2).

    Args:
        tokens (Tokens): Values of shape (B, N, C).

    Returns:
        Tensor: Shape (B, h, w), float32.
    """
    return token_norms(tokens.patches).unflatten(1, tuple(tokens.grid))


def similarity_map(tokens: Tokens, patch: Tuple[int, int]) -> Tensor:
    """Cosine similarity of every patch to a marked one (Figure 4).

    Args:
        tokens (Tokens): Values of shape (B, N, C).
        patch (tuple[int, int]): Row and column of the marked patch.

    Returns:
        Tensor: Shape (B, h, w), float32, in [-1, 1]; 1 at the patch.
    """
    row, column = patch
    index = row * tokens.grid[1] + column
    return cosine_gram(tokens.patches)[:, index].unflatten(
        1, tuple(tokens.grid))


def patch_at(grid: Grid, point: Point) -> Tuple[int, int]:
    """The patch that a point of the image lies in, on any grid.

    Args:
        grid (tuple[int, int]): Rows h and columns w of patches.
        point (tuple[float, float]): How far down and to the right, as shares
            of height and width, in [0, 1).

    Returns:
        tuple[int, int]: Row and column.

    Raises:
        ConfigError: If the point is outside the image.
    """
    check_value('patch', point, Point)
    return tuple(int(share * count) for share, count in zip(point, grid))


class Components(NamedTuple):
    """Principal components of each image's patch tokens.

    Attributes:
        mean (Tensor): Shape (B, 1, C).
        directions (Tensor): Unit columns, the strongest first, (B, C, 3).
            Their sign is fixed: the largest entry is positive.
        low (Tensor): 1st percentile of the projections, (B, 1, 3).
        high (Tensor): 99th percentile, (B, 1, 3).
    """
    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor


def principal_components(tokens: Tokens) -> Components:
    """The three strongest directions of each image's patch tokens.

    Args:
        tokens (Tokens): Values of shape (B, N, C); with fewer than three
            patches or channels the directions missing are zero.

    Returns:
        Components: In float32.
    """
    patches = tokens.patches.float()
    mean = patches.mean(dim=1, keepdim=True)
    directions = torch.linalg.svd(
        patches - mean, full_matrices=False)[2][:, :3].transpose(1, 2)
    missing = 3 - directions.shape[2]
    directions = torch.nn.functional.pad(directions, (0, missing))
    largest = directions.abs().argmax(dim=1, keepdim=True)
    signs = directions.gather(1, largest).sign()
    directions = directions * signs
    projected = (patches - mean) @ directions
    low, high = (torch.quantile(projected, level, dim=1, keepdim=True)
                 for level in (0.01, 0.99))
    return Components(mean, directions, low, high)


def pca_map(tokens: Tokens, components: Components) -> Tensor:
    """Patch tokens as colours: their first three components as red, green and
    blue, each from its 1st percentile (0) to its 99th (1).

    Args:
        tokens (Tokens): Values of shape (B, N, C).
        components (Components): From these tokens, see
            :func:`principal_components`; or from others in the same space, so
            that equal colours mean equal tokens.

    Returns:
        Tensor: Shape (B, h, w, 3), float32, in [0, 1].
    """
    mean, directions, low, high = components
    projected = (tokens.patches.float() - mean) @ directions
    colours = (projected - low) / (high - low).clamp(min=1e-12)
    return colours.clamp(0, 1).unflatten(1, tuple(tokens.grid))
