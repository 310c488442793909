"""Directions that a whole transformer block hardly sees (Table 8).

The adapter's null directions come from the linearised FFN alone, a proxy.
These come from the block itself: attention, norms, activation and skip
connection included, linearised at real tokens.

**Definition.** With J_ji = d y_j / d x_i, (D, D), from input token i to output
token j of a block, a direction u in R^D is as visible as

    E(u) = mean over patch tokens i of  sum over all tokens j of ||J_ji u||^2:

how much the block's outputs change if one patch token moves by a small step
along u. E(u) = u^T M u with the Gramian M = mean_i sum_j J_ji^T J_ji, (D, D),
averaged over images too. The full block's null directions are the eigenvectors
of M with the smallest eigenvalues.

**Without the Jacobian.** With signs s_i = +-1 drawn at random, one for each
patch token, let S u = sum_i s_i J_{.i} u, the block's response if every patch
token moves along +-u at once. Its mean over signs of ||S u||^2 is P E(u), as
mixed terms cancel, so that M v = mean of S^T S v / P: one Jacobian-vector and
one vector-Jacobian product for all tokens together. The estimate is unbiased;
signs and images are fixed, so it is the same symmetric matrix in each product.
"""
import contextlib
from typing import Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

BlockFunction = Callable[[Tensor], Tensor]


def random_signs(count: int, num_patches: int, seed: int = 0) -> Tensor:
    """Signs for the Gramian's estimate.

    Args:
        count (int): How many images.
        num_patches (int): P.
        seed (int): Seeds the draw. Defaults to 0.

    Returns:
        Tensor: +1 and -1, shape (count, P), float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (count, num_patches), generator=generator)
    return 2. * bits - 1


def gramian_product(block: BlockFunction, values: Tensor, signs: Tensor,
                    directions: Tensor, chunk: Optional[int] = None) -> Tensor:
    """``M u`` for some directions u, at the tokens of one image.

    Args:
        block (Callable): Tokens (b, N, D) to tokens (b, N, D), image by
            image, in evaluation mode and differentiable forwards and
            backwards: see :func:`differentiable`.
        values (Tensor): Its input for one image, (1, N, D), the patch tokens
            last.
        signs (Tensor): One for each patch token, shape (P, ).
        directions (Tensor): The u, rows (k, D).
        chunk (int, optional): Directions at a time: a batch of the block.
            Defaults to None: at most 2^22 attention weights a head.

    Returns:
        Tensor: ``M u`` as rows, shape (k, D).
    """
    num_patches = len(signs)
    weights = signs.to(values)[:, None]  # (P, 1)
    chunk = chunk or max(1, 2**22 // values.shape[1]**2)
    products = []
    for rows in directions.to(values).split(chunk):
        inputs = values.repeat(len(rows), 1, 1)  # (k, N, D)
        step = torch.zeros_like(inputs)
        step[:, -num_patches:] = weights * rows[:, None]
        response = jvp(block, (inputs, ), (step, ))[1]
        gradient, = vjp(block, inputs)[1](response)
        products.append(
            (weights * gradient[:, -num_patches:]).sum(dim=1) / num_patches)
    return torch.cat(products)


@contextlib.contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Make a block's forward pass one that torch.func can differentiate both
    ways: plain attention kernels (the fused ones have no forward derivative),
    no checkpointing. Values stay the same up to rounding."""
    checkpointed = [part for part in module.modules()
                    if getattr(part, 'with_cp', False)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    for part in checkpointed:
        part.with_cp = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part in checkpointed:
            part.with_cp = True


def smallest_directions(product: Callable[[Tensor], Tensor],
                        dim: int,
                        rank: int,
                        products: Optional[int] = None,
                        seed: int = 0) -> Tuple[Tensor, Tensor]:
    """Eigenvectors of a symmetric matrix with the smallest eigenvalues, from
    products with it alone.

    A block Lanczos method: an orthonormal basis starts with ``rank`` random
    directions and grows by their products, made orthogonal to all before;
    what is returned solves the problem inside the basis. Float64 on the CPU.

    Args:
        product (Callable): Rows (k, D) to their products, rows (k, D).
        dim (int): D.
        rank (int): How many directions.
        products (int, optional): The most products to take, at least rank.
            Defaults to None: D, with which the result is exact (the basis
            fills the space). With fewer the eigenvalues are too large.
        seed (int): Seeds the start. Defaults to 0.

    Returns:
        tuple[Tensor, Tensor]: Orthonormal rows (rank, D), and their
        eigenvalues (rank, ) in ascending order.
    """
    limit = dim if products is None else min(dim, max(rank, products))
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(rank, dim, generator=generator, dtype=torch.float64)
    basis = block.new_zeros(0, dim)
    images = block.new_zeros(0, dim)
    while len(basis) < limit:
        block = _orthonormal_to(basis, block[:limit - len(basis)])
        basis = torch.cat([basis, block])
        block = product(block).double().cpu()
        images = torch.cat([images, block])
    projected = basis @ images.T
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return vectors.T[:rank] @ basis, values[:rank]


def _orthonormal_to(basis: Tensor, rows: Tensor) -> Tensor:
    # Repeated, as rows that nearly lie in the basis lose their digits; where
    # nothing is left of them, qr() has filled in other directions.
    for _ in range(3):
        rows = torch.linalg.qr((rows - rows @ basis.T @ basis).T)[0].T
    return rows
