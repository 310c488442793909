"""What blocks do not see: null directions of FFNs and of whole blocks."""
from typing import (Any, Callable, Dict, Iterable, List, NamedTuple, Optional,
                    Sequence)

import torch
from torch import Tensor

from mmsinger.errors import ConfigError
from mmsinger.metrics import (Deviation, differentiable, gramian_product,
                              orthonormal_rows, output_deviation,
                              perturb_along, random_rows, random_signs,
                              smallest_directions, subspace_energy,
                              subspace_overlap)
from mmsinger.models.adapters.nullspace import (left_nullspace,
                                                left_singular_directions,
                                                linearised_ffn)
from mmsinger.models.distillers import FeatureDistiller
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.teachers.frozen import FrozenTeacher, Normalisation
from mmsinger.schema import Count, check_value

ABSOLUTE = 0.05  # the official code's threshold
RELATIVE = 0.05  # of the largest singular value
STRENGTH = 0.3   # of a step over the token's norm, see measure()


class NullDirections(NamedTuple):
    """What a block hardly sees, by three estimates: orthonormal rows (r, D).

    Attributes:
        ffn (Tensor): From its linearised FFN, as adapters start.
        jacobian (Tensor): From the whole block, see
            :mod:`mmsinger.metrics.jacobian`; float64.
        random (Tensor): For comparison; float64.
    """
    ffn: Tensor
    jacobian: Tensor
    random: Tensor


def null_directions(passes: Sequence[BlockTaps], layer: int, ffn: Tensor,
                    products: Optional[int] = None, seed: int = 0
                    ) -> NullDirections:
    """Directions that the block after a layer hardly sees.

    Args:
        passes (Sequence[BlockTaps]): The teacher's, one for each image at
            which to linearise the block; they hold the layer's output.
        layer (int): The layer, not the last one.
        ffn (Tensor): The FFN's null directions, orthonormal rows (r, D).
        products (int, optional): See :func:`smallest_directions`.
        seed (int): Seeds signs, starts and random directions. Defaults to 0.

    Returns:
        NullDirections: Each of shape (r, D).
    """
    rank, dim = ffn.shape

    def product(rows: Tensor) -> Tensor:
        total = 0.
        for index, taps in enumerate(passes):
            tokens = taps.tokens(layer)
            signs, = random_signs(1, tokens.patches.shape[1], seed + index)
            total = total + gramian_product(
                lambda values: taps.rerun(layer + 1, values), tokens.values,
                signs, rows)
        return total / len(passes)

    with differentiable(passes[0].blocks.modules[layer + 1]):
        jacobian, _ = smallest_directions(product, dim, rank, products, seed)
    return NullDirections(
        ffn, jacobian, orthonormal_rows(random_rows(rank, dim, seed)))


@torch.no_grad()
def deviations(tokens: Tokens, following: Tensor, directions: NullDirections,
               strength: float, generator: torch.Generator,
               next_block: Callable[[Tokens], Tokens]) -> List[Deviation]:
    """How the next block's output changes when its input moves along each
    estimate of its null directions (Table 8), by the same coefficients.

    Args:
        tokens (Tokens): Its input, values of shape (B, N, D).
        following (Tensor): Patch tokens of its output, (B, P, D).
        directions (NullDirections): Orthonormal rows, each (r, D).
        strength (float): Length of the steps over the tokens' norms.
        generator (Generator): Draws each patch's direction.
        next_block (Callable): Runs it.

    Returns:
        list[Deviation]: For each estimate; fields of shape (B, ).
    """
    coefficients = torch.randn(
        (*tokens.patches.shape[:2], len(directions.ffn)), generator=generator)
    return [output_deviation(following, next_block(
        tokens.with_patches(perturb_along(
            tokens.patches, rows, coefficients, strength))).patches)
        for rows in directions]


# -- of a distiller ----------------------------------------------------------


def intermediate_layers(distiller: FeatureDistiller) -> List[int]:
    """The distilled layers whose next block refinement is to spare."""
    return [layer for layer in distiller.layers
            if layer != distiller.refinement.last_layer]


