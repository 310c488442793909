"""The main directions of an image's patch tokens as colours."""
from typing import NamedTuple

import torch
from torch import Tensor

from mmsinger.models.features.tokens import Tokens


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
        components (Components): Of these tokens, see
            :func:`principal_components`; or of others in the same space, so
            that equal colours mean equal tokens.

    Returns:
        Tensor: Shape (B, h, w, 3), float32, in [0, 1].
    """
    mean, directions, low, high = components
    projected = (tokens.patches.float() - mean) @ directions
    colours = (projected - low) / (high - low).clamp(min=1e-12)
    return colours.clamp(0, 1).unflatten(1, tuple(tokens.grid))
