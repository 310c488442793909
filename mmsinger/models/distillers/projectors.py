"""What brings a student's tokens to the teacher's width."""
from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS
from mmsinger.schema import Count


@MODELS.register_module()
class LinearProjector(nn.Linear):
    """One linear map; on a feature map, a 1x1 convolution.

    Args:
        in_channels (int): Channels C_S of the student's tokens.
        out_channels (int): Channels D of the teacher's.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)


@MODELS.register_module()
class MLPProjector(nn.Module):
    """Two linear maps with a norm and GELU between them; on a feature map,
    two 1x1 convolutions.

    Args:
        in_channels (int): Channels C_S of the student's tokens.
        out_channels (int): Channels D of the teacher's.
        hidden_channels (int, optional): Defaults to None, ``out_channels``.
        norm_cfg (dict, optional): ``dict(type='LN')``, over channels;
            ``dict(type='BN1d')``, over all tokens of a batch; or None.
            Defaults to ``dict(type='LN')``.

    Raises:
        ConfigError: If ``norm_cfg`` makes no layer that takes tokens.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 hidden_channels: Optional[Count] = None,
                 norm_cfg: Optional[dict] = dict(type='LN')) -> None:
        super().__init__()
        hidden = hidden_channels or out_channels
        self.expand = nn.Linear(in_channels, hidden)
        self.norm = nn.Identity() if norm_cfg is None else \
            token_norm(norm_cfg, hidden)
        self.project = nn.Sequential(nn.GELU(),
                                     nn.Linear(hidden, out_channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (B, N, C_S) to (B, N, D)."""
        hidden = self.expand(tokens)
        return self.project(
            self.norm(hidden.flatten(0, 1)).view_as(hidden))


def token_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """A norm that takes tokens (n, C).

    Args:
        norm_cfg (dict): Its config, as mmcv's ``build_norm_layer`` reads it.
        channels (int): Channels C.

    Returns:
        nn.Module: The layer.

    Raises:
        ConfigError: If it cannot be built, or does not take tokens.
    """
    try:
        norm = build_norm_layer(norm_cfg, channels)[1]
        with torch.no_grad():
            norm.eval()(torch.zeros(2, channels))
        return norm.train()
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError
            ) as error:
        raise ConfigError(
            f'norm_cfg={dict(norm_cfg)!r} makes no norm of tokens of '
            f'{channels} channels ({error or type(error).__name__}). Choose '
            "dict(type='LN'), dict(type='BN1d'), or dict(type='GN', "
            'num_groups=…) with a number that divides them.') from error
