from typing import Literal, Optional

from torch import Tensor, nn

from mmsinger.metrics.norms import outlier_threshold, token_norms
from mmsinger.models.losses.feature_loss import weighted_mean
from mmsinger.registry import MODELS
from mmsinger.schema import NonNegative, Quantile


@MODELS.register_module()
class OutlierSuppressionLoss(nn.Module):
    """L_outlier: pull the largest patch norms down to a quantile (sec. 3.1).

    ``q`` is the alpha-quantile of an image's patch norms, taken as constant;
    the loss is the mean of ``(norm - q)^2`` over the patches above it. Norms
    and quantiles are computed in float32; the mean is a masked one, so that
    shapes do not depend on the data and nothing waits for the device.

    Args:
        quantile (float): alpha in (0, 1). The share of patches above it,
            1 - alpha, should exceed the share of artifacts: the quantile is
            an artifact itself otherwise. Defaults to 0.95.
        loss_weight (float): 0 leaves it out, at no cost. Defaults to 0.01.
        of (str): Whose quantile: that of the ``'refined'`` tokens, the paper,
            which falls with them, so that there are always outliers to pull
            down; or of the ``'teacher'``'s, below which nothing is pulled.
            Defaults to ``'refined'``.

    Raises:
        ConfigError: If the quantile is not in (0, 1).
    """

    def __init__(self, quantile: Quantile = 0.95,
                 loss_weight: NonNegative = 0.01,
                 of: Literal['refined', 'teacher'] = 'refined') -> None:
        super().__init__()
        self.quantile = quantile
        self.of = of
        self.loss_weight = loss_weight

    def forward(self, patches: Tensor, weight: Optional[Tensor] = None,
                original: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            patches (Tensor): Refined patch tokens, shape (B, P, D), without
                CLS or registers.
            weight (Tensor, optional): Of each token, shape (B, P). Those of
                weight 0 are not in the quantile either. Defaults to None,
                all the same.
            original (Tensor, optional): The teacher's tokens, which ``of``
                may ask for, (B, P, D). Defaults to None.

        Returns:
            Tensor: A scalar, times ``loss_weight``; 0 if no norm exceeds its
            quantile.
        """
        if self.loss_weight == 0:
            return patches.new_zeros(())
        norms = token_norms(patches)  # (B, P)
        threshold = outlier_threshold(  # (B, 1)
            norms if self.of == 'refined' else token_norms(original),
            self.quantile, weight)
        above = (norms > threshold).float()
        if weight is not None:
            above = weight * above
        excess = (norms - threshold).clamp(min=0).square()
        return self.loss_weight * weighted_mean(excess, above)
