"""A frozen backbone as the backbone of a stock model with a linear head."""
from typing import Dict, Literal, Optional, Sequence, Tuple, Union

import torch
from mmengine.model import BaseModule
from torch import Tensor

from mmsinger.checkpoint import STUDENT, student_state_dict
from mmsinger.errors import ConfigError
from mmsinger.models.features.anatomy import (Layer, find_features,
                                              resolve_layer)
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.teachers.frozen import FrozenTeacher, Normalisation
from mmsinger.registry import MODELS
from mmsinger.schema import Count

Output = Literal['cls_token', 'mean_patch', 'featmap', 'featmap_cls']


@MODELS.register_module()
class FrozenBackbone(FrozenTeacher, BaseModule):
    """A pretrained backbone that a head is trained on, and that never
    changes.

    It gives the output of one block before any final norm, or one map of a
    backbone that is no plain vision transformer, without gradients and in
    evaluation mode. Its parameters are in the state dict, so that a
    checkpoint of a linear evaluation is complete.

    Args:
        backbone (dict): Config of the backbone alone, see
            :class:`FrozenTeacher`.
        checkpoint (str, optional): Its weights: a plain checkpoint, a
            ``*_student.pth`` of a distillation, or a distiller's training
            checkpoint, whose student is taken. None leaves them random, with
            a warning: for tests only. Defaults to None.
        prefix (str): What the backbone's keys begin with in the checkpoint;
            keys without it (heads) are passed over. Defaults to
            ``'backbone.'``.
        ignore_keys (Sequence[str]): Prefixes of keys, after ``prefix``, that
            the checkpoint may hold beside the backbone. Defaults to none.
        input_size (int | tuple[int, int], optional): Resize images to this
            (H, W). Defaults to None: the images' size, or the only one that
            the backbone takes; sizes that its patches do not divide are
            rounded to the nearest that they do.
        layer (int | str): The block or map, by index or module path.
            Defaults to -1, the last.
        output (str): What the head gets: ``'cls_token'`` or ``'mean_patch'``
            of shape (B, C); ``'featmap'``, the patch tokens (B, C, h, w); or
            ``'featmap_cls'``, these with the CLS token concatenated to each
            (B, 2C, h, w). Defaults to ``'cls_token'``.

    Raises:
        ConfigError: If a value is not valid or the backbone shows no feature
            map.
    """

    role = 'backbone'
    find_features = staticmethod(find_features)

    def __init__(self,
                 backbone: Optional[dict],
                 checkpoint: Optional[str] = None,
                 prefix: str = 'backbone.',
                 ignore_keys: Union[str, Sequence[str]] = (),
                 input_size: Union[Count, Tuple[Count, Count], None] = None,
                 layer: Layer = -1,
                 output: Output = 'cls_token') -> None:
        if backbone is None:
            raise ConfigError(
                'model.backbone.backbone is not set: a linear evaluation '
                'needs a backbone to evaluate. Start it with python '
                'tools/linear_eval.py TASK_CONFIG SOURCE_CONFIG CHECKPOINT, '
                'or set model.backbone.backbone and '
                'model.backbone.checkpoint.')
        super().__init__(
            backbone, checkpoint=checkpoint, prefix=prefix,
            ignore_keys=ignore_keys, input_size=input_size)
        self.layer = resolve_layer(layer, self.blocks, 'model.backbone.layer')
        self.output = output

    @property
    def out_channels(self) -> int:
        """Channels of what the head gets."""
        width = self.blocks.channels[self.layer]
        return 2 * width if self.output == 'featmap_cls' else width

    def init_weights(self) -> None:
        """Load the checkpoint; called by the runner before training."""
        self.load_weights()

    def read_checkpoint(self, key: str) -> Dict[str, Tensor]:
        """See :meth:`FrozenTeacher.read_checkpoint`; of a distiller's
        checkpoint the student alone."""
        weights = super().read_checkpoint(key)
        if self.prefix.startswith(STUDENT):
            return weights
        return student_state_dict(weights) or weights

    def _loading_hint(self, found: dict) -> str:
        return ('To tools/linear_eval.py, give the SOURCE_CONFIG that the '
                f'checkpoint was made with. {super()._loading_hint(found)}')

    def forward(self, inputs: Union[Tensor, Tuple[Tensor]]) -> Tuple[Tensor]:
        """What the head gets, without gradients.

        Args:
            inputs (Tensor | tuple[Tensor]): Preprocessed images
                (B, 3, H, W), or what this returned for them earlier.

        Returns:
            tuple[Tensor]: One tensor, see ``output``.
        """
        if isinstance(inputs, tuple):
            return inputs
        taps = super().forward(inputs, [self.layer], Normalisation())
        return (form_output(taps.tokens(self.layer), self.output), )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Weights may come with a checkpoint of the whole model, too.
        self.loaded |= any(key.startswith(prefix) for key in state_dict)


def form_output(tokens: Tokens, output: str) -> Tensor:
    """Tokens of a block in the form that a head takes.

    Args:
        tokens (Tokens): Values of shape (B, N, C).
        output (str): See :class:`FrozenBackbone`.

    Returns:
        Tensor: Of shape (B, C), (B, C, h, w) or (B, 2C, h, w).

    Raises:
        ConfigError: If it takes a CLS token and there is none.
    """
    has_cls = tokens.num_prefix and tokens.has_cls
    if output in ('cls_token', 'featmap_cls') and not has_cls:
        raise ConfigError(
            f'model.backbone.output={output!r}: the backbone has no CLS '
            'token. Take a task of patch tokens (cls_mean_*, depth_patch_* '
            "in configs/linear_eval), or set 'mean_patch' for classification "
            "or 'featmap' for dense tasks (and halve "
            "decode_head.in_channels after 'featmap_cls').")
    if output == 'cls_token':
        return tokens.prefix[:, 0]
    if output == 'mean_patch':
        return tokens.patches.mean(dim=1)
    patches = tokens.patches
    if output == 'featmap_cls':
        cls_token = tokens.prefix[:, :1].expand_as(patches)
        patches = torch.cat([patches, cls_token], dim=2)
    return patches.transpose(1, 2).unflatten(2, tokens.grid)
