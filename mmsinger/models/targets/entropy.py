"""Images of which the teacher is unsure count less."""
import math
from collections import OrderedDict
from typing import Annotated, Dict, List, Literal, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, near_matches
from mmsinger.models.targets.step import Targets, TargetStep, TeacherOutputs
from mmsinger.registry import MODELS
from mmsinger.schema import Range, Share


@MODELS.register_module()
class WeighByEntropy(TargetStep):
    """Images of which the teacher is unsure count less in what follows.

    The paper leaves open what to do about the long tail, where the student
    inherits the teacher's uncertainty. Here the tokens of an image weigh
    ``1 - strength * H / log K`` in L_KD and in the losses, means and
    quantiles of later steps, with H the entropy of what the teacher's own
    head predicts for it. Put it before :class:`Refine` for L_outlier to know
    the weights. Not from the paper; figures in docs/evidence.md.

    Args:
        head (str): Key of the head's linear layer (or 1 x 1 convolution) in
            the teacher's checkpoint, without ``.weight``:
            ``'head.layers.head'``, ``'decode_head.conv_seg'``.
        num_classes (int): Its classes K, at least 2.
        norm (str): Key of the backbone's final norm there. Defaults to
            ``'backbone.ln1'``.
        tokens (str): What the head reads: ``'cls'``, or ``'patches'``, where
            H is the mean over patches that are no padding. Defaults to
            ``'cls'``.
        strength (float): In (0, 1]; 1 gives an image with a uniform
            prediction no weight. Defaults to 1.0.

    Raises:
        ConfigError: If a value is not valid, or the checkpoint has no such
            layer.
    """

    start_only = ('head', 'norm')
    keeps_values = True

    def __init__(self,
                 head: str,
                 num_classes: Annotated[int, Range(2)],
                 norm: str = 'backbone.ln1',
                 tokens: Literal['cls', 'patches'] = 'cls',
                 strength: Share = 1.0) -> None:
        super().__init__()
        self.head = head
        self.num_classes = num_classes
        self.norm = norm
        self.tokens = tokens
        self.strength = strength

    def prepare(self, teacher: nn.Module, layers: List[int]) -> None:
        """Make room for the head, see :meth:`TargetStep.prepare`."""
        self.last = len(teacher.blocks) - 1
        if self.tokens == 'cls' and not teacher.blocks.has_cls:
            raise ConfigError("tokens='cls': the teacher has no class token. "
                              "Set tokens='patches'.")
        dim = teacher.blocks.dim
        self.readout = nn.Sequential(OrderedDict(
            norm=nn.LayerNorm(dim, eps=1e-6),
            linear=nn.Linear(dim, self.num_classes))).requires_grad_(False)

    def extra_layers(self, layers: Sequence[int]) -> List[int]:
        """The final block, which the head reads."""
        return [self.last]

    def init_weights(self, teacher: nn.Module) -> None:
        """Take the head from the teacher's checkpoint.

        Raises:
            ConfigError: If it is not there, or of another shape.
        """
        if teacher.checkpoint is None:
            raise ConfigError(
                f'{self.place}.head={self.head!r}: the teacher has no '
                'checkpoint to take its head from. Set teacher.checkpoint.')
        weights = teacher.read_checkpoint('model.teacher.checkpoint')
        for option, key, layer in (('norm', self.norm, self.readout.norm),
                                   ('head', self.head, self.readout.linear)):
            for name, own in layer.named_parameters():
                found = weights.get(f'{key}.{name}')
                place = f'{self.place}.{option}={key!r}: '
                if found is None:
                    layers = {k.rpartition('.')[0] for k in weights}
                    raise ConfigError(
                        f'{place}no {key}.{name} in {teacher.checkpoint!r}.'
                        f'{near_matches(key, layers)} Outside of the blocks '
                        'it has ' + ', '.join(sorted(
                            k for k in layers
                            if not any(c.isdigit() for c in k))) + '.')
                if found.numel() != own.numel():
                    raise ConfigError(
                        f'{place}{key}.{name} in {teacher.checkpoint!r} has '
                        f'the shape {tuple(found.shape)}, expected '
                        f'{tuple(own.shape)}. Set num_classes and the key to '
                        'what the head has.')
                own.data.copy_(found.view_as(own))

    def forward(self, targets: Targets, outputs: TeacherOutputs
                ) -> Tuple[Targets, Dict[str, Tensor]]:
        """Weigh all layers, see :meth:`TargetStep.forward`."""
        weight = self.image_weights(outputs)
        return {layer: tokens.weighed_by_image(weight)
                for layer, tokens in targets.items()}, {}

    @torch.no_grad()
    def image_weights(self, outputs: TeacherOutputs) -> Tensor:
        """``1 - strength * H / log K``, shape (B, ), float32."""
        tokens = outputs.taps.tokens(self.last)
        if outputs.padding is not None:
            tokens = outputs.padding.weigh(tokens)
        read = tokens.prefix[:, :1] if self.tokens == 'cls' \
            else tokens.patches
        log_p = self.readout(read.float()).log_softmax(dim=-1)  # (B, n, K)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)  # (B, n)
        if self.tokens == 'patches' and tokens.weight is not None:
            share = tokens.patch_weight
            entropy = (share * entropy).sum(dim=1) / share.sum(
                dim=1).clamp(min=1e-6)
        else:
            entropy = entropy.mean(dim=1)
        certainty = 1 - self.strength * entropy / math.log(self.num_classes)
        return certainty.clamp(min=0)  # by rounding it may be below

