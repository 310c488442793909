"""Which student block learns from which teacher block."""
from typing import List, Literal, Sequence

import numpy as np

from mmsinger.errors import ConfigError

LayerMap = Literal['relative', 'official']


def map_layers(teacher_layers: Sequence[int], teacher_depth: int,
               student_depth: int, layer_map: LayerMap = 'relative'
               ) -> List[int]:
    """Derive student layers from teacher layers.

    Args:
        teacher_layers (Sequence[int]): Indices, from 0.
        teacher_depth (int): Number of teacher blocks.
        student_depth (int): Number of student blocks.
        layer_map (str): ``'relative'``: the student block that ends at the
            same relative depth, hence last to last. ``'official'``: the
            one-to-one map of the official code, which pairs ``l / L_T`` with
            ``linspace(0, 1, L_S)`` at the least total distance; for equal
            depths it may leave the student's last block without supervision.
            Defaults to ``'relative'``.

    Returns:
        list[int]: One student index for each teacher layer.

    Raises:
        ConfigError: If the official map has more layers than student blocks.
    """
    if layer_map == 'relative':
        return [max(0, round((layer + 1) / teacher_depth * student_depth) - 1)
                for layer in teacher_layers]
    from scipy.optimize import linear_sum_assignment
    if len(teacher_layers) > student_depth:
        raise ConfigError(
            f"layer_map='official' pairs layers one to one, but there are "
            f'{len(teacher_layers)} teacher layers and {student_depth} '
            "student blocks. Use layer_map='relative'.")
    teacher = np.divide(teacher_layers, teacher_depth)
    student = np.linspace(0, 1, student_depth)
    distance = np.abs(teacher[:, None] - student[None, :])
    return linear_sum_assignment(distance)[1].tolist()
