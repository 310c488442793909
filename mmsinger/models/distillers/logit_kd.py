"""Distillation of class logits (arXiv 1503.02531)."""
from typing import Annotated, Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.models.distillers.base import BaseDistiller
from mmsinger.models.features.anatomy import (find_part, fixed_input_size,
                                              image_channels)
from mmsinger.models.features.tokens import Padding, find_padding
from mmsinger.models.teachers.frozen import FrozenClassifier
from mmsinger.registry import MODELS, build_part
from mmsinger.schema import DefaultType

LogitLossConfig = Annotated[dict, DefaultType('mmsinger.LogitKLLoss')]


@MODELS.register_module()
class LogitKDDistiller(BaseDistiller):
    """The student's class distribution follows the teacher's.

    For two classifiers (mmpretrain) or two segmentors (mmseg) of the same
    classes, of any architecture. A segmentor's distributions are compared
    pixel by pixel, on the grid of the student's decode head; pixels without
    a label count too, padding and auxiliary heads do not.

    Args:
        student (dict): Config of a model with a head.
        teacher (dict): Arguments of :class:`FrozenClassifier`: a whole model,
            head included.
        loss_kd (dict): Defaults to ``dict(
            type='mmsinger.LogitKLLoss', temperature=4.0, loss_weight=1.0)``.
        **kwargs: See :class:`BaseDistiller`. With ``task_loss_weight=0``
            the student never sees a label.

    Raises:
        ConfigError: If a value is not valid, a model gives no class logits
            or the two do not have the same classes.
    """

    teacher_class = FrozenClassifier

    def __init__(self, loss_kd: LogitLossConfig = dict(), **kwargs: Any
                 ) -> None:
        kd = build_part('model.loss_kd', loss_kd, 'mmsinger.LogitKLLoss')
        super().__init__(**kwargs)
        self.loss_kd = kd
        ours = find_classes(self.student, 'student')
        theirs = find_classes(self.teacher.model, 'teacher.model')
        if ours != theirs:
            raise ConfigError(
                f'student and teacher do not have the same classes: {ours} '
                f'and {theirs}. Set num_classes of the two heads to what the '
                'data set has.')
        self._freeze_unreached(
            self.student, sum_of_logits,
            'that the logits do not depend on (auxiliary heads)')

    def run_teacher(self, inputs: Tensor,
                    data_samples: Optional[list] = None
                    ) -> Tuple[Tensor, Optional[Padding]]:
        return (self.teacher(inputs, self.student_normalisation),
                find_padding(inputs, data_samples))

    def run_student(self, inputs: Tensor, data_samples: Optional[list]
                    ) -> Tuple[Dict[str, Any], Tensor]:
        if self.task_loss_weight == 0:
            return {}, self.student(inputs)
        # mmseg calls the forward() of a decode head without its hooks, but
        # not that of its last layer
        last = self.student.decode_head.conv_seg \
            if hasattr(self.student, 'decode_head') else self.student.head
        outputs = []
        with last.register_forward_hook(
                lambda module, args, logits: outputs.append(logits)):
            losses = self.task_losses(inputs, data_samples)
        return losses, outputs[-1]

    def distill(self, targets: Tuple[Tensor, Optional[Padding]],
                student_outputs: Tensor) -> Dict[str, Tensor]:
        """L_KD between logits, see :meth:`BaseDistiller.distill`."""
        logits, padding = targets
        # Losses of other packages need not know weights
        weight = {} if padding is None or student_outputs.dim() != 4 else dict(
            weight=padding.shares(student_outputs.shape[2:]).to(
                student_outputs.device, non_blocking=True))
        return dict(loss_kd=self.loss_kd(student_outputs, logits, **weight))


def sum_of_logits(model: nn.Module) -> Tensor:
    """The sum of a model's logits for a small random image."""
    size = fixed_input_size(model) or (64, 64)
    return model(torch.randn(1, image_channels(model), *size)).sum()


def find_classes(model: nn.Module, owner: str) -> int:
    """How many classes a model tells apart.

    Args:
        model (nn.Module): A mmpretrain ImageClassifier or a mmseg
            EncoderDecoder.
        owner (str): Its config key, for error messages.

    Returns:
        int: The number of logits.

    Raises:
        ConfigError: If it gives no class logits, or one alone.
    """
    head = find_part(model, 'head')
    is_dense = hasattr(model, 'decode_head')
    # VPDDepthHead, for one, calls its depth a class
    classes = getattr(getattr(head, 'conv_seg', None), 'out_channels', None) \
        if is_dense else getattr(head, 'num_classes', None)
    if classes is None or classes < 2:
        raise ConfigError(
            f'{owner}: {type(model).__name__} with {type(head).__name__} '
            'gives no class logits. LogitKDDistiller needs a mmpretrain '
            'ImageClassifier whose head has num_classes, or a mmseg '
            'EncoderDecoder whose decode_head ends in conv_seg, of two or '
            'more classes.')
    return classes
