"""Null directions of a distiller's teacher, and where its adapters lie."""
from typing import Any, Dict, Iterable, List, Optional, Tuple

from torch import Tensor

from mmsinger.errors import ConfigError
from mmsinger.metrics.jacobian import (differentiable, gramian_product,
                                       random_signs, smallest_directions)
from mmsinger.metrics.subspaces import (orthonormal_rows, random_rows,
                                        subspace_energy)
from mmsinger.models.adapters.nullspace import left_nullspace
from mmsinger.models.distillers import SiNGERDistiller


def intermediate_layers(distiller: SiNGERDistiller) -> List[int]:
    return [layer for layer in distiller.layers
            if layer != distiller.last_layer]


def nullspace_energies(distiller: SiNGERDistiller, seed: int = 0
                       ) -> Dict[str, Any]:
    """E_prob and E_safe of each adapter's matrices, and of random ones of the
    same shape (Table 5a).

    Args:
        distiller (SiNGERDistiller): With its teacher and adapters loaded.
        seed (int): Of the random ones. Defaults to 0.

    Returns:
        dict[str, dict]: By layer: ``block``, ``rank``, and ``up``, ``down``,
        ``random``, each with ``e_prob`` and ``e_safe``.
    """
    energies = {}
    for layer in distiller.layers:
        block, (directions, _) = distiller.decompose_ffn(layer)
        adapter = distiller.adapters[str(layer)]
        rows = dict(
            up=adapter.up, down=adapter.down.T,
            random=random_rows(adapter.rank, len(directions), seed))
        energies[str(layer)] = dict(block=block, rank=adapter.rank)
        for name, matrix in rows.items():
            e_safe, e_prob = subspace_energy(matrix, directions)
            energies[str(layer)][name] = dict(e_prob=e_prob, e_safe=e_safe)
    return energies


def null_directions(distiller: SiNGERDistiller, batches: Iterable[Tensor],
                    num_images: int, products: Optional[int] = None,
                    seed: int = 0) -> Dict[int, Dict[str, Tensor]]:
    """Directions that the block after each distilled one hardly sees, by
    three estimates (Table 8).

    Args:
        distiller (SiNGERDistiller): With its teacher loaded.
        batches (Iterable[Tensor]): Preprocessed images (B, 3, H, W).
        num_images (int): How many of them to linearise the blocks at.
        products (int, optional): See :func:`smallest_directions`.
        seed (int): Of signs, starts and the random directions. Defaults to 0.

    Returns:
        dict[int, dict[str, Tensor]]: For each layer but the last orthonormal
        rows (rank, D), float64: ``ours``, from the linearised FFN by the
        recipe's ``adapter.selection``; ``jacobian``, of the whole block, see
        :mod:`mmsinger.metrics.jacobian`; ``random``.
    """
    layers = intermediate_layers(distiller)
    inputs = _block_inputs(distiller, batches, layers, num_images, seed)
    cfg = distiller.adapter_cfg
    directions = {}
    for layer in layers:
        block, decomposition = distiller.decompose_ffn(layer)
        dim, rank = len(decomposition[0]), distiller.adapters[str(layer)].rank
        ours = left_nullspace(
            None, rank, cfg.get('selection', 'smallest'),
            cfg.get('threshold', 0.05), cfg.get('seed', 0), decomposition)

        def product(rows: Tensor) -> Tensor:
            total = 0.
            for taps, values, signs in inputs[layer]:
                total = total + gramian_product(
                    lambda tokens: taps.rerun(block, tokens), values, signs,
                    rows)
            return total / len(inputs[layer])

        with differentiable(distiller.teacher.blocks.modules[block]):
            jacobian, _ = smallest_directions(
                product, dim, rank, products, seed)
        directions[layer] = dict(
            ours=orthonormal_rows(ours.basis), jacobian=jacobian,
            random=orthonormal_rows(random_rows(rank, dim, seed)))
    return directions


def _block_inputs(distiller: SiNGERDistiller, batches: Iterable[Tensor],
                  layers: List[int], num_images: int, seed: int):
    """For each layer the taps, raw tokens (1, N, D) and signs (P, ) of some
    images."""
    if num_images < 1:
        raise ConfigError(
            f'--jacobian-images={num_images}: at least 1 is needed.')
    inputs = {layer: [] for layer in layers}
    count = 0
    for images in batches:
        for image in images[:num_images - count].split(1):
            taps = distiller.teacher(
                image, distiller.tapped_teacher_layers,
                distiller.student_normalisation)
            for layer in layers:
                tokens = taps.tokens(layer)
                signs = random_signs(
                    1, tokens.patches.shape[1], seed + count)[0]
                inputs[layer].append((taps, tokens.values, signs))
            count += 1
        if count == num_images:
            break
    if not count:
        raise ConfigError('There are no images to measure on.')
    return inputs
