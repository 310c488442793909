"""Numbers of one training step, from its own tokens.

docs/diagnostics.md says what each means.
"""
from typing import Dict, Optional, Union

import torch
from torch import Tensor

from mmsinger.metrics import (gram_distance, outlier_threshold,
                              robust_outliers, subspace_energy, token_cosine,
                              token_norms)
from mmsinger.models.adapters import SiNGERAdapter
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.tokens import (Tokens, align_tokens,
                                             resample_patches)


@torch.no_grad()
def step_diagnostics(record: StepRecord) -> Dict[int, Dict[str, Tensor]]:
    """Describe a step by teacher layer, without a wait for the device.

    Args:
        record (StepRecord): The step; what it does not hold is left out.

    Returns:
        dict[int, dict[str, Tensor]]: Scalars, means over images:
        ``outlier_share``, ``norm_median``, ``norm_p99``, ``norm_max`` of F,
        and the same with ``_refined`` of F_hat; ``cosine`` and ``gram`` (D_G)
        of F and F_hat; ``gram_student`` of F and the student's tokens;
        ``gradient_share``, see :func:`gradient_share`.
    """
    return {layer: _layer_diagnostics(values)
            for layer, values in record.layers.items()}


def _layer_diagnostics(values: Dict[str, Tokens]) -> Dict[str, Tensor]:
    teacher = values['teacher']
    weight = teacher.patch_weight
    patches = _counted(teacher.patches, weight)
    numbers = _norm_numbers(patches, weight)
    if 'refined' in values:
        refined = _counted(values['refined'].patches, weight)
        numbers.update({f'{name}_refined': value for name, value
                        in _norm_numbers(refined, weight).items()})
        numbers['cosine'] = (token_cosine(patches, refined)
                             / _share(weight)).mean()
        numbers['gram'] = gram_distance(patches, refined).mean()
    if 'student' in values:
        student, aligned = align_tokens(values['student'], teacher)
        numbers['gram_student'] = gram_distance(*(
            _counted(tokens.patches, aligned.patch_weight)
            for tokens in (aligned, student))).mean()
    if 'kd_gradient' in values:
        gradient = values['kd_gradient']
        outliers = robust_outliers(token_norms(patches), weight=weight).float()
        numbers['gradient_share'] = gradient_share(
            gradient.values.squeeze(-1), resample_patches(
                outliers.unsqueeze(-1), teacher.grid, gradient.grid
            ).squeeze(-1))
    return numbers


def _counted(patches: Tensor, weight: Optional[Tensor]) -> Tensor:
    """Zeros in place of tokens that do not count, such as padding: they add
    nothing to a Gram matrix."""
    return patches if weight is None else patches * (weight != 0)[..., None]


def _share(weight: Optional[Tensor]) -> Union[float, Tensor]:
    """How many of each image's tokens count."""
    return 1. if weight is None else (weight != 0).float().mean(dim=1)


def _norm_numbers(patches: Tensor, weight: Optional[Tensor]
                  ) -> Dict[str, Tensor]:
    norms = token_norms(patches)
    median, p99 = (outlier_threshold(norms, level, weight).mean()
                   for level in (0.5, 0.99))
    outliers = robust_outliers(norms, weight=weight).float().mean(dim=1)
    return dict(outlier_share=(outliers / _share(weight)).mean(),
                norm_median=median, norm_p99=p99,
                norm_max=norms.amax(dim=1).mean())


def gradient_share(gradient: Tensor, outliers: Tensor) -> Tensor:
    """The share of the KD gradient that comes from outlier tokens (equation
    3).

    The squared norm of a gradient is a sum over tokens; this is the outliers'
    part of it. It exceeds their share of the tokens by as much as they are
    favoured.

    Args:
        gradient (Tensor): Norms of each token's gradient up to a common
            factor, (B, k), prefix tokens in front. Of an MSE they are had
            without a backward pass, see
            :meth:`FeatureDistiller.record_kd_gradient`.
        outliers (Tensor): Which patch tokens are outliers, (B, P), bool; or
            how much of each is one, in [0, 1].

    Returns:
        Tensor: A scalar in [0, 1]; 0 where there is no gradient.
    """
    energy = gradient.float().square()
    patches = energy[:, -outliers.shape[1]:]
    total = energy.sum()
    return (patches * outliers).sum() / total.clamp(
        min=torch.finfo(total.dtype).tiny)


def adapter_energies(adapter: SiNGERAdapter, directions: Tensor
                     ) -> Dict[str, float]:
    """E_safe and E_prob of both matrices of an adapter (Table 5a).

    Args:
        adapter (SiNGERAdapter): The adapter.
        directions (Tensor): Left singular directions of the linearised FFN,
            (D, D), see :func:`left_singular_directions`.

    Returns:
        dict[str, float]: ``e_safe_up``, ``e_prob_up``, ``e_safe_down``,
        ``e_prob_down``; NaN for a matrix that is zero.
    """
    numbers = {}
    for name, rows in (('up', adapter.up), ('down', adapter.down.T)):
        e_safe, e_prob = subspace_energy(rows, directions)
        numbers.update({f'e_safe_{name}': e_safe, f'e_prob_{name}': e_prob})
    return numbers


def inlier_variances(record: StepRecord, quantile: float
                     ) -> Dict[int, Tensor]:
    """How much refinement shrinks ordinary tokens, see
    :func:`inlier_variance_ratio`.

    Args:
        record (StepRecord): Of a step with a refinement.
        quantile (float): See :func:`inlier_variance_ratio`.

    Returns:
        dict[int, Tensor]: A scalar for each layer, on its device.
    """
    return {
        layer: inlier_variance_ratio(
            values['teacher'].patches, values['refined'].patches, quantile,
            values['refined'].patch_weight)
        for layer, values in record.layers.items()
    }


@torch.no_grad()
def inlier_variance_ratio(original: Tensor, refined: Tensor, quantile: float,
                          weight: Optional[Tensor] = None) -> Tensor:
    """Variance of refined over original tokens that are no outliers.

    About 1 while refinement leaves them alone; an adapter that collapses
    shrinks them, and the KD loss then looks best when it is worst.

    Args:
        original (Tensor): Patch tokens F, shape (B, P, D).
        refined (Tensor): F_hat, shape (B, P, D).
        quantile (float): Tokens whose original norm is above their image's
            quantile are left out.
        weight (Tensor, optional): Shape (B, P); tokens of weight 0 are left
            out too. Defaults to None, all count.

    Returns:
        Tensor: A scalar, on the tokens' device.
    """
    norms = token_norms(original)
    inliers = norms <= outlier_threshold(norms, quantile, weight)
    if weight is not None:
        inliers = inliers & (weight > 0)
    inliers = inliers.unsqueeze(-1)
    count = inliers.sum()

    def variance(tokens: Tensor) -> Tensor:
        tokens = tokens.float() * inliers
        mean = tokens.sum(dim=(0, 1)) / count
        return ((tokens - mean) * inliers).square().sum() / count

    return variance(refined) / variance(original).clamp(min=1e-12)
