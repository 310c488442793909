"""Patch norms of the teacher before and after refinement."""
from typing import Dict, Tuple

from torch import Tensor

from mmsinger.figures.features import extract_features
from mmsinger.metrics.norms import token_norms
from mmsinger.models import SiNGERDistiller
from mmsinger.models.features.tokens import Tokens


def norm_map(tokens: Tokens) -> Tensor:
    """Norms of patch tokens, arranged as images: (B, h, w), float32."""
    return token_norms(tokens.patches).unflatten(1, tuple(tokens.grid))


def refined_norm_maps(distiller: SiNGERDistiller, inputs: Tensor
                      ) -> Dict[int, Tuple[Tensor, Tensor]]:
    """Norms of patch tokens before and after refinement (Figure 2).

    Args:
        distiller (SiNGERDistiller): With its teacher and adapters loaded.
        inputs (Tensor): Preprocessed images, shape (B, 3, H, W).

    Returns:
        dict[int, tuple[Tensor, Tensor]]: For each distilled layer the norms
        of F and of F_hat, each (B, h, w), in the space that ``target_norm``
        defines.
    """
    return {
        layer: (norm_map(features.teacher), norm_map(features.refined))
        for layer, features in extract_features(distiller, inputs).items()
    }
