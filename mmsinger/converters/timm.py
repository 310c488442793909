"""timm's VisionTransformer keys to mmpretrain's."""
import re
from typing import Dict

from torch import Tensor

from mmsinger.errors import ConfigError

# timm's name inside a block -> mmpretrain's
_BLOCK = {
    'norm1': 'ln1',
    'norm2': 'ln2',
    'attn.qkv': 'attn.qkv',
    'attn.proj': 'attn.proj',
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1',
}
# timm's name of a LayerScale -> mmpretrain's parameter
_LAYER_SCALE = {
    'ls1.gamma': 'attn.gamma1.weight',
    'ls2.gamma': 'ffn.gamma2.weight',
}
_TOP = {
    'patch_embed.proj': 'patch_embed.projection',
    'norm_pre': 'pre_norm',
    'norm': 'ln1',
}


def timm_to_mmpretrain(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Rename the weights of a timm ViT for mmpretrain's VisionTransformer.

    Args:
        state_dict (dict[str, Tensor]): Of a timm ``VisionTransformer``
            (augreg, DeiT, with or without LayerScale); heads are dropped.

    Returns:
        dict[str, Tensor]: Loads strictly into ``VisionTransformer`` with
        ``layer_scale_init_value`` set if there is LayerScale.

    Raises:
        ConfigError: If a key is not known.
    """
    converted, unknown = {}, []
    for key, value in state_dict.items():
        if key.startswith(('head.', 'fc_norm.', 'head_dist.')):
            continue
        name = _rename(key)
        if name is None:
            unknown.append(key)
        else:
            converted[name] = value
    if unknown:
        raise ConfigError(
            f'{len(unknown)} keys are not of a timm VisionTransformer that '
            f'mmpretrain has a counterpart for: {unknown[:5]}. Use '
            "dict(type='mmpretrain.TIMMBackbone', model_name=…) instead.")
    return converted


def _rename(key: str):
    if key in ('cls_token', 'pos_embed'):
        return key
    stem, _, leaf = key.rpartition('.')
    match = re.fullmatch(r'blocks\.(\d+)\.(.+)', key)
    if match:
        index, inside = match.groups()
        if inside in _LAYER_SCALE:
            return f'layers.{index}.{_LAYER_SCALE[inside]}'
        stem, _, leaf = inside.rpartition('.')
        return f'layers.{index}.{_BLOCK[stem]}.{leaf}' \
            if stem in _BLOCK else None
    return f'{_TOP[stem]}.{leaf}' if stem in _TOP else None
