"""How other libraries name the weights of a vision transformer."""
import re
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

from torch import Tensor

from mmsinger.errors import ConfigError, check_choice, near_matches


class Layout(NamedTuple):
    """The key layout of one family of checkpoints.

    Attributes:
        title (str): What it is called in messages.
        names (dict[str, str]): Source key -> mmpretrain's key; ``{}`` stands
            for the number of the block.
        dropped (dict[str, str]): Regular expression of keys that are left
            out on purpose -> why.
        block (str): Regular expression of what block keys begin with; its
            group is the number.
        wrapper (str): What all keys of the encoder may begin with.
        outside (dict[str, str]): As ``dropped``, for keys without the
            wrapper where it is used.
        sign (str): Regular expression of keys that only this family has.
    """
    title: str
    names: Dict[str, str]
    dropped: Dict[str, str]
    sign: str
    block: str = r'blocks\.(\d+)\.'
    wrapper: str = ''
    outside: Dict[str, str] = {}


def _leaves(modules: Dict[str, str]) -> Dict[str, str]:
    return {f'{source}.{leaf}': f'{target}.{leaf}'
            for source, target in modules.items()
            for leaf in ('weight', 'bias')}


_COMMON = {
    'cls_token': 'cls_token',
    'pos_embed': 'pos_embed',
    'blocks.{}.ls1.gamma': 'layers.{}.attn.gamma1.weight',
    'blocks.{}.ls2.gamma': 'layers.{}.ffn.gamma2.weight',
    **_leaves({
        'patch_embed.proj': 'patch_embed.projection',
        'blocks.{}.norm1': 'layers.{}.ln1',
        'blocks.{}.attn.qkv': 'layers.{}.attn.qkv',
        'blocks.{}.attn.proj': 'layers.{}.attn.proj',
        'blocks.{}.norm2': 'layers.{}.ln2',
        'blocks.{}.mlp.fc1': 'layers.{}.ffn.layers.0.0',
        'blocks.{}.mlp.fc2': 'layers.{}.ffn.layers.1',
        'norm': 'ln1',
    }),
}
_TIMM = {
    **_COMMON,
    'reg_token': 'register_tokens',
    # DeiT-III's own files
    'blocks.{}.gamma_1': 'layers.{}.attn.gamma1.weight',
    'blocks.{}.gamma_2': 'layers.{}.ffn.gamma2.weight',
    **_leaves({'norm_pre': 'pre_norm'}),
}
_TIMM_GATED = {
    **_TIMM,
    **_leaves({
        'blocks.{}.mlp.fc1': 'layers.{}.ffn.w12',
        'blocks.{}.mlp.fc2': 'layers.{}.ffn.w3',
    }),
}
_DINOV2 = {
    **_COMMON,
    'register_tokens': 'register_tokens',
    **_leaves({
        'blocks.{}.mlp.w12': 'layers.{}.ffn.w12',
        'blocks.{}.mlp.w3': 'layers.{}.ffn.w3',
    }),
}
_TIMM_DROPPED = {
    r'(head|head_dist)\.': 'head',
    r'(fc_norm|pre_logits)\.': 'in front of the head',
}
_DINOV2_DROPPED = {r'mask_token': 'for training with masks'}
# Training cuts the blocks into chunks: blocks.CHUNK.NUMBER
_CHUNKED = r'blocks\.(?:\d+\.)?(\d+)\.'

LAYOUTS = {
    'timm': Layout(
        'timm VisionTransformer', _TIMM, _TIMM_DROPPED,
        sign=r'reg_token|norm_pre\..*|blocks\.\d+\.gamma_[12]|'
        r'(head|head_dist|fc_norm|pre_logits)\..*'),
    'dinov2': Layout(
        "DINOv2's own", _DINOV2, _DINOV2_DROPPED, block=_CHUNKED,
        sign=r'mask_token|register_tokens|blocks\.\d+\.(mlp\.w12|\d+)\..*'),
    'unic': Layout(
        'UNIC', _DINOV2, _DINOV2_DROPPED, block=_CHUNKED,
        wrapper='encoder.', sign=r'encoder\.blocks\..*',
        outside={r'lp\.': "projectors to UNIC's teachers"}),
    'singer': Layout(
        'official SiNGER', _TIMM, _TIMM_DROPPED,
        wrapper='student.', sign=r'student\.blocks\..*',
        outside={r'teacher\.': 'the teacher',
                 r'adapter_dict\.': 'projectors of the student',
                 r'(singer|sner)_dict\.': 'adapters of the teacher'}),
}


