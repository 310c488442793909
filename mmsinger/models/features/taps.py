"""Reading a vision transformer from outside: its blocks and their outputs.

Works on mmpretrain's VisionTransformer family, mmseg's VisionTransformer and
timm models inside mmpretrain's ``TIMMBackbone``, and on whatever else keeps
its blocks in one list beside a ``patch_embed``. The models are not edited;
every hook is removed again.
"""
import contextlib
import inspect
import re
from typing import (Any, Dict, Iterator, List, NamedTuple, Optional, Sequence,
                    Tuple, Union)

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, near_matches
from mmsinger.models.features.half_gradient import HalfGradient
from mmsinger.models.features.tokens import Grid, Tokens

Layer = Union[int, str]


class Blocks(NamedTuple):
    """Where a backbone keeps its transformer blocks.

    Attributes:
        path (str): Module path of the list, such as ``'layers'``.
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
        block = self.modules[0]
        return next(m.in_features for m in (
            getattr(block, 'ffn', None) or block.mlp).modules()
            if isinstance(m, nn.Linear))


class Pass(NamedTuple):
    """What one block received beside the tokens: rotary embeddings, relative
    position bias, patch resolution, …"""
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]


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
    parent = backbone.get_submodule(path.rpartition('.')[0])
    patch_embed = getattr(parent, 'patch_embed', None)
    if patch_embed is None:
        raise ConfigError(
            f'{owner}: {name} has blocks at {path!r} but no patch_embed '
            'beside them, so their patch grid is not known.')
    return Blocks(path, blocks, patch_embed)


def _is_block(module: nn.Module) -> bool:
    has_ffn = any(isinstance(getattr(module, name, None), nn.Module)
                  for name in ('ffn', 'mlp'))
    return has_ffn and isinstance(getattr(module, 'attn', None), nn.Module)


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


class _StopForward(Exception):
    """Ends a forward pass after the last block that is needed."""


class BlockTaps:
    """Record outputs of transformer blocks during a forward pass.

    A context manager; its hooks live only inside it::

        with BlockTaps(blocks, [17, 18, 23]) as taps:
            taps.run(backbone, images)
        tokens = taps.tokens(17)

    Args:
        blocks (Blocks): Of the backbone.
        layers (Sequence[int]): Indices of the blocks to record.
        stop (bool): End the pass after the deepest of them. Only for a pass
            started by :meth:`run`. Defaults to False.
        dtype (torch.dtype, optional): The precision that the backbone was
            cast to: it is kept under autocast too, and tokens are float32
            outside. Defaults to None: that of the surroundings.
    """

    def __init__(self, blocks: Blocks, layers: Sequence[int],
                 stop: bool = False,
                 dtype: Optional[torch.dtype] = None) -> None:
        self.blocks = blocks
        self.layers = sorted(set(layers))
        self.stop = stop
        self.dtype = dtype
        self._outputs: Dict[int, Tensor] = {}
        self._extras: Dict[int, Pass] = {}
        self._grid: Optional[Grid] = None
        self._handles: List[Any] = []

    def __enter__(self) -> 'BlockTaps':
        self._handles.append(self.blocks.patch_embed.register_forward_hook(
            self._record_grid))
        for layer in self.layers:
            block = self.blocks.modules[layer]
            self._handles.append(block.register_forward_pre_hook(
                self._record_extras(layer), with_kwargs=True))
            self._handles.append(block.register_forward_hook(
                self._record_output(layer)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, backbone: nn.Module, images: Tensor) -> None:
        """Forward images of shape (B, 3, H, W), up to the last tap if
        ``stop`` is set."""
        try:
            with own_precision(images, self.dtype) as images:
                backbone(images, **unmasked(backbone))
        except _StopForward:
            pass

    def tokens(self, layer: int) -> Tokens:
        """The recorded output of a block, before any final norm.

        Args:
            layer (int): Index of the block.

        Returns:
            Tokens: Values of shape (B, N, C).

        Raises:
            ConfigError: If the block's output is not tokens on the grid of
                the patch embedding, or the pass did not reach it.
        """
        where = f'{self.blocks.path}.{layer}'
        if layer not in self._outputs or self._grid is None:
            raise ConfigError(
                f'{where} was not reached by the forward pass. Its backbone '
                'skips it, or does not call its patch_embed.')
        values = self._outputs[layer]
        if self.dtype is not None:
            values = values.float()
        tokens = Tokens(values, self._grid)
        if values.dim() != 3 or tokens.num_prefix < 0:
            raise ConfigError(
                f'{where} gives shape {tuple(values.shape)}; expected tokens '
                f'(B, N, C) with N >= {self._grid[0]} x {self._grid[1]}, the '
                'patch grid. Token dropping and windowed blocks are not '
                'supported.')
        return tokens

    def rerun(self, layer: int, values: Tensor) -> Tensor:
        """Run a recorded block again on other tokens, with the same extra
        arguments that it received in the pass.

        Args:
            layer (int): Index of the block.
            values (Tensor): Its input, shape (B, N, C).

        Returns:
            Tensor: Its output, shape (B, N, C).
        """
        extras = self._extras[layer]
        scale = HalfGradient() if self.dtype is torch.float16 and \
            values.requires_grad and torch.is_grad_enabled() else None
        if scale is not None:
            values = scale.enter(values)
        with own_precision(values, self.dtype) as values:
            output = first_output(self.blocks.modules[layer](
                values, *extras.args, **extras.kwargs))
        if self.dtype is not None:
            output = output.float()
        return output if scale is None else scale.leave(output)

    def with_outputs(self, outputs: Dict[int, Tensor]) -> 'BlockTaps':
        """The record of a like pass over other images.

        Args:
            outputs (dict[int, Tensor]): Block outputs (B, N, C) by index.

        Returns:
            BlockTaps: With the same grid and extra arguments.
        """
        taps = BlockTaps(self.blocks, self.layers, dtype=self.dtype)
        taps._outputs = outputs
        taps._extras, taps._grid = self._extras, self._grid
        return taps

    def _record_grid(self, module: nn.Module, args: tuple, output: Any
                     ) -> None:
        self._grid = patch_grid(module, args[0], output)

    def _record_extras(self, layer: int):

        def hook(module, args, kwargs):
            self._extras[layer] = Pass(args[1:], dict(kwargs))

        return hook

    def _record_output(self, layer: int):

        def hook(module, args, output):
            self._outputs[layer] = first_output(output)
            if self.stop and layer == self.layers[-1]:
                raise _StopForward

        return hook


@contextlib.contextmanager
def own_precision(values: Tensor, dtype: Optional[torch.dtype]
                  ) -> Iterator[Tensor]:
    """Work in another precision than the surroundings.

    Args:
        values (Tensor): What goes in.
        dtype (torch.dtype, optional): The precision; None leaves all as it
            is.

    Yields:
        Tensor: The values in that precision, with autocast off.
    """
    if dtype is None:
        yield values
    else:
        with torch.autocast(values.device.type, enabled=False):
            yield values.to(dtype)


def unmasked(backbone: nn.Module) -> Dict[str, Any]:
    """Arguments of a backbone's forward pass that keep all patches: MAE and
    other masked pre-training backbones mask unless told not to."""
    return dict(mask=None) if 'mask' in inspect.signature(
        backbone.forward).parameters else {}


def first_output(output: Any) -> Tensor:
    """The tokens among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def patch_grid(patch_embed: nn.Module, images: Tensor, output: Any) -> Grid:
    if isinstance(output, (tuple, list)) and len(output) == 2:  # mmcv
        height, width = output[1]
        return int(height), int(width)
    if hasattr(patch_embed, 'dynamic_feat_size'):  # timm
        height, width = patch_embed.dynamic_feat_size(images.shape[-2:])
        return int(height), int(width)
    step = patch_stride(patch_embed)
    return images.shape[-2] // step[0], images.shape[-1] // step[1]


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


def in_channels(patch_embed: nn.Module) -> int:
    """Image channels that a patch embedding takes."""
    return next(m.in_channels for m in patch_embed.modules()
                if isinstance(m, nn.Conv2d))


def fixed_input_size(backbone: nn.Module) -> Optional[Grid]:
    """The only input size (H, W) that a backbone takes, None if it is
    flexible: BEiT's relative position bias and timm's strict patch embedding
    are bound to one size."""
    for module in backbone.modules():
        if hasattr(module, 'relative_position_bias_table') or \
                getattr(module, 'strict_img_size', False):
            break
    else:
        return None
    for module in backbone.modules():
        size = getattr(module, 'img_size', None)
        if size is not None:
            return (size, size) if isinstance(size, int) else tuple(size)
    return None
