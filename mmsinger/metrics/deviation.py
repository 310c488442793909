"""How much a block's output changes when its input moves along directions
that it should not see (Table 8)."""
from typing import NamedTuple

import torch
from torch import Tensor

from mmsinger.metrics.geometry import linear_cka, relative_l2, token_cosine


class Deviation(NamedTuple):
    """How far a block's output moved; every field has shape (B, ).

    Attributes:
        relative_l2 (Tensor): See :func:`relative_l2`; 0 for no change.
        cosine (Tensor): See :func:`token_cosine`; 1 for no change.
        cka (Tensor): See :func:`linear_cka`; 1 for no change.
    """
    relative_l2: Tensor
    cosine: Tensor
    cka: Tensor


def output_deviation(original: Tensor, changed: Tensor) -> Deviation:
    """Compare the patch tokens of two outputs.

    Args:
        original (Tensor): Shape (B, P, D).
        changed (Tensor): Shape (B, P, D).

    Returns:
        Deviation: Its fields have shape (B, ).
    """
    return Deviation(relative_l2(original, changed),
                     token_cosine(original, changed),
                     linear_cka(original, changed))


def perturb_along(patches: Tensor, directions: Tensor, coefficients: Tensor,
                  strength: float) -> Tensor:
    """Move every token by a share of its norm inside a subspace.

    ``f + strength * ||f|| * c N / ||c||``: with orthonormal rows N all
    subspaces of one dimension get steps of the same length, so that only
    where they point differs.

    Args:
        patches (Tensor): f, shape (B, P, D).
        directions (Tensor): N, orthonormal rows, shape (r, D).
        coefficients (Tensor): c, not zero, shape (B, P, r).
        strength (float): Length of the step over the token's norm.

    Returns:
        Tensor: Shape (B, P, D).
    """
    coefficients = torch.nn.functional.normalize(
        coefficients.to(patches), dim=-1)
    size = torch.linalg.vector_norm(patches, dim=-1, keepdim=True)
    return patches + strength * size * (coefficients
                                        @ directions.to(patches))
