"""How other libraries name the weights of a vision transformer."""
import re
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

from torch import Tensor

from mmsinger.errors import ConfigError, near_matches


class Layout(NamedTuple):
    """The key layout of one family of checkpoints.

    Attributes:
        title (str): What it is called in messages.
        names (dict[str, str]): Source key -> mmpretrain's key; ``{}`` stands
            for the number of the block, ``#0``, ``#1``, … for parts that are
            joined.
        dropped (dict[str, str]): Regular expression of keys that are left
            out on purpose -> why.
        sign (str): Regular expression of keys that only this family has,
            without the wrapper.
        wrapper (str): Regular expression of what all keys of the encoder may
            begin with.
        outside (dict[str, str]): Like ``dropped``, for keys without the
            wrapper where it is used.
        head (str): Name of a linear head on the normalised class token;
            ``''`` where there is none.
        interpolation (str): How its code resamples position embeddings, see
            :func:`mmsinger.converters.positions.resample`.
        registers_have_positions (bool): Whether rows of the position
            embeddings may belong to registers, or none to prefix tokens.
        backbone (dict): What mmpretrain's config has for all of the family
            and weights do not tell.
    """
    title: str
    names: Dict[str, str]
    dropped: Dict[str, str]
    sign: str
    wrapper: str = ''
    outside: Dict[str, str] = {}
    head: str = ''
    interpolation: str = 'antialias'
    registers_have_positions: bool = False
    backbone: Dict[str, Any] = {}


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
_HF = {  # ViT and DINOv2
    'embeddings.cls_token': 'cls_token',
    'embeddings.position_embeddings': 'pos_embed',
    **_leaves({
        'embeddings.patch_embeddings.projection': 'patch_embed.projection',
        'encoder.layer.{}.attention.attention.query': 'layers.{}.attn.qkv#0',
        'encoder.layer.{}.attention.attention.key': 'layers.{}.attn.qkv#1',
        'encoder.layer.{}.attention.attention.value': 'layers.{}.attn.qkv#2',
        'encoder.layer.{}.attention.output.dense': 'layers.{}.attn.proj',
        'layernorm': 'ln1',
    }),
}
_HF_VIT = {
    **_HF,
    **_leaves({
        'encoder.layer.{}.layernorm_before': 'layers.{}.ln1',
        'encoder.layer.{}.layernorm_after': 'layers.{}.ln2',
        'encoder.layer.{}.intermediate.dense': 'layers.{}.ffn.layers.0.0',
        'encoder.layer.{}.output.dense': 'layers.{}.ffn.layers.1',
    }),
}
_HF_DINOV2 = {
    **_HF,
    'embeddings.register_tokens': 'register_tokens',
    'encoder.layer.{}.layer_scale1.lambda1': 'layers.{}.attn.gamma1.weight',
    'encoder.layer.{}.layer_scale2.lambda1': 'layers.{}.ffn.gamma2.weight',
    **_leaves({
        'encoder.layer.{}.norm1': 'layers.{}.ln1',
        'encoder.layer.{}.norm2': 'layers.{}.ln2',
        'encoder.layer.{}.mlp.fc1': 'layers.{}.ffn.layers.0.0',
        'encoder.layer.{}.mlp.fc2': 'layers.{}.ffn.layers.1',
        'encoder.layer.{}.mlp.weights_in': 'layers.{}.ffn.w12',
        'encoder.layer.{}.mlp.weights_out': 'layers.{}.ffn.w3',
    }),
}
_HF_CLIP = {  # SigLIP too
    'embeddings.class_embedding': 'cls_token',
    'embeddings.position_embedding.weight': 'pos_embed',
    **_leaves({
        'embeddings.patch_embedding': 'patch_embed.projection',
        'pre_layrnorm': 'pre_norm',
        'encoder.layers.{}.layer_norm1': 'layers.{}.ln1',
        'encoder.layers.{}.self_attn.q_proj': 'layers.{}.attn.qkv#0',
        'encoder.layers.{}.self_attn.k_proj': 'layers.{}.attn.qkv#1',
        'encoder.layers.{}.self_attn.v_proj': 'layers.{}.attn.qkv#2',
        'encoder.layers.{}.self_attn.out_proj': 'layers.{}.attn.proj',
        'encoder.layers.{}.layer_norm2': 'layers.{}.ln2',
        'encoder.layers.{}.mlp.fc1': 'layers.{}.ffn.layers.0.0',
        'encoder.layers.{}.mlp.fc2': 'layers.{}.ffn.layers.1',
        'post_layernorm': 'ln1',
    }),
}

