import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.metrics.norms import outlier_threshold
from mmsinger.registry import MODELS


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

    Raises:
        ConfigError: If the quantile is not in (0, 1).
    """

    def __init__(self, quantile: float = 0.95,
                 loss_weight: float = 0.01) -> None:
        super().__init__()
        if not isinstance(quantile, (int, float)) or not 0 < quantile < 1:
            raise ConfigError(
                f'loss_outlier.quantile={quantile!r} is not valid: give a '
                'number between 0 and 1, both excluded (the paper uses '
                '0.95).')
        self.quantile = quantile
        self.loss_weight = loss_weight

    def forward(self, patches: Tensor) -> Tensor:
        """
        Args:
            patches (Tensor): Refined patch tokens, shape (B, P, D), without
                CLS or registers.

        Returns:
            Tensor: A scalar, times ``loss_weight``; 0 if no norm exceeds its
            quantile.
        """
        if self.loss_weight == 0:
            return patches.new_zeros(())
        norms = torch.linalg.vector_norm(patches.float(), dim=-1)  # (B, P)
        threshold = outlier_threshold(norms, self.quantile)  # (B, 1)
        excess = (norms - threshold).clamp(min=0)
        count = (norms > threshold).sum().clamp(min=1)
        return self.loss_weight * (excess.square().sum() / count)
