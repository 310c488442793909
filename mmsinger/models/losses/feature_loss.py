from typing import Optional

from torch import Tensor, nn

from mmsinger.registry import MODELS


@MODELS.register_module()
class FeatureMSELoss(nn.Module):
    """L_KD: mean squared error between two sets of tokens (section 3.1).

    Computed in float32, also under autocast. The gradient reaches both
    arguments: in SiNGER the target depends on the adapter.

    Args:
        loss_weight (float): Defaults to 1.0.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

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
        if weight is None:
            error = nn.functional.mse_loss(pred.float(), target.float())
        else:
            squares = (pred.float() - target.float()).square().mean(dim=-1)
            error = (weight * squares).sum() / weight.sum().clamp(min=1e-6)
        return self.loss_weight * error
