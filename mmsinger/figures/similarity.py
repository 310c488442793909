"""How alike one patch is to all others."""
from typing import Tuple

from torch import Tensor

from mmsinger.errors import ConfigError
from mmsinger.metrics.geometry import cosine_gram
from mmsinger.models.features.tokens import Grid, Tokens


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


def patch_at(grid: Grid, point: Tuple[float, float]) -> Tuple[int, int]:
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
    if not isinstance(point, (tuple, list)) or len(point) != 2 or not all(
            isinstance(share, (int, float)) and 0 <= share < 1
            for share in point):
        raise ConfigError(
            f'patch={point} is outside the image: give two shares, of '
            'height and width, each from 0 to below 1; (0.5, 0.5) is the '
            'middle.')
    return tuple(int(share * count) for share, count in zip(point, grid))
