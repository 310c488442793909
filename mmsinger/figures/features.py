"""What figures show of a batch: its images, and their tokens."""
from typing import Dict, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from mmsinger.models import FeatureDistiller
from mmsinger.models.features.tokens import Tokens


class Features(NamedTuple):
    """Tokens of a batch at one distilled layer.

    Attributes:
        teacher (Tokens): F, in the space that ``target_norm`` makes.
        target (Tokens, optional): What the steps in ``targets`` make of
            them, such as F_hat; None without steps.
        student (Tokens): The student's own tokens, on its own grid.
        standardised (bool): Whether that space is the standardised one.
            Defaults to False.
    """
    teacher: Tokens
    target: Optional[Tokens]
    student: Tokens
    standardised: bool = False


@torch.no_grad()
def extract_features(distiller: FeatureDistiller, inputs: Tensor
                     ) -> Dict[int, Features]:
    """Run teacher, target steps and student on images.

    Args:
        distiller (FeatureDistiller): With its teacher and steps loaded.
        inputs (Tensor): Preprocessed images, shape (B, 3, H, W).

    Returns:
        dict[int, Features]: By teacher layer.
    """
    outputs = distiller.run_teacher(inputs)
    student = distiller.student_tokens(inputs)
    targets: Dict[int, Tokens] = {}
    if distiller.steps:
        targets, _ = distiller.make_targets(outputs)
    return {layer: Features(
                outputs.tokens(layer), targets.get(layer), student[layer],
                distiller.target_norms[str(layer)].mode == 'standardise')
            for layer in distiller.layers}


def pictures_of(distiller: FeatureDistiller, inputs: Tensor) -> np.ndarray:
    """Preprocessed images as one sees them.

    Args:
        distiller (FeatureDistiller): Whose data preprocessor made them.
        inputs (Tensor): Shape (B, C, H, W).

    Returns:
        np.ndarray: RGB, (B, H, W, 3), uint8; grey, the mean over channels,
            where C is not 3.
    """
    images = distiller.student_normalisation.undo(
        inputs.detach().float().cpu())
    # Read as BGR; turned into RGB by mmpretrain, OneDL's mmseg, original mmseg
    if not any(getattr(distiller.data_preprocessor, name, False) for name in (
            'to_rgb', '_channel_conversion', 'channel_conversion')):
        images = images.flip(1)
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return images.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
