"""The left-nullspace of a transformer block's linearised FFN (section 3.2).

Pure functions in the paper's row-vector convention: a token f of D channels
goes through a linear map as ``f W``, so that a direction u is invisible to W
where ``u^T W`` is (near) zero. W is computed and decomposed in float64: its
small singular values are what matters here.
"""
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.metrics.subspaces import random_rows
from mmsinger.models.features.anatomy import (ffn_weights, find_part,
                                              layer_scale)
from mmsinger.schema import check_value

Selection = Literal['smallest', 'threshold']


class SingularDirections(NamedTuple):
    """What a linear map W sees, most to least.

    Attributes:
        directions (Tensor): Left singular directions as columns, (D, D).
        values (Tensor): Singular values in descending order, (D, ).
    """
    directions: Tensor
    values: Tensor


class Nullspace(NamedTuple):
    """Directions that a linear map hardly sees.

    Attributes:
        basis (Tensor): Unit rows, shape (rank, D), float64. Orthonormal,
            except for random rows.
        singular_values (Tensor): Of the rows that are singular directions,
            shape (rank - num_random, ).
        num_random (int): How many of the last rows are random padding.
    """
    basis: Tensor
    singular_values: Tensor
    num_random: int


def linearised_ffn(block: nn.Module,
                   fold_layer_scale: bool = False,
                   fold_norm: bool = False) -> Tensor:
    """The FFN of a transformer block as one linear map (section 3.2).

    - Plain MLP (mmpretrain's and mmseg's ``TransformerEncoderLayer``, timm's
      ``Block``): the activation is dropped,
      ``W = W_fc1^T W_fc2^T`` of shape (D, D).
    - SwiGLU, ``fc3(silu(fc1 x) * (fc2 x))`` (DINOv2-g, EVA-02): the map is
      bilinear, and its Jacobian is a sum of two terms,
      ``W_fc1^T diag(.) W_fc3^T + W_fc2^T diag(.) W_fc3^T``, whose diagonals
      depend on the token. A direction is safe for every token only if neither
      the gate nor the value sees it, hence both terms side by side with unit
      diagonals: ``W = [W_fc1^T W_fc3^T | W_fc2^T W_fc3^T]``, shape (D, 2 D).

    Biases, and a norm inside the FFN, are left out.

    Args:
        block (nn.Module): A transformer block.
        fold_layer_scale (bool): Scale the output channels by the block's
            LayerScale, if it has one. Defaults to False, as in the paper.
        fold_norm (bool): Scale the input channels by the weight of the norm
            before the FFN. Defaults to False, as in the paper.

    Returns:
        Tensor: W, shape (D, D) or (D, 2 D), float64, on the CPU.

    Raises:
        ConfigError: If the FFN is of an unknown kind or its weights are not
            finite.
    """
    branches, output = ffn_weights(block)
    weight = torch.cat(
        [(output @ branch).T for branch in branches], dim=1)  # (D, D or 2 D)
    if fold_layer_scale:
        gamma = layer_scale(block)
        if gamma is not None:
            # one factor a channel, or a single one
            gamma = gamma.detach().cpu().double().expand(output.shape[0])
            weight = weight * gamma.repeat(len(branches))
    if fold_norm:
        norm = find_part(block, 'ffn_norm')
        if getattr(norm, 'weight', None) is not None:
            weight = weight * norm.weight.detach().cpu().double()[:, None]
    if not torch.isfinite(weight).all():
        raise ConfigError(
            f'The FFN weights of a {type(block).__name__} are not finite '
            '(NaN or infinite values). Check the teacher checkpoint.')
    return weight


def left_singular_directions(weight: Tensor) -> SingularDirections:
    """Singular values of W and its left singular directions.

    The sign of each direction is fixed (its largest entry is positive), so
    that runs can be compared.

    Args:
        weight (Tensor): W, shape (D, M) with M >= D.

    Returns:
        SingularDirections: Float64, on the CPU.

    Raises:
        ConfigError: If W is no matrix, M < D, or it is not finite.
    """
    if weight.dim() != 2 or weight.shape[1] < weight.shape[0]:
        raise ConfigError('A linearised FFN has shape (D, M) with M >= D, got '
                          f'{tuple(weight.shape)}.')
    if not torch.isfinite(weight).all():
        raise ConfigError('A linearised FFN has NaN or infinite entries. '
                          'Check the teacher checkpoint.')
    weight = weight.detach().cpu().double()
    if weight.shape[1] > weight.shape[0]:
        # W = R^T Q^T has R^T's left directions and values; half the time.
        # (An eigendecomposition of W W^T is faster still, but blurs singular
        # values below 1e-8 of the largest, which are what matters here.)
        weight = torch.linalg.qr(weight.T, mode='r').R.T
    directions, values, _ = torch.linalg.svd(weight, full_matrices=False)
    largest = directions.abs().argmax(dim=0, keepdim=True)
    signs = directions.gather(0, largest).sign()
    return SingularDirections(directions * signs, values)


def left_nullspace(singular: SingularDirections,
                   rank: int,
                   selection: Selection = 'smallest',
                   threshold: float = 0.05,
                   seed: int = 0) -> Nullspace:
    """Directions u of unit length with ``u^T W`` near zero (section 3.2).

    Args:
        singular (SingularDirections): Of W, see
            :func:`left_singular_directions`.
        rank (int): How many directions, at most D.
        selection (str): ``'smallest'``: the ``rank`` smallest singular
            directions, the smallest first (the paper). ``'threshold'``: among
            those with a singular value below ``threshold``, the ones nearest
            to it first, padded with random unit rows where there are too few
            (the official code). Defaults to ``'smallest'``.
        threshold (float): For ``'threshold'``. An absolute singular value.
            Defaults to 0.05.
        seed (int): Of the random padding. Defaults to 0.

    Returns:
        Nullspace: The basis and its singular values.

    Raises:
        ConfigError: If the rank is not in [1, D] or the selection is unknown.
    """
    check_value('adapter.selection', selection, Selection)
    directions, values = singular
    check_rank(rank, len(values))
    if selection == 'smallest':
        chosen = torch.arange(len(values) - 1, len(values) - 1 - rank, -1)
    else:
        chosen = (values < threshold).nonzero().flatten()[:rank]
    basis = directions[:, chosen].T
    num_random = rank - len(chosen)
    if num_random:
        warnings.warn(
            f'Only {len(chosen)} of {rank} adapter directions have a singular '
            f'value below threshold={threshold}; {num_random} random ones are '
            'added. Lower adapter.rank, raise adapter.threshold, or set '
            "adapter.selection='smallest'.")
        basis = torch.cat([basis, random_rows(num_random, len(values), seed)])
    return Nullspace(basis.contiguous(), values[chosen], num_random)


def check_rank(rank: int, dim: int) -> None:
    """Raise :class:`ConfigError` unless ``rank`` is an int in [1, dim]."""
    if isinstance(rank, bool) or not isinstance(rank, int) or \
            not 1 <= rank <= dim:
        raise ConfigError(
            f'adapter.rank={rank!r} is not valid: the teacher has {dim} '
            f'channels, so rank is an integer between 1 and {dim} (the paper '
            'uses 16).')
