"""A student's backbone in timm's key layout."""
import copy
import inspect
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from mmsinger.checkpoint import load_strict
from mmsinger.errors import ConfigError, near_matches
from mmsinger.export import (check_not_itself, load_student, student_config,
                             student_path)
from mmsinger.files import atomic_save
from mmsinger.models.features.anatomy import example_images, find_features
from mmsinger.registry import MODELS

TOLERANCE = 1e-5  # of the largest value that both put out


class TimmWeights(NamedTuple):
    """A backbone for timm.

    Attributes:
        model_name (str): For ``timm.create_model``.
        kwargs (dict): Its further arguments, ``num_classes=0`` among them.
        state_dict (dict[str, Tensor]): Loads into it strictly.
        left_out (list[str]): Keys of the source that timm has no use for.
    """
    model_name: str
    kwargs: Dict[str, Any]
    state_dict: Dict[str, Tensor]
    left_out: List[str]


def to_timm(weights: Dict[str, Tensor], backbone: dict,
            model_name: Optional[str] = None) -> TimmWeights:
    """Rename a backbone's weights for the timm model that computes the same.

    There is no table of names. Both models run on one image, and modules
    whose weights have one shape correspond in the order in which they run.
    The two then get the same random weights; unless their outputs agree,
    timm's model is not the same one.

    Args:
        weights (dict[str, Tensor]): Of the backbone, without prefix.
        backbone (dict): Its config.
        model_name (str, optional): timm's name of it. Defaults to None, found
            for the types in :data:`FAMILIES`.

    Returns:
        TimmWeights: The weights, and how to make their model.

    Raises:
        ConfigError: If timm is not installed, no timm model is known for the
            backbone, or it computes something else.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError('--layout timm needs timm: `pip install '
                          "'mmsinger[timm]'`.") from error
    source = _build(backbone)
    name, kwargs = _timm_model(backbone, source, model_name)
    kwargs = dict(num_classes=0, **kwargs)
    target = _create(timm, name, kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = example_images(find_features(source, 'student'), source)
        if 'img_size' in kwargs:
            image = torch.randn(1, image.shape[1], *kwargs['img_size'])
        _randomise(source)
        order = _in_order(source, image)
        try:
            parts = _pair(order, _in_order(target, image))
        except (RuntimeError, AssertionError):  # another image size
            parts = None
        if parts is None or not _agree(source, target, parts, image):
            raise ConfigError(
                f"timm's {name!r} with {kwargs} is not the same model as "
                f'{backbone["type"]!r} with the settings of this config. '
                'Choose another with --timm-model.')
    known = source.state_dict()
    load_strict(
        source, {k: v for k, v in weights.items() if k in known},
        what='The checkpoint and the backbone of the config',
        fix='Give the config that the checkpoint was trained with.')
    state = _translate(source, target, parts)
    used = {key for key, _ in parts.values()}
    return TimmWeights(name, kwargs, state, [
        key for key in weights if key not in used])


def export_timm(checkpoint: str, cfg: Config, out: Optional[str] = None,
                model_name: Optional[str] = None) -> Tuple[str, TimmWeights]:
    """Write a student's backbone for timm: ``timm.create_model`` loads the
    file by its ``checkpoint_path``.

    Args:
        checkpoint (str): A training checkpoint or a student file.
        cfg (Config): The recipe or the plain config.
        out (str, optional): Where to write. Defaults to
            ``CHECKPOINT_student_timm.pth`` beside it.
        model_name (str, optional): See :func:`to_timm`.

    Returns:
        tuple[str, TimmWeights]: The path written, and what is in it. Name and
        arguments of the model are in its ``meta``.

    Raises:
        ConfigError: See :func:`to_timm`.
    """
    out = out or student_path(checkpoint, '_timm.pth')
    check_not_itself(out, checkpoint)
    model = student_config(cfg).model
    prefix = 'backbone.' if 'backbone' in model else ''
    weights = load_student(checkpoint)
    found = to_timm(
        {key[len(prefix):]: value for key, value in weights.items()
         if key.startswith(prefix)}, model.get('backbone', model), model_name)
    found.left_out.extend(
        key for key in weights if not key.startswith(prefix))
    atomic_save(dict(
        meta=dict(model_name=found.model_name, kwargs=found.kwargs),
        state_dict=found.state_dict), out)
    return out, found


def _build(backbone: dict) -> nn.Module:
    """The backbone, to put out what timm's models do: all of the last stage,
    after its norm."""
    cfg = copy.deepcopy(dict(backbone))
    for key in ('init_cfg', 'pretrained'):
        cfg.pop(key, None)
    options = {}
    for base in type(MODELS.build(cfg)).__mro__[:-1]:
        options.update(inspect.signature(base.__init__).parameters)
    if 'out_type' in options:
        cfg['out_type'] = 'raw'
    if 'gap_before_final_norm' in options:
        cfg['gap_before_final_norm'] = True
    if 'out_indices' in options:
        indices = cfg.get('out_indices', options['out_indices'].default)
        if isinstance(indices, (tuple, list)):
            cfg['out_indices'] = tuple(indices)[-1:]
    model = MODELS.build(cfg)
    model.eval()
    return model


def _create(timm: Any, name: str, kwargs: Dict[str, Any]) -> nn.Module:
    names = timm.list_models()
    if name.split('.')[0] not in names:
        raise ConfigError(
            f'--timm-model={name!r}: timm {timm.__version__} has no such '
            f'model.{near_matches(name, names)}')
    try:
        return timm.create_model(name, **kwargs).eval()
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm's {name!r} cannot be made with {kwargs}: "
                          f'{error}') from error


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights of which none is a special case, and none hides an effect."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.dim() > 1:
            value.add_(0.02 * torch.randn_like(value))
        else:
            value.copy_(0.1 * torch.randn_like(value))
            if name.endswith(('.bias', 'running_mean')):
                continue
            value.add_(1)  # norms, scales, variances
            value.abs_()


Owner = Dict[str, Tuple[str, Tensor]]  # leaf -> key in the state dict, tensor


def _in_order(model: nn.Module, image: Tensor) -> List[Owner]:
    """The modules that hold weights, in the order in which they are called;
    one that is not called itself comes with the module around it."""
    calls: Dict[nn.Module, int] = {}

    def called(module: nn.Module, _: Any) -> None:
        calls.setdefault(module, len(calls))

    handles = [module.register_forward_pre_hook(called)
               for module in model.modules()]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    modules = dict(model.named_modules())
    owners: Dict[str, Owner] = {}
    for key, value in model.state_dict().items():
        path, _, leaf = key.rpartition('.')
        owners.setdefault(path, {})[leaf] = key, value

    def when(path: str) -> int:
        while modules[path] not in calls:
            path = path.rpartition('.')[0]
        return calls[modules[path]]

    return [owners[path] for path in sorted(owners, key=when)]


def _pair(source: List[Owner], target: List[Owner]
          ) -> Optional[Dict[str, Tuple[str, slice]]]:
    """timm's keys -> the key of the source, and its rows (of registers, which
    follow CLS). A bias that the source does not have gets the key ``''``.
    None if something else is missing."""

    def shape(owner: Owner) -> Tuple[int, ...]:
        size = tuple(next(iter(owner.values()))[1].shape)
        return size if 'cls_token' not in owner else size[-1:]

    waiting: Dict[Tuple[int, ...], List[Owner]] = {}
    for owner in source:
        waiting.setdefault(shape(owner), []).append(owner)
    parts = {}
    for owner in target:
        if not waiting.get(shape(owner)):
            return None
        found = waiting[shape(owner)].pop(0)
        # What is called otherwise (gamma, weight) corresponds in its order
        others = [leaf for leaf in found if leaf not in owner]
        for leaf, (key, value) in owner.items():
            rows = slice(None)
            if leaf == 'reg_token':
                leaf, rows = 'cls_token', slice(1, None)
            elif leaf == 'cls_token':
                rows = slice(0, 1)
            elif leaf not in found:
                leaf = others.pop(0) if others else ''
            if not leaf and not key.endswith('.bias'):
                return None
            parts[key] = found[leaf][0] if leaf else '', rows
    return parts


def _translate(source: nn.Module, target: nn.Module,
               parts: Dict[str, Tuple[str, slice]]) -> Dict[str, Tensor]:
    """The source's weights by timm's names, loaded into timm's model."""
    weights = source.state_dict()
    for path, module in source.named_modules():
        if type(module).__name__ == 'PatchMerging':
            # Four neighbours channel by channel; in timm one by one, columns
            # first
            for key in (f'{path}.{leaf}' for leaf in (
                    'norm.weight', 'norm.bias', 'reduction.weight')):
                weights[key] = weights[key].unflatten(
                    -1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
    state = {}
    for name, value in target.state_dict().items():
        key, rows = parts[name]
        if not key:
            state[name] = torch.zeros_like(value)
        elif rows == slice(None):
            state[name] = weights[key].clone()
        else:
            state[name] = weights[key][:, rows].clone()
    target.load_state_dict(state)
    return state


@torch.no_grad()
def _agree(source: nn.Module, target: nn.Module,
           parts: Dict[str, Tuple[str, slice]], image: Tensor) -> bool:
    try:
        _translate(source, target, parts)
    except RuntimeError:  # other shapes
        return False
    ours = source(image)
    while isinstance(ours, (tuple, list)):
        ours = ours[-1]
    theirs = target.forward_features(image)
    if ours.dim() == 2:
        theirs = target.forward_head(theirs, pre_logits=True)
    elif ours.dim() == 4 and theirs.dim() == 3:  # a map of the patches
        ours = ours.flatten(2).transpose(1, 2)
        theirs = theirs[:, -ours.shape[1]:]
    elif ours.dim() == 4 and theirs.shape != ours.shape:
        theirs = theirs.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
    return theirs.shape == ours.shape and bool(
        (theirs - ours).abs().max() <= TOLERANCE * ours.abs().max())


# -- which model of timm's ---------------------------------------------------

Chosen = Tuple[str, Dict[str, Any]]


def _vit(cfg: dict, model: nn.Module) -> Chosen:
    block = model.layers[0]
    cls_token = getattr(model, 'cls_token', None)
    stem = model.patch_embed.projection
    if not isinstance(stem, nn.Conv2d):
        raise ConfigError(
            f'timm has no vision transformer with a {type(stem).__name__} for '
            'its patches. Give --timm-model if you know one, or --layout mm.')
    dims = stem.out_channels
    kwargs = dict(
        img_size=tuple(to_2tuple(model.img_size)),
        in_chans=model.patch_embed.projection.in_channels,
        patch_size=model.patch_embed.projection.kernel_size[0],
        embed_dim=dims,
        depth=len(model.layers),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.ffn.feedforward_channels / dims,
        reg_tokens=0 if cls_token is None else cls_token.shape[1] - 1,
        class_token=cls_token is not None,
        global_pool='' if cls_token is None else 'token',
        final_norm='ln1.weight' in model.state_dict())
    if any('gamma' in key for key in block.state_dict()):
        kwargs['init_values'] = 1e-5
    kwargs['pre_norm'] = any(
        key.startswith('pre_norm.') for key in model.state_dict())
    if not any('qkv.bias' in key or 'in_proj_bias' in key
               for key in block.state_dict()):
        kwargs['qkv_bias'] = False
    # The same class; CLIP's norms have the larger epsilon, as mmseg's
    eps = next(m.eps for m in block.modules() if isinstance(m, nn.LayerNorm))
    return 'vit_base_patch16_clip_224' if eps == 1e-5 else \
        'vit_base_patch16_224', kwargs


def _swin(cfg: dict, model: nn.Module) -> Chosen:
    table = model.stages[0].blocks[0].attn.w_msa
    return 'swin_base_patch4_window7_224', dict(
        img_size=tuple(to_2tuple(
            cfg.get('img_size', cfg.get('pretrain_img_size', 224)))),
        embed_dim=model.stages[0].blocks[0].norm1.weight.shape[0],
        depths=tuple(len(stage.blocks) for stage in model.stages),
        num_heads=tuple(stage.blocks[0].attn.w_msa.num_heads
                        for stage in model.stages),
        window_size=table.window_size[0])


def _convnext(cfg: dict, model: nn.Module) -> Chosen:
    return 'convnextv2_tiny' if cfg.get('use_grn') else 'convnext_tiny', dict(
        depths=tuple(model.depths), dims=tuple(model.channels))


def _resnet(cfg: dict, model: nn.Module) -> Chosen:
    kind, depth = type(model).__name__, cfg.get('depth')
    options: Dict[str, Any] = {}
    if kind == 'ResNeXt':
        name = 'resnext{}_{}x{}d'.format(
            depth, cfg.get('groups', 32), cfg.get('width_per_group', 4))
    else:
        prefix, suffix = dict(
            ResNet=('', ''), ResNetV1c=('', 'c'), ResNetV1d=('', 'd'),
            SEResNet=('se', ''))[kind]
        name = f'{prefix}resnet{depth}{suffix}'
        if name in ('resnet18c', 'resnet34c'):  # which timm lacks
            name, options = f'resnet{depth}d', dict(avg_down=False)
    stride = 4
    for step in cfg.get('strides', (1, 2, 2, 2)):
        stride *= step
    return name, options if stride == 32 else dict(
        options, output_stride=stride)


def _regnet(cfg: dict, model: nn.Module) -> Chosen:
    kind, _, size = str(cfg.get('arch')).partition('_')
    amount = float(size[:-2] or 0) * (10 if size.endswith('gf') else 0.01)
    return f'{kind}_{round(amount):03d}', {}


def _by_number(pattern: str, key: str, default: Any, factor: int = 1
               ) -> Callable[[dict, nn.Module], Chosen]:
    def choose(cfg: dict, model: nn.Module) -> Chosen:
        value = cfg.get(key, default)
        return pattern.format(
            value if factor == 1 else round(factor * value)), {}
    return choose


#: Types of backbones -> timm's model, from the config and the built backbone
FAMILIES: Dict[str, Callable[[dict, nn.Module], Chosen]] = {
    **dict.fromkeys(('VisionTransformer', 'VisionTransformerWithRegisters'),
                    _vit),
    'SwinTransformer': _swin,
    'ConvNeXt': _convnext,
    **dict.fromkeys(('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt',
                     'SEResNet'), _resnet),
    'RegNet': _regnet,
    'DenseNet': _by_number('densenet{}', 'arch', '121'),
    'EfficientNet': _by_number('tf_efficientnet_{}', 'arch', 'b0'),
    'MobileNetV2': _by_number('mobilenetv2_{:03d}', 'widen_factor', 1., 100),
    'TIMMBackbone': _by_number('{}', 'model_name', None),
}


def _timm_model(cfg: dict, model: nn.Module, name: Optional[str]) -> Chosen:
    if name is not None:
        return name, {}
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise ConfigError(
            f'No timm model is known to compute what {cfg["type"]!r} does. '
            f'Known are {", ".join(FAMILIES)}. If timm has it, give its name '
            'with --timm-model: it is checked.')
    return FAMILIES[kind](cfg, model)