_TIMM_DROPPED = {
    r'(head|head_dist)\.': 'head',
    r'(fc_norm|pre_logits)\.': 'in front of the head',
}
_DINOV2_DROPPED = {r'(embeddings\.)?mask_token': 'for training with masks'}
_CLIP_DROPPED = {r'embeddings\.position_ids': 'counts the positions',
                 r'head\.': 'attention pooling'}
_CLIP_OUTSIDE = {r'text_(model|projection)\.': 'the text tower',
                 r'visual_projection\.': 'head',
                 r'logit_': 'for the contrastive loss'}

LAYOUTS = {
    'timm': Layout(
        'timm VisionTransformer', _TIMM, _TIMM_DROPPED,
        sign=r'reg_token|norm_pre\..*|blocks\.\d+\.gamma_[12]|'
        r'(head|head_dist|fc_norm)\.(weight|bias)|pre_logits\..*',
        head='head', registers_have_positions=True),
    'dinov2': Layout(
        "DINOv2's own", _DINOV2, _DINOV2_DROPPED,
        sign=r'mask_token|register_tokens|blocks\.\d+\.(mlp\.w12|\d+)\..*',
        wrapper=r'backbone\.', interpolation='offset',
        outside={r'(dino|ibot)\w*\.': 'head of the self-supervised losses'}),
    'unic': Layout(
        'UNIC', _DINOV2, _DINOV2_DROPPED,
        sign=r'encoder\.blocks\..*', wrapper=r'encoder\.',
        interpolation='offset',
        outside={r'lp\.': "projectors to UNIC's teachers"}),
    'singer': Layout(
        'official SiNGER', _TIMM, _TIMM_DROPPED,
        sign=r'student\.blocks\..*', wrapper=r'student\.',
        registers_have_positions=True,
        outside={r'teacher\.': 'the teacher',
                 r'adapter_dict\.': 'projectors of the student',
                 r'(singer|sner)_dict\.': 'adapters of the teacher'}),
    'hf_vit': Layout(
        "transformers' ViT", _HF_VIT,
        {**_DINOV2_DROPPED, r'pooler\.': 'in front of the head'},
        sign=r'encoder\.layer\.\d+\.layernorm_before\..*', wrapper=r'vit\.',
        outside={r'classifier\.': 'head'}, head='classifier',
        interpolation='plain',
        backbone=dict(norm_cfg=dict(type='LN', eps=1e-12))),
    'hf_dinov2': Layout(
        "transformers' DINOv2", _HF_DINOV2, _DINOV2_DROPPED,
        sign=r'encoder\.layer\.\d+\.(norm1|layer_scale1|mlp)\..*',
        wrapper=r'dinov2(_with_registers)?\.', interpolation='plain',
        outside={r'classifier\.': 'head'}),
    'hf_clip': Layout(
        "transformers' CLIP", _HF_CLIP, _CLIP_DROPPED,
        sign=r'embeddings\.class_embedding', wrapper=r'vision_model\.',
        outside=_CLIP_OUTSIDE, interpolation='plain'),
    'hf_siglip': Layout(
        "transformers' SigLIP", _HF_CLIP, _CLIP_DROPPED,
        sign=r'embeddings\.patch_embedding\.bias', wrapper=r'vision_model\.',
        outside=_CLIP_OUTSIDE, interpolation='plain',
        backbone=dict(with_cls_token=False, layer_cfgs=dict(
            act_cfg=dict(type='GELU', approximate='tanh')))),
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
    found = {}
    for family, layout in LAYOUTS.items():
        sign = f'({layout.wrapper})?({layout.sign})'
        example = next((k for k in keys if re.fullmatch(sign, k)), None)
        if example:
            found[family] = example
    if len(found) > 1:
        raise ConfigError(
            f'{path} has signs of several families: '
            + ', '.join(f'{f!r} ({example})' for f, example in found.items())
            + '. Choose one with --source.')
    if found:
        return next(iter(found))
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
        + ', '.join(f'{f!r} ({layout.title})'
                    for f, layout in LAYOUTS.items()) + '.')


