"""What a backbone is made of: the only place that knows names inside one.

A plain vision transformer shows its :class:`Blocks`: mmpretrain's
VisionTransformer family, mmseg's VisionTransformer, timm models inside
mmpretrain's ``TIMMBackbone``, and whatever else keeps its blocks in one list
beside a patch embedding. Every other backbone shows :class:`Maps`: its stages,
or what it returns. One that calls its parts otherwise needs an entry in
:data:`NAMES`, and nothing else.
"""
import contextlib
import copy
import dataclasses
import inspect
import re
import sys
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Tuple,
                    Union)

import torch
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from mmsinger.errors import ConfigError, near_matches
from mmsinger.models.features.tokens import Grid, Tokens

Layer = Union[int, str]

# What the parts are called, as dotted paths; the first that is there counts.
NAMES: Dict[str, List[str]] = dict(
    backbone=['backbone', 'image_encoder.backbone', 'image_encoder.0'],
    head=['decode_head', 'head'],
    patch_embed=['patch_embed'],  # beside the list of blocks, or above it
    cls_token=['cls_token'],
    # in a block
    attention=['attn'],
    ffn=['ffn', 'mlp'],
    ffn_norm=['ln2', 'norm2'],
    layer_scale=['gamma_2', 'ls2', 'ffn.gamma2'],
    # of a pyramid: a list, or numbered modules
    stages=['stages', 'layers', 'network', 'features', 'encoder', 'layer*',
            'stage*'],
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
        module (nn.Module): A model, a block, or what holds the list of
            blocks.
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


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a backbone.

    Attributes:
        path (str): Module path of their list, such as ``'layers'``.
        modules (list[nn.Module]): The blocks, first to last.
        patch_embed (nn.Module): The patch embedding in front of them.
        has_cls (bool): Whether the first of the tokens before the patches, if
            there are any, is a class token.
    """
    path: str
    modules: List[nn.Module]
    patch_embed: nn.Module
    has_cls: bool = True

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def paths(self) -> List[str]:
        """Module path of each block."""
        return [f'{self.path}.{i}' for i in range(len(self))]

    @property
    def dim(self) -> int:
        """Channels of the tokens."""
        return next(m.in_features for m in find_part(
            self.modules[0], 'ffn').modules() if isinstance(m, nn.Linear))

    @property
    def channels(self) -> List[int]:
        """Channels of each block's tokens."""
        return [self.dim] * len(self)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return image_channels(self.patch_embed)

    @property
    def stride(self) -> Grid:
        """Pixels between neighbouring patches, (rows, columns)."""
        return patch_stride(self.patch_embed)

    @property
    def image_size(self) -> Grid:
        """A small size (H, W) that a backbone of any size takes."""
        return tuple(2 * step for step in self.stride)

    def watch_input(self, record: Callable[[Grid], None]) -> Any:
        """Have the grid of patches recorded in each pass.

        Args:
            record (Callable): Is given h and w.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        return self.patch_embed.register_forward_hook(
            lambda module, args, output: record(
                patch_grid(module, args[0], output)))

    def read(self, layer: int, output: Any, grid: Grid) -> Tokens:
        """Tokens from what a block returned.

        Args:
            layer (int): Index of the block.
            output: What it returned.
            grid (tuple[int, int]): What was recorded, see
                :meth:`watch_input`.

        Returns:
            Tokens: Values of shape (B, N, C).

        Raises:
            ConfigError: If they are not on the grid of the patch embedding.
        """
        values = first_output(output)
        if values.dim() != 3 or values.shape[1] < grid[0] * grid[1]:
            raise ConfigError(
                f'{self.paths[layer]} gives shape {tuple(values.shape)}; '
                f'expected tokens (B, N, C) with N >= {grid[0]} x {grid[1]}, '
                'the patch grid. Token dropping and windowed blocks are not '
                'supported.')
        return Tokens(values, grid, has_cls=self.has_cls)


class FeatureMap(NamedTuple):
    """Where a feature map comes from, and how to read it.

    Attributes:
        path (str): Path of the module that returns it; ``''``, the backbone.
        pick (int, optional): Which of its outputs it is; None, the only one.
        layout (str): ``'NCHW'``, ``'NHWC'``, or ``'NLC'``, tokens.
        channels (int): Its channels.
        stride (tuple[int, int]): Pixels between neighbouring cells.
    """
    path: str
    pick: Optional[int]
    layout: str
    channels: int
    stride: Grid


@dataclasses.dataclass(frozen=True)
class Maps:
    """The feature maps of a backbone: what its stages give, or what it
    returns. Has what :class:`Blocks` has but for the blocks.

    Attributes:
        backbone (nn.Module): The backbone.
        maps (list[FeatureMap]): The maps, first to last.
        modules (list[nn.Module]): Which module returns each.
        image_size (tuple[int, int]): A size (H, W) that the backbone takes.
    """
    backbone: nn.Module
    maps: List[FeatureMap]
    modules: List[nn.Module]
    image_size: Grid

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def paths(self) -> List[str]:
        """Where each map comes from: ``'layer3'``, ``'outputs.0'``."""
        return [m.path or f'outputs.{m.pick or 0}' for m in self.maps]

    @property
    def channels(self) -> List[int]:
        """Channels of each map."""
        return [m.channels for m in self.maps]

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return image_channels(self.backbone)

    @property
    def stride(self) -> Grid:
        """Pixels between neighbouring cells of the deepest map."""
        return self.maps[-1].stride

    def watch_input(self, record: Callable[[Grid], None]) -> Any:
        """Have the size of images recorded in each pass, see
        :meth:`Blocks.watch_input`."""
        return self.backbone.register_forward_pre_hook(
            lambda module, args: record(tuple(args[0].shape[-2:])))

    def read(self, layer: int, output: Any, size: Grid) -> Tokens:
        """Tokens from what a module returned, see :meth:`Blocks.read`."""
        _, pick, layout, _, stride = self.maps[layer]
        if pick is not None:
            output = output[pick]
        values, grid = _split(output)
        if layout == 'NLC':
            return Tokens(values, grid or tuple(
                -(-length // step) for length, step in zip(size, stride)))
        if layout == 'NCHW':  # (B, C, h, w) -> (B, h, w, C)
            values = values.permute(0, 2, 3, 1)
        return Tokens(values.flatten(1, 2), tuple(values.shape[1:3]))


Features = Union[Blocks, Maps]


def find_features(backbone: nn.Module, owner: str) -> Features:
    """Find what a backbone shows spatially: blocks, stages or outputs.

    Args:
        backbone (nn.Module): The backbone; it stays as it is.
        owner (str): ``'teacher'`` or ``'student'``, for error messages.

    Returns:
        Blocks | Maps: Blocks of a plain vision transformer; else the stages
        of a pyramid, the last of each resolution; else the maps that the
        backbone returns, in training as in evaluation; else those of any
        list of modules.

    Raises:
        ConfigError: If there is no feature map.
    """
    try:
        blocks = find_blocks(backbone, owner)
        _check_blocks(backbone, blocks)
        return blocks
    except ConfigError as error:
        return _find_maps(backbone, owner, error)


def at_same_paths(features: Features, backbone: nn.Module) -> Features:
    """What a backbone showed, in the modules that are there now.

    Args:
        features (Blocks | Maps): Found before modules were wrapped in place.
        backbone (nn.Module): The backbone.

    Returns:
        Blocks | Maps: With the modules at the old paths.
    """
    paths = features.paths if isinstance(features, Blocks) else \
        [m.path for m in features.maps]
    return dataclasses.replace(features, modules=[
        backbone.get_submodule(path) for path in paths])


def _check_blocks(backbone: nn.Module, blocks: Blocks) -> None:
    """Raise :class:`ConfigError` if blocks give no tokens on one grid."""
    grids: List[Grid] = []
    outputs: List[Any] = []
    # On a copy: some backbones keep buffers of the last image's size
    copied = copy.deepcopy(backbone)
    own = find_blocks(copied, '')
    own.watch_input(grids.append)
    for block in own.modules:
        block.register_forward_hook(
            lambda module, args, output: outputs.append(output))
    _run(copied, example_images(blocks, backbone))
    for i, output in enumerate(outputs):
        blocks.read(i, output, grids[-1])


def _run(backbone: nn.Module, images: Tensor, training: bool = False) -> Any:
    """What a backbone returns for images, without gradients.

    Raises:
        ConfigError: If it cannot be run on them.
    """
    backbone.train(training)  # alone: some backbones return None from it
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return backbone(images, **unmasked(backbone, images))
    except Exception as error:  # too small, or not divided by its stride
        said = (str(error) or repr(error)).splitlines()[0][:200]
        raise ConfigError(f'{tuple(images.shape)}: {said}') from error


def _find_maps(backbone: nn.Module, owner: str, error: ConfigError) -> Maps:
    # On a copy: some backbones keep buffers of the last image's size
    copied = copy.deepcopy(backbone)
    stages = _stage_paths(backbone)
    found: Dict[str, Any] = {}
    for path in {path for paths in stages.values() for path in paths}:
        copied.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: found.update(
                {path: output}))
    reasons = []
    for size in _sizes(backbone):
        images = torch.randn(2, image_channels(backbone), *size)
        found.clear()
        try:
            outputs = _run(copied, images)
        except ConfigError as reason:
            reasons.append(str(reason))
            continue
        in_stages = {name: _last_of_each_stride(_maps_among(
            [(path, None, found.get(path)) for path in paths], size))
            for name, paths in stages.items()}
        in_stages = {k: maps for k, maps in in_stages.items() if len(maps) > 1}
        maps = next((in_stages[name] for name in in_stages
                     if name.split('.')[-1] in NAMES['stages']), None)
        if not maps:
            maps = _returned(outputs, size)
            with contextlib.suppress(ConfigError):
                if _returned(_run(copied, images, training=True),
                             size) != maps:
                    maps = []
        if not maps and in_stages:
            # Of lists with another name the coarsest, then the longest
            maps = in_stages[min(in_stages, key=lambda name: (
                name.count('.'), -max(m.stride[0] for m in in_stages[name]),
                -len(in_stages[name])))]
        if maps:
            return Maps(backbone, maps, [
                backbone.get_submodule(m.path) for m in maps], size)
    raise ConfigError(
        f'{owner}: {type(backbone).__name__} shows no feature map: neither '
        'its stages nor what it returns is spatial. '
        + (f'It could not be run on random images: {"; ".join(reasons)}. '
           if reasons else '') + f'As a vision transformer: {error}')


def _returned(outputs: Any, size: Grid) -> List[FeatureMap]:
    """The maps among what a backbone returned."""
    return _maps_among(
        [('', i, one) for i, one in enumerate(outputs)]
        if isinstance(outputs, (tuple, list)) else [('', None, outputs)], size)


def _maps_among(outputs: List[Tuple[str, Optional[int], Any]], size: Grid
                ) -> List[FeatureMap]:
    """Those outputs, each with its path and pick, that are maps."""
    found = [(path, pick, _describe(output, size))
             for path, pick, output in outputs]
    return [FeatureMap(path, pick, *layout) for path, pick, layout in found
            if layout]


def _sizes(backbone: nn.Module) -> List[Grid]:
    """Image sizes to try; not square, so that rows and columns differ."""
    fixed = fixed_input_size(backbone)
    if fixed:
        return [fixed]
    named = [size for size in (
        getattr(module, name, None) for module in backbone.modules()
        for name in ('img_size', 'img_resolution', 'input_resolution',
                     'init_size')) if size]
    return [(64, 96), (128, 192), (256, 384), *(
        tuple(to_2tuple(size))[-2:] for size in named[:1]), (224, 224),
            (384, 576), (32, 32)]


def _stage_paths(backbone: nn.Module) -> Dict[str, List[str]]:
    """Module paths that may be stages, by the list that they are in, or by
    what they are called before their number (``'layer*'``); names in
    :data:`NAMES` first."""
    lists = (nn.ModuleList, nn.Sequential)
    groups: Dict[str, List[str]] = {}
    for prefix, root in [('', backbone)] + [
            (f'{name}.', child) for name, child in backbone.named_children()
            if not isinstance(child, lists)]:
        for name, child in root.named_children():
            number = re.search(r'_?(\d+)$', name)
            if number:
                groups.setdefault(f'{prefix}{name[:number.start()]}*',
                                  []).append(prefix + name)
            elif isinstance(child, lists):
                groups[prefix + name] = [f'{prefix}{name}.{below}' for below, _
                                         in child.named_children()]
    for name, paths in groups.items():
        if name.endswith('*'):
            paths.sort(key=lambda path: int(re.findall(r'\d+', path)[-1]))
    names = NAMES['stages']
    order = sorted(groups, key=lambda name: (
        name.count('.'), names.index(name.split('.')[-1])
        if name.split('.')[-1] in names else len(names)))
    return {name: groups[name] for name in order if len(groups[name]) > 1}


def _split(output: Any) -> Tuple[Any, Optional[Grid]]:
    """The tensor in what a module returned, and its grid if it came along, as
    in ``(tokens, (h, w))``; of several tensors in a tuple, the first."""
    if isinstance(output, (tuple, list)) and len(output) == 2 and not \
            isinstance(output[1], Tensor) and len(output[1]) == 2:
        return output[0], (int(output[1][0]), int(output[1][1]))
    several = isinstance(output, tuple) and len(output) and all(
        isinstance(one, Tensor) for one in output)
    return output[0] if several else output, None


def _describe(output: Any, size: Grid) -> Optional[Tuple[str, int, Grid]]:
    """Layout, channels and stride of an output for images of a size; None if
    it is no map."""
    output, grid = _split(output)
    if not isinstance(output, Tensor):
        return None
    shape = tuple(output.shape)
    if len(shape) == 3:
        if grid is None:  # with a class token or without
            grid = next((
                (size[0] // s, size[1] // s) for s in (4, 8, 14, 16, 32, 64)
                if shape[1] - (size[0] // s) * (size[1] // s) in (0, 1)
                and size[0] * size[1] > s * s), None)
        if grid is None or shape[1] < int(grid[0]) * int(grid[1]):
            return None
        return 'NLC', shape[2], _stride(size, grid)
    if len(shape) != 4:
        return None
    for layout, rows in (('NCHW', 2), ('NHWC', 1)):
        grid = shape[rows:rows + 2]
        stride = _stride(size, grid)
        if stride[0] == stride[1] and max(grid) > 1:
            return layout, shape[1 if rows == 2 else 3], stride
    return None


def _stride(size: Grid, grid: Grid) -> Grid:
    rows, columns = (max(1, round(length / int(cells)))
                     for length, cells in zip(size, grid))
    return rows, columns


def _last_of_each_stride(maps: List[FeatureMap]) -> List[FeatureMap]:
    """The last stage of each resolution; all if they have the same."""
    strides = [m.stride for m in maps]
    if len(set(strides)) < 2:
        return maps
    return [m for i, m in enumerate(maps) if m.stride not in strides[i + 1:]]


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
    place, patch_embed = path, None
    while place and patch_embed is None:
        place = place.rpartition('.')[0]
        owner_of_blocks = backbone.get_submodule(place)
        patch_embed = find_part(owner_of_blocks, 'patch_embed')
    if patch_embed is None:
        raise ConfigError(
            f'{owner}: {name} has blocks at {path!r} but no patch_embed '
            'beside or above them, so their patch grid is not known.')
    return Blocks(path, blocks, patch_embed,
                  find_part(owner_of_blocks, 'cls_token') is not None)


def _is_block(module: nn.Module) -> bool:
    return isinstance(find_part(module, 'ffn'), nn.Module) and \
        isinstance(find_part(module, 'attention'), nn.Module)


def resolve_layer(layer: Layer, features: Features, key: str) -> int:
    """The index of a block or map from an index or a module path.

    Args:
        layer (int | str): 17, -1, or ``'layers.17'``.
        features (Blocks | Maps): To choose from.
        key (str): The config key, for error messages.

    Returns:
        int: In [0, number of blocks or maps).

    Raises:
        ConfigError: If there is none such; near matches are listed.
    """
    depth = len(features)
    kind = 'block' if isinstance(features, Blocks) else 'map'
    if isinstance(layer, int) and not isinstance(layer, bool):
        if not -depth <= layer < depth:
            raise ConfigError(
                f'{key}={layer} is out of range: there are {depth} {kind}s, '
                f'so choose from 0 to {depth - 1} (or -{depth} to -1).')
        return layer % depth
    path, *paths = [  # a wrapper's blocks are below another backbone
        re.sub(r'^(student\.)?(backbone\.)*', '', p)
        for p in (str(layer), *features.paths)]
    if path not in paths:
        raise ConfigError(
            f'{key}={layer!r}: no such {kind}. The {kind}s are {paths[0]!r} '
            f'to {paths[-1]!r}; an index is fine too.'
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


def unmasked(backbone: nn.Module, images: Tensor) -> Dict[str, Any]:
    """Arguments of a backbone's forward pass that keep all patches: MAE and
    other masked pre-training backbones mask unless told not to. SparK's take
    their mask from a class, where it is set for these images, (B, C, H, W).
    """
    sparse = getattr(sys.modules[type(backbone).__module__], 'SparseConv2d',
                     None)
    if sparse is not None:
        sys.modules[sparse.__module__].SparseHelper._cur_active = torch.ones(
            len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
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


def image_channels(module: nn.Module) -> int:
    """Channels of the images that a backbone or patch embedding takes."""
    return next((m.in_channels for m in module.modules()
                 if isinstance(m, nn.Conv2d)), 3)


def first_output(output: Any) -> Tensor:
    """The tokens among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def change_patches(output: Any, count: int,
                   change: Callable[[Tensor], Tensor]) -> Any:
    """What a block returns, with other patch tokens.

    Args:
        output: What it returned.
        count (int): How many of the tokens are patches: the last ones.
        change (Callable): Given the patch tokens, shape (B, count, C),
            returns others of that shape.

    Returns:
        Of the kind of ``output``.
    """
    tokens = first_output(output)
    tokens = torch.cat([tokens[:, :-count], change(tokens[:, -count:])],
                       dim=1)
    return type(output)([tokens, *output[1:]]) \
        if isinstance(output, (tuple, list)) else tokens


def fixed_input_size(backbone: nn.Module) -> Optional[Grid]:
    """The only input size (H, W) that a backbone takes, None if it is
    flexible: BEiT's relative position bias and timm's strict patch embedding
    are bound to one size."""
    if not any(hasattr(module, 'relative_position_bias_table')
               or getattr(module, 'strict_img_size', False)
               for module in backbone.modules()):
        return None
    return image_size(backbone)


def image_size(model: nn.Module) -> Optional[Grid]:
    """The image size (H, W) that a model was made for; None if it does not
    say."""
    size = next((module.img_size for module in model.modules()
                 if getattr(module, 'img_size', None)), None)
    return size and tuple(to_2tuple(size))


def example_images(features: Features, backbone: nn.Module) -> Tensor:
    """A random image, about as small as a backbone takes it, (1, C, H, W)."""
    size = fixed_input_size(backbone) or features.image_size
    return torch.randn(1, features.in_channels, *size)
