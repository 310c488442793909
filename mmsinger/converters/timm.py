"""timm's VisionTransformer keys to mmpretrain's."""
from typing import Dict

from torch import Tensor

from mmsinger.converters.layouts import rename


def timm_to_mmpretrain(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Rename the weights of a timm ViT for mmpretrain's VisionTransformer.

    Names alone: see :func:`mmsinger.converters.convert` for position
    embeddings of another size or without a class token, and registers.

    Args:
        state_dict (dict[str, Tensor]): Of a timm ``VisionTransformer``
            (augreg, DeiT, with or without LayerScale); heads are dropped.

    Returns:
        dict[str, Tensor]: Loads strictly into ``VisionTransformer`` with
        ``layer_scale_init_value`` set if there is LayerScale.

    Raises:
        ConfigError: If a key is not known.
    """
    return {target: state_dict[source]
            for source, target, _ in rename(state_dict, 'timm') if target}
