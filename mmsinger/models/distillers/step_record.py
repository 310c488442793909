"""What one training step compared, kept for hooks that measure it."""
from collections import defaultdict
from typing import Dict

from torch import Tensor

from mmsinger.models.features.tokens import Tokens


class StepRecord:
    """Tokens that a step of a :class:`FeatureDistiller` compared.

    A hook puts one into ``distiller.records`` before the step it wants to see
    and takes it out afterwards; any number of hooks may do so. A step without
    a record does no extra work.

    Args:
        max_images (int): How many images to keep, the first of the batch:
            what a measurement costs then does not grow with the batch.
            Defaults to 16.

    Attributes:
        layers (dict[int, dict[str, Tokens]]): By teacher layer:
            ``teacher`` (Tokens), F in the space that ``target_norm`` makes;
            ``refined`` (Tokens), F_hat, of methods with adapters;
            ``student`` (Tokens), its own tokens on its own grid;
            ``kd_gradient`` (Tokens), a norm a token, (B, k, 1), see
            :meth:`FeatureDistiller.record_kd_gradient`.
    """

    def __init__(self, max_images: int = 16) -> None:
        self.max_images = max_images
        self.layers: Dict[int, Dict[str, Tokens]] = defaultdict(dict)

    def add(self, layer: int, **values: Tokens) -> None:
        """Keep copies of values of one layer, without gradients.

        Args:
            layer (int): The teacher layer.
            **values (Tokens): By name.
        """
        for name, value in values.items():
            weight = value.weight
            self.layers[layer][name] = value._replace(
                values=self._copy(value.values),
                weight=None if weight is None else self._copy(weight))

    def _copy(self, value: Tensor) -> Tensor:
        # A view would keep the whole batch alive
        return value.detach()[:self.max_images].clone()