class Renamed(NamedTuple):
    """What became of a source key: ``target`` is its name in mmpretrain's
    layout, None if it was dropped; then ``why`` says the reason. ``part``
    counts the tensors that are joined under one target."""
    source: str
    target: Optional[str]
    part: int
    why: str


def rename(weights: Dict[str, Tensor], family: str, head: bool = False
           ) -> List[Renamed]:
    """mmpretrain's names of a checkpoint's tensors.

    Args:
        weights (dict[str, Tensor]): The state dict; shapes are read only to
            tell a gated FFN (SwiGLU) from a plain one.
        family (str): A key of :data:`LAYOUTS`.
        head (bool): Name the classification head too, as a
            VisionTransformerClsHead does. Defaults to False: it is dropped.

    Returns:
        list[Renamed]: One for each tensor, in the same order. Registers are
        named ``register_tokens``.

    Raises:
        ConfigError: If a key is neither mapped nor dropped on purpose.
    """
    layout = LAYOUTS[family]
    inner = {}  # the keys without the wrapper; None outside of it
    for key in weights:
        match = layout.wrapper and re.match(layout.wrapper, key)
        inner[key] = key[match.end():] if match else None
    if all(name is None for name in inner.values()):
        inner = {key: key for key in weights}
    names = layout.names
    if names is _TIMM and _is_gated(weights, inner):
        names = _TIMM_GATED
    heads = _leaves({layout.head: 'layers.head'}) if head else {}
    renamed, unknown = [], []
    for key, name in inner.items():
        template, number = _template(name or '')
        target = heads.get(key) or names.get(template, '').format(number)
        why = '' if target else next((reason for pattern, reason in (
            {**layout.dropped, **layout.outside} if name == key else
            layout.dropped if name else layout.outside).items()
            if re.match(pattern, name or key)), '')
        if not target and not why:
            unknown.append((key, template, number))
        part = re.search(r'#(\d)', target)
        renamed.append(Renamed(
            key, re.sub(r'#\d', '', target) or None,
            int(part[1]) if part else 0, why))
    if unknown:
        lines = [f'  {key}' + near_matches(
            template.format(number), [n.format(number) for n in names]
        ).replace(' Did', '. Did') for key, template, number in unknown[:10]]
        if len(unknown) > 10:
            lines.append(f'  … and {len(unknown) - 10} more')
        raise ConfigError(
            f'{len(unknown)} of {len(weights)} keys are not of a '
            f'{layout.title} that mmpretrain has a counterpart for:\n'
            + '\n'.join(lines) + '\nIs it another family (--source)? Other '
            "timm models can be used through dict(type='mmpretrain."
            "TIMMBackbone', model_name=…).")
    return renamed


def _template(key: str) -> Tuple[str, str]:
    """A key with ``{}`` for its block's number, and the number. Training of
    DINOv2 cuts the blocks into chunks: blocks.CHUNK.NUMBER."""
    key = re.sub(r'^blocks\.\d+\.(?=\d+\.)', 'blocks.', key)
    match = re.search(r'(?<=\.)\d+(?=\.)', key)
    return (key, '') if match is None else (
        key[:match.start()] + '{}' + key[match.end():], match[0])


def _is_gated(weights: Dict[str, Tensor], inner: Dict[str, Optional[str]]
              ) -> bool:
    """Whether fc1 makes two halves, one of which gates the other."""
    shapes = {name: weights[key].shape for key, name in inner.items()}
    first, second = (shapes.get(f'blocks.0.mlp.{name}.weight')
                     for name in ('fc1', 'fc2'))
    return bool(first and second) and first[0] == 2 * second[-1]