def nullspace_energies(distiller: FeatureDistiller, seed: int = 0
                       ) -> Dict[str, Any]:
    """E_prob and E_safe of each adapter's matrices, and of random ones of
    their shape (Table 5a).

    Args:
        distiller (FeatureDistiller): With its teacher and adapters loaded.
        seed (int): Seeds the random ones. Defaults to 0.

    Returns:
        dict[str, dict]: By layer: ``block``, ``rank``, and ``up``, ``down``,
        ``random``, each with ``e_prob`` and ``e_safe``.
    """
    energies = {}
    for layer in distiller.layers:
        directions = distiller.refinement.ffn_directions[layer].directions
        adapter = distiller.adapters[str(layer)]
        energies[str(layer)] = dict(
            block=distiller.refinement.ffn_block(layer), rank=adapter.rank)
        for name, rows in (
                ('up', adapter.up), ('down', adapter.down.T),
                ('random', random_rows(adapter.rank, len(directions), seed))):
            e_safe, e_prob = subspace_energy(rows, directions)
            energies[str(layer)][name] = dict(e_prob=e_prob, e_safe=e_safe)
    return energies


def distilled_null_directions(
        distiller: FeatureDistiller, batches: Iterable[Tensor],
        num_images: int, products: Optional[int] = None, seed: int = 0
) -> Dict[int, NullDirections]:
    """Null directions of the block after each distilled layer.

    Args:
        distiller (FeatureDistiller): With its teacher loaded.
        batches (Iterable[Tensor]): Preprocessed images (B, 3, H, W).
        num_images (int): How many of them to linearise the blocks at.
        products (int, optional): See :func:`smallest_directions`.
        seed (int): Seeds all that is random. Defaults to 0.

    Returns:
        dict[int, NullDirections]: For each layer but the last; the FFN's by
        the recipe's ``adapter.selection``.
    """
    check_value('--jacobian-images', num_images, Count)
    passes: List[BlockTaps] = []
    for images in batches:
        passes += [distiller.teacher(
            image, distiller.tapped_teacher_layers,
            distiller.student_normalisation)
            for image in images[:num_images - len(passes)].split(1)]
        if len(passes) == num_images:
            break
    if not passes:
        raise ConfigError('There are no images to measure on.')
    refinement = distiller.refinement
    options = {key: refinement.adapter_cfg[key]
               for key in ('selection', 'threshold', 'seed')
               if key in refinement.adapter_cfg}
    directions = {}
    for layer in intermediate_layers(distiller):
        ffn = left_nullspace(
            refinement.ffn_directions[layer],
            distiller.adapters[str(layer)].rank, **options)
        directions[layer] = null_directions(
            passes, layer, orthonormal_rows(ffn.basis), products, seed)
    return directions


# -- of a teacher ------------------------------------------------------------


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
        excess (list[Tensor | None]): The artifacts' excess in each block's
            output, rows (n, D); None if it has none.

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
        seed (int): Seeds signs, starts and steps. Defaults to 0.
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
            results.append(_compare_block(
                passes, layer, min(rank, teacher.blocks.dim), products, seed))
        except ConfigError as error:
            results.append(dict(skipped=str(error)))
        progress(1)
    return results


def _compare_block(passes: List[BlockTaps], layer: int, rank: int,
                   products: int, seed: int) -> Dict[str, Any]:
    ffn = left_nullspace(left_singular_directions(linearised_ffn(
        passes[0].blocks.modules[layer + 1])), rank).basis
    found = null_directions(passes, layer, ffn, products, seed)
    generator = torch.Generator().manual_seed(seed)
    mean = sum(torch.stack([torch.cat(deviation) for deviation in deviations(
        taps.tokens(layer), taps.tokens(layer + 1).patches, found, STRENGTH,
        generator, lambda moved: moved._replace(
            values=taps.rerun(layer + 1, moved.values)))])
        for taps in passes) / len(passes)  # (estimates, fields)
    return dict(
        block=layer + 1, rank=rank, chance=rank / ffn.shape[1],
        overlap=subspace_overlap(found.ffn, found.jacobian),
        **{name: dict(zip(Deviation._fields, values))
           for name, values in zip(found._fields, mean.tolist())})