def detect(keys: Iterable[str], path: str = 'The file') -> str:
    """Which family a checkpoint belongs to.

    A SiNGER file of the student alone has timm's layout and counts as timm.

    Args:
        keys (Iterable[str]): Of its state dict.
        path (str): Where they came from, for error messages.

    Returns:
        str: A key of :data:`LAYOUTS`.

    Raises:
        ConfigError: If it fits none, or more than one.
    """
    keys = list(keys)
    found = [family for family, layout in LAYOUTS.items()
             if any(re.fullmatch(layout.sign, key) for key in keys)]
    if len(found) > 1:
        raise ConfigError(
            f'{path} has signs of several families: '
            + ', '.join(f'{f!r} ({_example(f, keys)})' for f in found)
            + '. Choose one with --source.')
    if found:
        return found[0]
    if any(key.startswith('blocks.') for key in keys):
        return 'timm'  # with nothing that tells it from the others
    if any(key.startswith(('layers.', 'backbone.layers.')) for key in keys):
        raise ConfigError(
            f"{path} is in mmpretrain's layout already (layers.…): use it as "
            'teacher.checkpoint.')
    tops = sorted({key.partition('.')[0] for key in keys})
    raise ConfigError(
        f'{path} is of no family that can be converted: its keys begin with '
        f'{tops[:10]}. Known are '
        + ', '.join(f'{f!r} ({layout.wrapper}blocks.…)'
                    for f, layout in LAYOUTS.items()) + '.')


def _example(family: str, keys: List[str]) -> str:
    return next(k for k in keys if re.fullmatch(LAYOUTS[family].sign, k))


class Renamed(NamedTuple):
    """What became of a source key: ``target`` is its name in mmpretrain's
    layout, None if it was dropped; then ``why`` says the reason."""
    source: str
    target: Optional[str]
    why: str


def rename(weights: Dict[str, Tensor], family: str) -> List[Renamed]:
    """mmpretrain's names of a checkpoint's tensors.

    Args:
        weights (dict[str, Tensor]): The state dict; shapes are read only to
            tell a gated FFN (SwiGLU) from a plain one.
        family (str): A key of :data:`LAYOUTS`.

    Returns:
        list[Renamed]: One for each tensor, in the same order. Registers are
        named ``register_tokens``.

    Raises:
        ConfigError: If a key is neither mapped nor dropped on purpose.
    """
    check_choice('--source', family, LAYOUTS)
    layout = LAYOUTS[family]
    names = layout.names
    if names is _TIMM and _is_gated(weights, layout):
        names = _TIMM_GATED
    wrapped = layout.wrapper and any(
        key.startswith(layout.wrapper) for key in weights)
    renamed, unknown = [], []
    for key in weights:
        inner, dropped = key, layout.dropped
        if wrapped and key.startswith(layout.wrapper):
            inner = key[len(layout.wrapper):]
        elif wrapped:
            inner, dropped = '', layout.outside
        why = next((reason for pattern, reason in dropped.items()
                    if re.match(pattern, inner or key)), '')
        target = None if why else _target(inner, names, layout.block)
        if target is None and not why:
            unknown.append((key, inner))
        renamed.append(Renamed(key, target, why))
    if unknown:
        raise ConfigError(_unknown_keys(unknown, names, layout, len(weights)))
    return renamed


def _is_gated(weights: Dict[str, Tensor], layout: Layout) -> bool:
    """Whether fc1 makes two halves, one of which gates the other."""
    for start in (layout.wrapper, ''):
        first, second = (weights.get(f'{start}blocks.0.mlp.{name}.weight')
                         for name in ('fc1', 'fc2'))
        if first is not None and second is not None:
            return first.shape[0] == 2 * second.shape[-1]
    return False


def _split(key: str, block: str) -> Tuple[str, str]:
    """A key with its block number taken out, and the number."""
    match = re.match(block, key)
    if match is None:
        return key, ''
    return 'blocks.{}.' + key[match.end():], match.group(1)


def _target(key: str, names: Dict[str, str], block: str) -> Optional[str]:
    template, number = _split(key, block)
    target = names.get(template)
    return None if target is None else target.format(number)


def _unknown_keys(unknown: List[Tuple[str, str]], names: Dict[str, str],
                  layout: Layout, total: int) -> str:
    lines = []
    for key, inner in unknown[:10]:
        template, number = _split(inner, layout.block)
        hint = near_matches(template.format(number),
                            [name.format(number) for name in names])
        lines.append(f'  {key}{"." + hint if hint else ""}')
    if len(unknown) > 10:
        lines.append(f'  … and {len(unknown) - 10} more')
    return (f'{len(unknown)} of {total} keys are not of a {layout.title} that '
            'mmpretrain has a counterpart for:\n' + '\n'.join(lines)
            + '\nIs it another family (--source)? Other timm models can be '
            "used through dict(type='mmpretrain.TIMMBackbone', "
            'model_name=…).')
