"""Backbones that mmpretrain has no class for."""
import torch
from mmpretrain.models import VisionTransformer
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS
from mmsinger.schema import Natural


@MODELS.register_module()
class VisionTransformerWithRegisters(VisionTransformer):
    """mmpretrain's VisionTransformer with register tokens.

    "Vision Transformers Need Registers" (arXiv 2309.16588), as in DINOv2's
    ``reg4`` models. Registers are further class tokens: ``cls_token`` holds
    CLS and then the registers, and ``pos_embed`` a row for each of them (zero
    in converted weights: registers have no position). Of the ``out_type``,
    ``'raw'`` gives CLS, registers and patches; the others leave the registers
    out.

    Args:
        num_registers (int): How many. Defaults to 4.
        **kwargs: Of mmpretrain's VisionTransformer.

    Raises:
        ConfigError: If there is no class token to put them after.
    """

    def __init__(self, num_registers: Natural = 4, **kwargs) -> None:
        if not kwargs.get('with_cls_token', True):
            raise ConfigError(
                'VisionTransformerWithRegisters needs a class token: remove '
                'with_cls_token=False.')
        self.num_extra_tokens = 1 + num_registers
        super().__init__(**kwargs)
        self.cls_token = nn.Parameter(
            torch.zeros(1, self.num_extra_tokens, self.embed_dims))
