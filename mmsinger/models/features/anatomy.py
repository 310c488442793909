"""What a backbone is made of: the only place that knows names inside one.

Works on mmpretrain's VisionTransformer family, mmseg's VisionTransformer and
timm models inside mmpretrain's ``TIMMBackbone``, and on whatever else keeps
its blocks in one list beside a patch embedding. A backbone that calls its
parts otherwise needs an entry in :data:`NAMES`, and nothing else.
"""
import inspect
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, near_matches

Layer = Union[int, str]
Grid = Tuple[int, int]

# What the parts are called, as dotted paths; the first that is there counts.
NAMES: Dict[str, List[str]] = dict(
    patch_embed=['patch_embed'],  # beside the list of blocks, or above it
    # in a block
    attention=['attn'],
    ffn=['ffn', 'mlp'],
    ffn_norm=['ln2', 'norm2'],
    layer_scale=['gamma_2', 'ls2', 'ffn.gamma2'],
)

# Gated FFNs, output(act(gate(x)) * value(x)): where gate and value are (one
# layer holds both, one after the other) and where the output is.
GATED_FFNS = (
    (('w12', ), 'w3'),  # mmpretrain's SwiGLUFFN
    (('w1', 'w2'), 'w3'),  # DINOv2's own
    (('fc1_g', 'fc1_x'), 'fc2'),  # timm's SwiGLU
)


def find_part(module: nn.Module, part: str) -> Any:
    """A part of a module, whatever it is called there.

    Args:
        module (nn.Module): A block, or what holds the list of blocks.
        part (str): A key of :data:`NAMES`.

    Returns:
        The module or tensor; None if there is none.
    """
    for name in NAMES[part]:
        found: Any = module
        for attribute in name.split('.'):
            found = getattr(found, attribute, None)
        if isinstance(found, (nn.Module, Tensor)):
            return found
    return None


class Blocks(NamedTuple):
    """The transformer blocks of a backbone.

    Attributes:
        path (str): Module path of their list, such as ``'layers'``.
        modules (list[nn.Module]): The blocks, first to last.
        patch_embed (nn.Module): The patch embedding in front of them.
    """
    path: str
    modules: List[nn.Module]
    patch_embed: nn.Module

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def dim(self) -> int:
        """Channels of the tokens."""
        return next(m.in_features for m in find_part(
            self.modules[0], 'ffn').modules() if isinstance(m, nn.Linear))

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return next(m.in_channels for m in self.patch_embed.modules()
                    if isinstance(m, nn.Conv2d))

    @property
    def stride(self) -> Grid:
        """Pixels between neighbouring patches, (rows, columns)."""
        return patch_stride(self.patch_embed)


def find_blocks(backbone: nn.Module, owner: str) -> Blocks:
    """Find the transformer blocks of a backbone.

    Args:
        backbone (nn.Module): The backbone.
        owner (str): ``'teacher'`` or ``'student'``, for error messages.

    Returns:
        Blocks: Its blocks.

    Raises:
        ConfigError: If it is no plain vision transformer: no list of blocks
            with an attention and an FFN, or several (a pyramid).
    """
    lists = {
        path: list(module)
        for path, module in backbone.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
        and all(_is_block(block) for block in module)
    }
    name = type(backbone).__name__
    if not lists:
        raise ConfigError(
            f'{owner}: {name} is no vision transformer that mmsinger can '
            'read: it has no list of blocks with an attention and an FFN. '
            "Supported are mmpretrain's VisionTransformer family, mmseg's "
            "VisionTransformer, and timm ViTs in mmpretrain.TIMMBackbone. "
            f'Its modules are {[n for n, _ in backbone.named_children()]}.')
    if len(lists) > 1:
        raise ConfigError(
            f'{owner}: {name} has several lists of blocks, {list(lists)}: a '
            'pyramid such as Swin or PVT. mmsinger needs a plain vision '
            'transformer, whose blocks all have the same grid and width.')
    (path, blocks), = lists.items()
    parent, patch_embed = path, None
    while parent and patch_embed is None:
        parent = parent.rpartition('.')[0]
        patch_embed = find_part(backbone.get_submodule(parent), 'patch_embed')
    if patch_embed is None:
        raise ConfigError(
            f'{owner}: {name} has blocks at {path!r} but no patch_embed '
            'beside or above them, so their patch grid is not known.')
    return Blocks(path, blocks, patch_embed)


def _is_block(module: nn.Module) -> bool:
    return isinstance(find_part(module, 'ffn'), nn.Module) and \
        isinstance(find_part(module, 'attention'), nn.Module)


def resolve_layer(layer: Layer, blocks: Blocks, key: str) -> int:
    """The index of a block from an index or a module path.

    Args:
        layer (int | str): 17, -1, or ``'layers.17'``.
        blocks (Blocks): The blocks to choose from.
        key (str): The config key, for error messages.

    Returns:
        int: In [0, number of blocks).

    Raises:
        ConfigError: If there is no such block; near matches are listed.
    """
    depth = len(blocks)
    if isinstance(layer, int) and not isinstance(layer, bool):
        if not -depth <= layer < depth:
            raise ConfigError(
                f'{key}={layer} is out of range: there are {depth} blocks, '
                f'so choose from 0 to {depth - 1} (or -{depth} to -1).')
        return layer % depth
    path, *paths = [  # a wrapper's blocks are below another backbone
        re.sub(r'^(student\.)?(backbone\.)*', '', p) for p in (
            str(layer), *(f'{blocks.path}.{i}' for i in range(depth)))]
    if path not in paths:
        raise ConfigError(
            f'{key}={layer!r}: no such block. The blocks are {paths[0]!r} to '
            f'{paths[-1]!r}; an index is fine too.'
            f'{near_matches(path, paths)}')
    return paths.index(path)


