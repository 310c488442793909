"""Subspaces of the channels, as rows in R^D."""
from typing import Tuple

import torch
from torch import Tensor


def random_rows(rank: int, dim: int, seed: int) -> Tensor:
    """Random unit rows.

    Args:
        rank (int): How many.
        dim (int): Their length D.
        seed (int): Seeds the draw.

    Returns:
        Tensor: Shape (rank, D), float64, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def orthonormal_rows(rows: Tensor) -> Tensor:
    """An orthonormal basis of a subspace.

    Args:
        rows (Tensor): What spans it, linearly independent, shape (r, D).

    Returns:
        Tensor: Shape (r, D).
    """
    return torch.linalg.qr(rows.T)[0].T


def subspace_energy(rows: Tensor,
                    directions: Tensor,
                    share: float = 0.25) -> Tuple[float, float]:
    """E_safe and E_prob: where an adapter matrix's energy lies (Table 5a).

    Args:
        rows (Tensor): The matrix as rows in R^D, shape (r, D): the
            up-projection, or the transposed down-projection.
        directions (Tensor): Left singular directions of W as columns (D, D),
            in descending order of their singular values.
        share (float): Part of the directions that count as safe (smallest)
            and as problematic (largest). Defaults to 0.25, with which random
            rows score 0.25 in both.

    Returns:
        tuple[float, float]: E_safe and E_prob, each in [0, 1]; NaN for a zero
        matrix.
    """
    dim = directions.shape[0]
    count = max(1, round(share * dim))
    energy = (rows.detach().cpu().double() @ directions).square().sum(dim=0)
    total = energy.sum()
    return ((energy[-count:].sum() / total).item(),
            (energy[:count].sum() / total).item())


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles of two subspaces: 1 if they
    are the same, r / D on average if one is random.

    Args:
        a (Tensor): Orthonormal rows, shape (r, D).
        b (Tensor): Orthonormal rows, shape (r, D).

    Returns:
        float: In [0, 1].
    """
    return float((a.double() @ b.double().T).square().sum() / len(a))
