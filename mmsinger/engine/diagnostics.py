"""Numbers of one training step, from its own tokens.

docs/diagnostics.md says what each means.
"""
from typing import Dict

import torch
from torch import Tensor

from mmsinger.metrics import (gram_distance, robust_outliers, subspace_energy,
                              token_cosine, token_norms)
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
    numbers = _norm_numbers(teacher.patches)
    if 'refined' in values:
        refined = values['refined'].patches
        numbers.update({f'{name}_refined': value for name, value
                        in _norm_numbers(refined).items()})
        numbers['cosine'] = token_cosine(teacher.patches, refined).mean()
        numbers['gram'] = gram_distance(teacher.patches, refined).mean()
    if 'student' in values:
        student, aligned = align_tokens(values['student'], teacher)
        numbers['gram_student'] = gram_distance(
            aligned.patches, student.patches).mean()
    if 'kd_gradient' in values:
        gradient = values['kd_gradient']
        outliers = robust_outliers(token_norms(teacher.patches)).float()
        numbers['gradient_share'] = gradient_share(
            gradient.values.squeeze(-1), resample_patches(
                outliers.unsqueeze(-1), teacher.grid, gradient.grid
            ).squeeze(-1))
    return numbers


def _norm_numbers(patches: Tensor) -> Dict[str, Tensor]:
    norms = token_norms(patches)
    median, p99 = (torch.quantile(norms, level, dim=1).mean()
                   for level in (0.5, 0.99))
    return dict(outlier_share=robust_outliers(norms).float().mean(),
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