def ffn_weights(block: nn.Module) -> Tuple[List[Tensor], Tensor]:
    """The matrices of a block's FFN.

    Args:
        block (nn.Module): A transformer block.

    Returns:
        tuple[list[Tensor], Tensor]: One branch (H, D) of an MLP, or gate and
        value of a gated FFN; and the output matrix (D, H). Float64, on the
        CPU.

    Raises:
        ConfigError: If there is no FFN, or it is of an unknown kind.
    """
    ffn = find_part(block, 'ffn')
    if ffn is None:
        children = [name for name, _ in block.named_children()]
        raise ConfigError(
            f'A {type(block).__name__} has no FFN that SiNGER can linearise: '
            f'expected a module called {" or ".join(NAMES["ffn"])}, it has '
            f"{children}. Supported are mmpretrain's and mmseg's transformer "
            "layers and timm's blocks.")

    def precise(linear: nn.Module) -> Tensor:
        return linear.weight.detach().cpu().double()

    for branches, output in GATED_FFNS:
        if all(hasattr(ffn, name) for name in (*branches, output)):
            weights = [precise(getattr(ffn, name)) for name in branches]
            if len(weights) == 1:
                weights = list(weights[0].chunk(2))
            return weights, precise(getattr(ffn, output))
    weights = [precise(m) for m in ffn.modules() if isinstance(m, nn.Linear)]
    if len(weights) == 2 and \
            weights[0].shape[0] == 2 * weights[1].shape[1]:  # timm's GluMlp
        return list(weights[0].chunk(2)), weights[1]
    fits = len(weights) >= 2 and all(
        a.shape[0] == b.shape[1] for a, b in zip(weights, weights[1:]))
    if not fits or weights[0].shape[1] != weights[-1].shape[0]:
        raise ConfigError(
            f'The FFN {type(ffn).__name__} of a {type(block).__name__} is of '
            'an unknown kind: its linear layers have shapes '
            f'{[tuple(w.shape) for w in weights]}. Supported are MLPs '
            'D -> H -> D and SwiGLU.')
    hidden = weights[0]
    for weight in weights[1:-1]:
        hidden = weight @ hidden
    return [hidden], weights[-1]


def layer_scale(block: nn.Module) -> Optional[Tensor]:
    """The LayerScale after a block's FFN, shape (D, ) or (1, ); None if there
    is none."""
    scale = find_part(block, 'layer_scale')
    if scale is None or isinstance(scale, Tensor):  # a bare parameter in BEiT
        return scale
    return next((value for value in (
        getattr(scale, name, None) for name in ('gamma', 'weight', 'scale'))
        if isinstance(value, Tensor)), None)


def unmasked(backbone: nn.Module) -> Dict[str, Any]:
    """Arguments of a backbone's forward pass that keep all patches: MAE and
    other masked pre-training backbones mask unless told not to."""
    return dict(mask=None) if 'mask' in inspect.signature(
        backbone.forward).parameters else {}


def patch_grid(patch_embed: nn.Module, images: Tensor, output: Any) -> Grid:
    """Rows and columns of patches.

    Args:
        patch_embed (nn.Module): The patch embedding.
        images (Tensor): What it was given, (B, 3, H, W).
        output: What it returned for them.

    Returns:
        tuple[int, int]: h and w.
    """
    if isinstance(output, (tuple, list)) and len(output) == 2:  # mmcv
        height, width = output[1]
    elif hasattr(patch_embed, 'dynamic_feat_size'):  # timm
        height, width = patch_embed.dynamic_feat_size(images.shape[-2:])
    else:
        height, width = (length // step for length, step in zip(
            images.shape[-2:], patch_stride(patch_embed)))
    return int(height), int(width)


def patch_stride(patch_embed: nn.Module) -> Grid:
    """Pixels between neighbouring patches, (rows, columns)."""
    convs = [m for m in patch_embed.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        raise ConfigError(
            f'{type(patch_embed).__name__} has no convolution, so its patch '
            'size is not known.')
    rows = columns = 1
    for conv in convs:
        rows, columns = rows * conv.stride[0], columns * conv.stride[1]
    return rows, columns


def fixed_input_size(backbone: nn.Module) -> Optional[Grid]:
    """The only input size (H, W) that a backbone takes, None if it is
    flexible: BEiT's relative position bias and timm's strict patch embedding
    are bound to one size."""
    if not any(hasattr(module, 'relative_position_bias_table')
               or getattr(module, 'strict_img_size', False)
               for module in backbone.modules()):
        return None
    for module in backbone.modules():
        size = getattr(module, 'img_size', None)
        if size is not None:
            return (size, size) if isinstance(size, int) else tuple(size)
    return None


def example_images(blocks: Blocks, backbone: nn.Module) -> Tensor:
    """A random image, as small as a backbone takes it, (1, C, H, W)."""
    size = fixed_input_size(backbone) or tuple(
        2 * step for step in blocks.stride)
    return torch.randn(1, blocks.in_channels, *size)
