"""A convolutional stem in place of the patch embedding's one convolution."""
from typing import Tuple, Union

from mmcv.cnn import build_norm_layer
from mmengine.utils import to_2tuple
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS


@MODELS.register_module()
class ConvStem(nn.Sequential):
    """3x3 convolutions of stride 2 down to the patch grid, then a 1x1 one:
    (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride).

    Takes a convolution's arguments, so that mmcv's ``PatchEmbed`` and the
    vision transformers on it use it by name::

        backbone = dict(type='mmpretrain.VisionTransformer', patch_size=4,
                        patch_cfg=dict(conv_type='mmsinger.ConvStem'), ...)

    After "Early Convolutions Help Transformers See Better"
    (arXiv 2106.14881); the width doubles with each convolution and ends at
    ``out_channels``. Input sides that are no multiple of the stride are
    padded by ``PatchEmbed``.

    Args:
        in_channels (int): Channels of the image.
        out_channels (int): Channels of the tokens.
        kernel_size (int | tuple[int, int]): Patch size in pixels.
        stride (int | tuple[int, int]): The same as ``kernel_size``, a power
            of two.
        padding (int | tuple[int, int]): Must be 0. Defaults to 0.
        dilation (int | tuple[int, int]): Must be 1. Defaults to 1.
        bias (bool): Whether the 1x1 convolution has a bias. Defaults to True.
        norm_cfg (dict): Normalisation after each 3x3 convolution. Defaults
            to ``dict(type='BN')``.

    Raises:
        ConfigError: If the arguments describe no such stem.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size: Union[int, Tuple[int, int]],
                 stride: Union[int, Tuple[int, int]],
                 padding: Union[int, Tuple[int, int]] = 0,
                 dilation: Union[int, Tuple[int, int]] = 1,
                 bias: bool = True,
                 norm_cfg: dict = dict(type='BN')) -> None:
        patch = to_2tuple(kernel_size)
        depth = patch[0].bit_length() - 1
        if not (patch[0] == patch[1] == 2**depth > 1):
            raise ConfigError(
                f'patch_size={kernel_size!r}: ConvStem halves the image step '
                'by step, so the patch must be square with a side of 2, 4, '
                "8, 16 or 32. Choose one, or conv_type='Conv2d'.")
        for key, value, needed in (('stride', stride, patch),
                                   ('padding', padding, (0, 0)),
                                   ('dilation', dilation, (1, 1))):
            if to_2tuple(value) != needed:
                raise ConfigError(f'patch_cfg.{key}={value!r}: ConvStem needs '
                                  f'{needed}. Leave the key out.')
        layers = []
        for step in reversed(range(depth)):
            channels = max(out_channels >> step, 8)
            layers += [
                nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False),
                build_norm_layer(norm_cfg, channels)[1],
                nn.GELU(),
            ]
            in_channels = channels
        layers.append(nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        super().__init__(*layers)
