"""ViTKD: mimic the first blocks, generate the last (arXiv 2209.02432)."""
from typing import Any, Dict, List, Literal, Optional, Sequence

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.models.distillers.feature import FeatureDistiller
from mmsinger.models.distillers.layer_map import map_layers
from mmsinger.models.features.anatomy import Layer
from mmsinger.models.features.tokens import Grid, Tokens
from mmsinger.registry import MODELS
from mmsinger.schema import NonNegative, Share


@MODELS.register_module()
class ViTKDDistiller(FeatureDistiller):
    """ViTKD on the patch tokens of early and late blocks.

    Mimicking: the projected student tokens of the first blocks match the
    teacher's. Generation: of the projected tokens of the last block a random
    half, new in each step, is replaced by a learned token; two convolutions
    on the patch grid have to produce the teacher's tokens there.

    The defaults are those of the method's own code. The variant that the
    SiNGER authors compare with is ``mimic_layers=(0, 2), layer_map=
    'official', reduction='mean', mimic_weight=1., generate_weight=1.``.

    Args:
        mimic_layers (Sequence[int | str]): Teacher blocks to mimic, in
            ascending order. Defaults to ``(0, 1)``.
        generate_layer (int | str): The teacher block to generate, after
            these. Defaults to -1, the last.
        layer_map (str): ``'same'``: blocks of the same index for mimicking,
            of the same relative depth for generation. ``'relative'`` or
            ``'official'``: see :func:`map_layers`. Defaults to ``'same'``.
        reduction (str): ``'sum'``: squared errors summed over tokens and
            channels, a mean over images (and, of the generated ones, divided
            by ``mask_ratio``). ``'mean'``: a mean over all. Defaults to
            ``'sum'``.
        mimic_weight (float): Defaults to 3e-5.
        generate_weight (float): Defaults to 3e-6.
        mask_ratio (float): Share of tokens to generate. Defaults to 0.5.
        **kwargs: See :class:`FeatureDistiller`; not ``layers``, ``loss_kd``.
            ``student_layers`` names a block for each mimicked one and, last,
            for the generated one.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    def __init__(self,
                 mimic_layers: Sequence[Layer] = (0, 1),
                 generate_layer: Layer = -1,
                 layer_map: Literal['same', 'relative', 'official'] = 'same',
                 reduction: Literal['sum', 'mean'] = 'sum',
                 mimic_weight: NonNegative = 3e-5,
                 generate_weight: NonNegative = 3e-6,
                 mask_ratio: Share = 0.5,
                 **kwargs: Any) -> None:
        for key, instead in (
                ('layers', 'mimic_layers and generate_layer'),
                ('loss_kd', 'reduction, mimic_weight and generate_weight')):
            if key in kwargs:
                raise ConfigError(f'model.{key}: ViTKDDistiller has {instead} '
                                  'instead.')
        super().__init__(layers=(*mimic_layers, generate_layer),
                         layer_map=layer_map, **kwargs)
        self.mimic_layers = self.layers[:-1]
        self.generate_layer = self.layers[-1]
        self.reduction = reduction
        self.mimic_weight = mimic_weight
        self.generate_weight = generate_weight
        self.mask_ratio = mask_ratio
        dim = self.teacher.blocks.dim
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.generator = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1))

    def _resolve_student_layers(self, layers: Optional[Sequence[Layer]],
                                layer_map: str) -> List[int]:
        if layers is None and layer_map == 'same':
            layers = (*self.layers[:-1], *map_layers(
                self.layers[-1:], len(self.teacher.blocks),
                len(self.student_features)))
        return super()._resolve_student_layers(layers, layer_map)

    def distill(self, targets: Dict[int, Tokens],
                student_tokens: Dict[int, Tokens]) -> Dict[str, Tensor]:
        """Losses of mimicking and generation, see
        :meth:`FeatureDistiller.distill`."""
        losses = {}
        if self.mimic_layers:
            losses['loss_mimic'] = self.mimic_weight * sum(
                self._mimic(layer, student_tokens[layer], targets[layer])
                for layer in self.mimic_layers)
        layer = self.generate_layer
        losses['loss_generate'] = self.generate_weight * self._generate(
            layer, student_tokens[layer], targets[layer])
        return losses

    def _mimic(self, layer: int, student: Tokens, target: Tokens) -> Tensor:
        student, target = self.compare(layer, student, target)
        return self._error(layer, student.patches, target.patches,
                           target.grid, target.patch_weight)

    def _generate(self, layer: int, student: Tokens, target: Tokens
                  ) -> Tensor:
        student, target = self.compare(layer, student, target)
        patches = student.patches
        masked = hidden = random_mask(patches, self.mask_ratio)
        if student.weight is not None:  # padding is not to be seen either
            hidden = masked | (student.patch_weight == 0)
        patches = torch.where(hidden.unsqueeze(-1), self.mask_token, patches)
        image = patches.transpose(1, 2).unflatten(2, target.grid)
        generated = self.generator(image)  # (B, D, h, w)
        counts = masked.float()
        if target.weight is not None:
            counts = counts * target.patch_weight
        error = self._error(layer, generated.flatten(2).transpose(1, 2),
                            target.patches, target.grid, counts)
        return error / self.mask_ratio if self.reduction == 'sum' else error

    def _error(self, layer: int, pred: Tensor, target: Tensor, grid: Grid,
               weight: Optional[Tensor]) -> Tensor:
        """Squared error of tokens (B, P, D), weighted by (B, P)."""
        if self.records:
            self.record_kd_gradient(layer, pred, target, grid, weight)
        if self.reduction == 'mean':
            return self.loss_kd(pred, target, weight=weight)
        squares = (pred.float() - target.float()).square().sum(dim=-1)
        if weight is not None:
            squares = weight * squares
        return squares.sum() / len(squares)


def random_mask(tokens: Tensor, ratio: float) -> Tensor:
    """Choose a share of each image's tokens, drawn on their device.

    Args:
        tokens (Tensor): Shape (B, P, D).
        ratio (float): How large a share, rounded up to a whole token.

    Returns:
        Tensor: Which tokens, bool, shape (B, P).
    """
    batch, count = tokens.shape[:2]
    noise = torch.rand(batch, count, device=tokens.device)
    kept = int(count * (1 - ratio))
    return noise.argsort(dim=1).argsort(dim=1) >= kept
