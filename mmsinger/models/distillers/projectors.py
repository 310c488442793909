"""What brings a student's tokens to the teacher's width."""
from typing import Optional

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

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
    """

    def __init__(self, in_channels: int, out_channels: int,
                 hidden_channels: Optional[Count] = None,
                 norm_cfg: Optional[dict] = dict(type='LN')) -> None:
        super().__init__()
        hidden = hidden_channels or out_channels
        self.expand = nn.Linear(in_channels, hidden)
        self.norm = nn.Identity() if norm_cfg is None else \
            build_norm_layer(norm_cfg, hidden)[1]
        self.project = nn.Sequential(nn.GELU(),
                                     nn.Linear(hidden, out_channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (B, N, C_S) to (B, N, D)."""
        hidden = self.expand(tokens)
        return self.project(
            self.norm(hidden.flatten(0, 1)).view_as(hidden))
