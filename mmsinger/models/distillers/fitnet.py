from typing import Any, Dict, Literal

from torch import Tensor

from mmsinger.models.distillers.feature import FeatureDistiller
from mmsinger.models.features.tokens import Tokens
from mmsinger.registry import MODELS


@MODELS.register_module()
class FitNetDistiller(FeatureDistiller):
    """Plain feature distillation: ``MSE(P_l(F_S), F_l)`` over layers.

    The baseline of Table 1 (the official code's "FitViT"). Without steps in
    ``targets``, teacher artifacts enter the loss as they are.

    Args:
        over_layers (str): ``'sum'`` or ``'mean'`` of the layers' losses.
            Defaults to ``'sum'``.
        **kwargs: See :class:`FeatureDistiller`.
    """

    def __init__(self, over_layers: Literal['sum', 'mean'] = 'sum',
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.over_layers = over_layers

    def distill(self, targets: Dict[int, Tokens],
                student_tokens: Dict[int, Tokens]) -> Dict[str, Tensor]:
        """L_KD, see :meth:`FeatureDistiller.distill`."""
        total = sum(self.kd_loss(layer, student_tokens[layer], target)
                    for layer, target in targets.items())
        if self.over_layers == 'mean':
            total = total / len(targets)
        return dict(loss_kd=total)
