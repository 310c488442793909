"""Patch norms of the teacher before and after refinement."""
from typing import Dict, Tuple

import torch
from torch import Tensor

from mmsinger.models import SiNGERDistiller


@torch.no_grad()
def refined_norm_maps(distiller: SiNGERDistiller, inputs: Tensor
                      ) -> Dict[int, Tuple[Tensor, Tensor]]:
    """Norms of patch tokens, arranged as images (Figure 2).

    Args:
        distiller (SiNGERDistiller): With its teacher and adapters loaded.
        inputs (Tensor): Preprocessed images, shape (B, 3, H, W).

    Returns:
        dict[int, tuple[Tensor, Tensor]]: For each distilled layer the norms
        of F and of F_hat, each (B, h, w), in the space that ``target_norm``
        defines.
    """
    taps = distiller.teacher(inputs, distiller.layers,
                             distiller.student_normalisation)
    maps = {}
    for layer in distiller.layers:
        tokens = distiller.teacher_tokens(taps, layer)
        refined = distiller.adapters[str(layer)](tokens.patches)
        maps[layer] = tuple(
            patches.float().norm(dim=-1).unflatten(1, tokens.grid)
            for patches in (tokens.patches, refined))
    return maps
