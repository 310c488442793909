from typing import Optional

import torch
from torch import Tensor, nn

from mmsinger.registry import MODELS
from mmsinger.schema import NonNegative


class FeatureLoss(nn.Module):
    """What a student's tokens differ from their targets by (L_KD).

    A loss is a subclass with :meth:`token_errors`; registered, it is chosen
    by ``model.loss_kd=dict(type=...)``. Computed in float32, also under
    autocast. The gradient reaches both arguments: in SiNGER the target
    depends on the adapter.

    Args:
        loss_weight (float): Defaults to 1.0.
    """

    def __init__(self, loss_weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def token_errors(self, pred: Tensor, target: Tensor) -> Tensor:
        """What each token contributes.

        Args:
            pred (Tensor): Shape (B, N, D), float32.
            target (Tensor): Shape (B, N, D), float32.

        Returns:
            Tensor: Shape (B, N).
        """
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor,
                weight: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            pred (Tensor): Projected student tokens, shape (B, N, D).
            target (Tensor): (Refined) teacher tokens, shape (B, N, D).
            weight (Tensor, optional): Of each token in the mean, shape
                (B, N). Defaults to None, all the same.

        Returns:
            Tensor: A scalar, times ``loss_weight``; 0 if no token counts.
        """
        return self.loss_weight * weighted_mean(
            self.token_errors(pred.float(), target.float()), weight)


@MODELS.register_module()
class FeatureMSELoss(FeatureLoss):
    """Mean squared error between tokens (section 3.1).

    Args:
        loss_weight (float): Defaults to 1.0.
    """

    def token_errors(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean of the squared differences over channels: (B, N)."""
        return nn.functional.mse_loss(
            pred, target, reduction='none').mean(dim=-1)


@MODELS.register_module()
class FeatureSmoothL1Loss(FeatureLoss):
    """Smooth L1 distance between tokens: squared where channels differ by
    less than ``beta``, linear beyond, so that long targets pull less.

    Args:
        beta (float): In units of the target's channels. Defaults to 1.0.
        loss_weight (float): Defaults to 1.0.
    """

    def __init__(self, beta: NonNegative = 1.0,
                 loss_weight: NonNegative = 1.0) -> None:
        super().__init__(loss_weight)
        self.beta = beta

    def token_errors(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean over channels: (B, N)."""
        return nn.functional.smooth_l1_loss(
            pred, target, reduction='none', beta=self.beta).mean(dim=-1)


@MODELS.register_module()
class FeatureCosineLoss(FeatureLoss):
    """One minus the cosine similarity of tokens: norms do not count.

    Args:
        loss_weight (float): Defaults to 1.0.
    """

    def token_errors(self, pred: Tensor, target: Tensor) -> Tensor:
        """In [0, 2]: (B, N)."""
        return 1 - torch.cosine_similarity(pred, target, dim=-1)


def weighted_mean(errors: Tensor, weight: Optional[Tensor] = None) -> Tensor:
    """The mean of errors of tokens or pixels, by weights of the same shape if
    given; 0 if none counts."""
    if weight is None:
        return errors.mean()
    return (weight * errors).sum() / weight.sum().clamp(min=1e-6)
