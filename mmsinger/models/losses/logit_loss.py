from typing import Optional

from torch import Tensor, nn

from mmsinger.models.losses.feature_loss import weighted_mean
from mmsinger.registry import MODELS
from mmsinger.schema import NonNegative, Positive


@MODELS.register_module()
class LogitKLLoss(nn.Module):
    """Divergence of softened class distributions (arXiv 1503.02531).

    ``T^2 KL(softmax(t / T) || softmax(s / T))``, a mean over images (and
    pixels), in float32. T^2 keeps the size of the gradient when T changes.

    Args:
        temperature (float): T. Defaults to 4.0.
        loss_weight (float): Defaults to 1.0.

    Raises:
        ConfigError: If the temperature is not above 0.
    """

    def __init__(self, temperature: Positive = 4.0,
                 loss_weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor,
                weight: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            pred (Tensor): The student's logits, (B, K) or (B, K, h, w).
            target (Tensor): The teacher's, (B, K) or (B, K, h', w'); resized
                to the student's grid.
            weight (Tensor, optional): How much each pixel counts in the mean,
                (B, h, w). Defaults to None, all alike.

        Returns:
            Tensor: A scalar, times ``loss_weight``.
        """
        pred, target = pred.float(), target.float()
        if pred.shape[2:] != target.shape[2:]:
            target = nn.functional.interpolate(
                target, size=pred.shape[2:], mode='bilinear',
                align_corners=False)
        divergence = nn.functional.kl_div(
            (pred / self.temperature).log_softmax(dim=1),
            (target / self.temperature).log_softmax(dim=1),
            reduction='none', log_target=True).sum(dim=1)
        return self.loss_weight * self.temperature**2 * weighted_mean(
            divergence, weight)
