"""The config of the mmpretrain backbone that converted weights belong to."""
import re
from typing import Dict, Optional, Tuple, Union

from mmengine.utils import to_2tuple
from mmpretrain.models import VisionTransformer
from torch import Tensor

from mmsinger.converters.positions import split_positions
from mmsinger.errors import ConfigError, check_choice
from mmsinger.models.features.tokens import Grid

ACTIVATIONS = {'gelu': 'GELU', 'quickgelu': 'mmpretrain.QuickGELU'}

# Channels -> attention heads of the published models. Shapes do not tell.
HEADS = {
    192: 3, 256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 896: 14, 1024: 16,
    1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16
}


def describe(named: Dict[str, Tensor], prefix: Tuple[int, ...],
             arch: Optional[str] = None, num_heads: Optional[int] = None,
             act: Optional[str] = None,
             img_size: Union[int, Grid, None] = None,
             known: Optional[dict] = None) -> dict:
    """Config of the backbone, from the names and shapes of its weights.

    Args:
        named (dict[str, Tensor]): Weights by mmpretrain's names; registers
            as ``register_tokens``.
        prefix (tuple[int, ...]): How many rows of ``pos_embed`` may belong
            to class and register tokens.
        arch (str, optional): A name that mmpretrain's VisionTransformer
            knows; must agree with the shapes. Defaults to None.
        num_heads (int, optional): Attention heads. Defaults to None: the
            arch's, or those of the published models of this width.
        act (str, optional): ``'gelu'`` or ``'quickgelu'``. Defaults to None:
            GELU, but CLIP's towers need an answer.
        img_size (int | tuple[int, int], optional): (H, W) to make it for.
            Defaults to None, the source's.
        known (dict, optional): What the config has in any case. Defaults to
            None.

    Returns:
        dict: For ``teacher.backbone``.

    Raises:
        ConfigError: If the weights are no complete vision transformer, or
            an argument is missing or does not fit them.
    """
    known = known or {}
    if 'cls_token' not in named and known.get('with_cls_token', True):
        raise ConfigError(
            'The file has no class token. Models without one differ in more '
            'than weights tell: attention heads, activation, post-norm. If '
            "its blocks are those of mmpretrain's VisionTransformer, write "
            'its backbone with with_cls_token=False into a config, and name '
            'that with --config.')
    kernel = _need(named, 'patch_embed.projection.weight')
    patch = kernel.shape[-2:] if kernel.dim() == 4 else None
    if patch is None or patch[0] != patch[1]:
        raise ConfigError(
            'The patch embedding has shape '
            f'{tuple(kernel.shape)}; expected (C, channels, p, p).')
    cfg = dict(type='mmpretrain.VisionTransformer')
    cfg['arch'] = _arch(named, kernel.shape[0], arch, num_heads)
    cfg['img_size'] = _image_size(named, prefix, patch[0], img_size)
    cfg['patch_size'] = int(patch[0])
    if 'register_tokens' in named:
        cfg['type'] = 'mmsinger.VisionTransformerWithRegisters'
        cfg['num_registers'] = named['register_tokens'].shape[1]
    if kernel.shape[1] != 3:
        cfg['in_channels'] = kernel.shape[1]
    pre_norm = 'pre_norm.weight' in named
    if pre_norm:
        cfg.update(pre_norm=True, norm_cfg=dict(type='LN', eps=1e-5))
    if ('patch_embed.projection.bias' in named) == pre_norm:
        cfg['patch_cfg'] = dict(bias=pre_norm)
    if 'layers.0.attn.qkv.bias' not in named:
        cfg['qkv_bias'] = False
    if 'layers.0.attn.gamma1.weight' in named:
        cfg['layer_scale_init_value'] = 1e-5
    if 'ln1.weight' not in named:
        cfg['final_norm'] = False
    layer = {}
    if 'layers.0.ffn.w12.weight' in named:
        layer['ffn_type'] = 'swiglu_fused'
        act = act or 'gelu'  # not used: SwiGLU has its own
    if act is None and pre_norm:
        raise ConfigError(
            'The file is a CLIP tower (norm_pre), and weights do not tell '
            "its activation. Choose --act quickgelu (OpenAI's, MetaCLIP's "
            "and DFN's weights) or --act gelu (LAION's, DataComp's).")
    check_choice('--act', act or 'gelu', ACTIVATIONS)
    if act == 'quickgelu':
        layer['act_cfg'] = dict(type=ACTIVATIONS[act])
    if layer:
        cfg['layer_cfgs'] = layer
    return dict(cfg, out_type='raw', **known)


def _need(named: Dict[str, Tensor], key: str) -> Tensor:
    if key not in named:
        raise ConfigError(f'The file has nothing for {key!r}: it is '
                          'incomplete, or no vision transformer.')
    return named[key]


def _arch(named: Dict[str, Tensor], dims: int, arch: Optional[str],
          num_heads: Optional[int]) -> Union[str, dict]:
    """mmpretrain's name of the architecture, or its sizes."""
    depth = 1 + max((int(m.group(1)) for m in (
        re.match(r'layers\.(\d+)\.', key) for key in named) if m), default=-1)
    zoo = VisionTransformer.arch_zoo
    if arch is not None:
        check_choice('--arch', arch, zoo)
        if num_heads not in (None, zoo[arch]['num_heads']):
            raise ConfigError(f'--num-heads={num_heads} is not that of '
                              f'--arch={arch!r}: {zoo[arch]["num_heads"]}.')
        num_heads = zoo[arch]['num_heads']
    num_heads = num_heads or HEADS.get(dims)
    if num_heads is None or dims % num_heads:
        given = f', and {num_heads} do not divide them' if num_heads else ''
        raise ConfigError(
            f'Weights of {dims} channels do not tell the number of attention '
            f"heads{given}. Set --num-heads to the source model's.")
    sizes = dict(embed_dims=dims, num_layers=depth, num_heads=num_heads,
                 feedforward_channels=_feedforward(named))
    if arch is not None and sizes != zoo[arch]:
        raise ConfigError(f'--arch={arch!r} is {zoo[arch]}, but the file has '
                          f'{sizes}.')
    return arch or next((name for name, known in zoo.items()
                         if known == sizes), sizes)


def _feedforward(named: Dict[str, Tensor]) -> int:
    if 'layers.0.ffn.w3.weight' not in named:
        return _need(named, 'layers.0.ffn.layers.0.0.weight').shape[0]
    hidden = named['layers.0.ffn.w3.weight'].shape[1]
    if hidden % 8:
        raise ConfigError(f'The SwiGLU FFN has {hidden} hidden channels; '
                          "mmpretrain's are multiples of 8.")
    return hidden * 3 // 2  # of which mmpretrain takes two thirds


def _image_size(named: Dict[str, Tensor], prefix: Tuple[int, ...],
                patch: int, img_size: Union[int, Grid, None]
                ) -> Union[int, Grid]:
    if img_size is None:
        _, _, grid = split_positions(_need(named, 'pos_embed'), prefix)
        img_size = (grid[0] * patch, grid[1] * patch)
    img_size = to_2tuple(img_size)
    if any(side <= 0 or side % patch for side in img_size):
        raise ConfigError(f'--img-size={img_size}: both sides must be '
                          f'multiples of the patch size, {patch}.')
    height, width = img_size
    return height if height == width else (height, width)
