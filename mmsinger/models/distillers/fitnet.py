from typing import Dict

from torch import Tensor

from mmsinger.models.distillers.feature import FeatureDistiller
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.features.tokens import Tokens
from mmsinger.registry import MODELS


@MODELS.register_module()
class FitNetDistiller(FeatureDistiller):
    """Plain feature distillation: ``MSE(P_l(F_S), F_l)`` summed over layers.

    The baseline of Table 1 (the official code's "FitViT"): no adapter, so
    that teacher artifacts enter the loss as they are.

    Args:
        **kwargs: See :class:`FeatureDistiller`.
    """

    def distill(self, taps: BlockTaps, student_tokens: Dict[int, Tokens]
                ) -> Dict[str, Tensor]:
        losses = [
            self.kd_loss(layer, student_tokens[layer],
                         self.teacher_tokens(taps, layer))
            for layer in self.layers
        ]
        return dict(loss_kd=sum(losses))
