"""Tokens of teacher, refined teacher and student for the same images."""
from typing import Dict, NamedTuple, Optional

import torch
from torch import Tensor

from mmsinger.analysis.measure import student_tokens
from mmsinger.models import FeatureDistiller, SiNGERDistiller
from mmsinger.models.features.tokens import Tokens


class Features(NamedTuple):
    """Of one distilled layer, for a batch.

    Attributes:
        teacher (Tokens): F, in the space that ``target_norm`` makes.
        refined (Tokens, optional): F_hat; None without adapters.
        student (Tokens): The student's own tokens, on its own grid.
    """
    teacher: Tokens
    refined: Optional[Tokens]
    student: Tokens


@torch.no_grad()
def extract_features(distiller: FeatureDistiller, inputs: Tensor
                     ) -> Dict[int, Features]:
    """Run teacher, adapters and student on images.

    Args:
        distiller (FeatureDistiller): With its teacher and adapters loaded.
            The student's mode (training or evaluation) is left as it was.
        inputs (Tensor): Preprocessed images, shape (B, 3, H, W).

    Returns:
        dict[int, Features]: By teacher layer.
    """
    taps = distiller.teacher(inputs, distiller.layers,
                             distiller.student_normalisation)
    training = distiller.training
    distiller.eval()
    try:
        student = student_tokens(distiller, inputs)
    finally:
        distiller.train(training)
    features = {}
    for layer in distiller.layers:
        teacher = distiller.teacher_tokens(taps, layer)
        refined = None
        if isinstance(distiller, SiNGERDistiller):
            refined = distiller.refine(layer, teacher)[0]
        features[layer] = Features(teacher, refined, student[layer])
    return features
