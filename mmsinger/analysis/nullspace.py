"""What each block's FFN does not see, and whether artifacts lie there."""
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor

from mmsinger.analysis.separation import subspace_overlap
from mmsinger.errors import ConfigError
from mmsinger.metrics.deviation import (Deviation, output_deviation,
                                        perturb_along)
from mmsinger.metrics.jacobian import (differentiable, gramian_product,
                                       random_signs, smallest_directions)
from mmsinger.metrics.subspaces import (orthonormal_rows, random_rows,
                                        subspace_energy)
from mmsinger.models.adapters.nullspace import (left_nullspace,
                                                left_singular_directions,
                                                linearised_ffn)
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.teachers.frozen import FrozenTeacher, Normalisation

ABSOLUTE = 0.05  # the official code's threshold
RELATIVE = 0.05  # of the largest singular value
STRENGTH = 0.3   # of tools/measure.py


def nullspace_dimensions(values: Tensor) -> Dict[str, int]:
    """How many directions a linear map hardly sees.

    Args:
        values (Tensor): Its singular values, shape (D, ).

    Returns:
        dict[str, int]: ``absolute``: below 0.05, the official code's
        threshold; ``relative``: below 5 % of the largest.
    """
    return dict(absolute=int((values < ABSOLUTE).sum()),
                relative=int((values < RELATIVE * values.max()).sum()))


def ffn_spectra(teacher: FrozenTeacher, excess: List[Optional[Tensor]]
                ) -> List[Dict[str, Any]]:
    """Decompose the linearised FFN of every block.

    Args:
        teacher (FrozenTeacher): With its weights.
        excess (list[Tensor | None]): Of each block's output the artifacts'
            excess as rows (n, D), None if it has none.

    Returns:
        list[dict]: For each block: ``singular_values`` (descending),
        ``nullspace`` (:func:`nullspace_dimensions`), and ``e_safe``,
        ``e_prob``: the share of the energy of the artifacts in its input (in
        its output, of the last one: as SiNGER takes them) inside the quarter
        of directions that its FFN sees least, and most; None without any.
    """
    spectra = []
    last = len(teacher.blocks) - 1
    for index, block in enumerate(teacher.blocks.modules):
        directions, values = left_singular_directions(linearised_ffn(block))
        rows = excess[index if index == last else index - 1] \
            if index else None
        e_safe, e_prob = (None, None) if rows is None \
            else subspace_energy(rows, directions)
        spectra.append(dict(
            singular_values=values.tolist(),
            nullspace=nullspace_dimensions(values),
            e_safe=e_safe, e_prob=e_prob))
    return spectra


def compare_with_jacobian(teacher: FrozenTeacher, inputs: List[Tensor],
                          normalisation: Normalisation, rank: int = 16,
                          products: int = 64, seed: int = 0,
                          progress: Callable[[int], None] = lambda n: None
                          ) -> List[Dict[str, Any]]:
    """Null directions of the linearised FFN against those of the whole block
    (Table 8), for each block's output and the block after it.

    Args:
        teacher (FrozenTeacher): With its weights.
        inputs (list[Tensor]): Images as they are fed, each (1, 3, H, W).
        normalisation (Normalisation): Theirs.
        rank (int): Directions to compare. Defaults to 16.
        products (int): Jacobian products for each block and image, see
            :func:`smallest_directions`. Defaults to 64.
        seed (int): Of signs, starts and steps. Defaults to 0.
        progress (Callable): Called with 1 after each block.

    Returns:
        list[dict]: For each block but the last: ``overlap`` of the two
        subspaces (:func:`subspace_overlap`; ``chance`` for random ones), and
        ``ffn``, ``jacobian``, ``random``: how much the next block's output
        changes when its input moves along each, see
        :class:`mmsinger.metrics.Deviation`. Only ``skipped``, the reason,
        where a block cannot be run on its own.
    """
    depth = len(teacher.blocks)
    passes = [teacher(image, range(depth), normalisation) for image in inputs]
    results = []
    for layer in range(depth - 1):
        try:
            results.append(_compare_block(teacher, passes, layer, rank,
                                          products, seed))
        except ConfigError as error:
            results.append(dict(skipped=str(error)))
        progress(1)
    return results


def _compare_block(teacher: FrozenTeacher, passes: List[BlockTaps],
                   layer: int, rank: int, products: int, seed: int
                   ) -> Dict[str, Any]:
    block = layer + 1
    module = teacher.blocks.modules[block]
    dim = teacher.blocks.dim
    rank = min(rank, dim)
    signs = [random_signs(1, taps.tokens(layer).patches.shape[1], seed + i)[0]
             for i, taps in enumerate(passes)]

    def product(rows: Tensor) -> Tensor:
        return sum(
            gramian_product(lambda tokens, taps=taps: taps.rerun(
                block, tokens), taps.tokens(layer).values, sign, rows)
            for taps, sign in zip(passes, signs)) / len(passes)

    with differentiable(module):
        jacobian, _ = smallest_directions(product, dim, rank, products, seed)
    directions = dict(
        ffn=left_nullspace(linearised_ffn(module), rank).basis,
        jacobian=jacobian,
        random=orthonormal_rows(random_rows(rank, dim, seed)))
    result: Dict[str, Any] = dict(
        block=block, rank=rank, chance=rank / dim,
        overlap=subspace_overlap(directions['ffn'], jacobian))
    for name, rows in directions.items():
        result[name] = _deviation(passes, layer, rows, seed)
    return result


@torch.no_grad()
def _deviation(passes: List[BlockTaps], layer: int, rows: Tensor, seed: int
               ) -> Dict[str, float]:
    """Means over images; every subspace gets the same coefficients."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for taps in passes:
        tokens = taps.tokens(layer)
        coefficients = torch.randn((1, tokens.patches.shape[1], len(rows)),
                                   generator=generator)
        moved = tokens.with_patches(perturb_along(
            tokens.patches, rows, coefficients, STRENGTH))
        changed = tokens._replace(values=taps.rerun(layer + 1, moved.values))
        values.append(torch.stack(output_deviation(
            taps.tokens(layer + 1).patches, changed.patches)))
    mean = torch.cat(values, dim=1).mean(dim=1)
    return dict(zip(Deviation._fields, mean.tolist()))
