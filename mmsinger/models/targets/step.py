"""A step on the way from a teacher's tokens to a student's targets."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.features.tokens import Padding, Tokens

Targets = Dict[int, Tokens]

#: Layers to their patch tokens on the calibration images, raw, (n, D) each
Look = Callable[[List[int]], Dict[int, Tensor]]


class TeacherOutputs:
    """One pass of a teacher, in the space that ``target_norm`` makes.

    Args:
        taps (BlockTaps): Of the pass.
        norms (nn.ModuleDict): A :class:`TargetNorm` for each tapped layer.
        records (Sequence[StepRecord]): Of hooks that measure this step, to
            be given what a step makes of the tokens.
        padding (Padding, optional): Of the batch; tokens on it weigh nothing.
            Defaults to None, no padding.
    """

    def __init__(self, taps: BlockTaps, norms: nn.ModuleDict,
                 records: Sequence[Any] = (),
                 padding: Optional[Padding] = None) -> None:
        self.taps = taps
        self.norms = norms
        self.records = records
        self.padding = padding

    def tokens(self, layer: int) -> Tokens:
        """F, a block's output, normalised; values of shape (B, N, D)."""
        tokens = self.taps.tokens(layer)
        tokens = tokens._replace(
            values=self.norms[str(layer)].normalise(tokens.values))
        return tokens if self.padding is None else self.padding.weigh(tokens)

    def next_block(self, layer: int, tokens: Tokens) -> Tokens:
        """What the block after a layer makes of other tokens of that layer.

        Args:
            layer (int): The layer, not the last one.
            tokens (Tokens): Normalised, of the whole batch or of some of its
                images; values of shape (B', N, D).

        Returns:
            Tokens: Normalised as the next block's output is, (B', N, D).
        """
        restored = self.norms[str(layer)].restore(tokens.values)
        return tokens._replace(values=self.norms[str(layer + 1)].normalise(
            self.taps.rerun(layer + 1, restored)))


class TargetStep(nn.Module):
    """Changes targets, weighs their tokens, or adds losses of its own.

    Steps stand in ``model.targets``, a list like a data pipeline, and are
    taken in its order. The distiller holds what trains in a step under the
    step's own name for it (``adapters``), so that its place in the list does
    not show in checkpoints.

    Attributes:
        place (str): Where its settings stand in the config, for messages.
        start_only (tuple[str]): Those that are read before a run's first step
            alone; what came of them is in its checkpoints.
        found_anew (tuple[str]): Parts that a checkpoint may lack: they are
            calibrated then.
        keeps_values (bool): Whether targets keep their values, if not their
            weights.
    """

    place = 'model.targets'
    start_only: Tuple[str, ...] = ()
    found_anew: Tuple[str, ...] = ()
    keeps_values = False

    def prepare(self, teacher: nn.Module, layers: List[int]) -> None:
        """Called once, when the teacher is built.

        Args:
            teacher (FrozenTeacher): Its weights are not loaded yet.
            layers (list[int]): The distilled layers.

        Raises:
            ConfigError: If the step cannot work on this teacher.
        """

    def extra_layers(self, layers: Sequence[int]) -> List[int]:
        """Teacher blocks to be tapped beside the distilled ones."""
        return []

    def init_weights(self, teacher: nn.Module) -> None:
        """Called when the teacher's weights are loaded, in full precision.

        Args:
            teacher (FrozenTeacher): The teacher.
        """

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`calibrate` is still to be called before the first
        step: a part of the step says that it is not ``calibrated``."""
        return not all(getattr(part, 'calibrated', True)
                       for part in self.modules() if part is not self)

    def calibrate_teacher(self, look: Look) -> str:
        """Look at training images before anything else is calibrated, and
        change the teacher by what is found.

        Args:
            look (Callable): Runs the teacher as it is now, and returns raw
                patch tokens of many images, (n, D), of the given layers.

        Returns:
            str: What was found, for the log; empty if the step leaves the
            teacher alone.
        """
        return ''

    def calibrate(self, patches: Dict[int, Tensor]) -> str:
        """Look at training images before the first step.

        Args:
            patches (dict[int, Tensor]): Normalised patch tokens of many
                images by layer, each of shape (n, D), float32.

        Returns:
            str: What was found, for the log.
        """
        return ''

    def forward(self, targets: Targets, outputs: TeacherOutputs
                ) -> Tuple[Targets, Dict[str, Tensor]]:
        """Take the step.

        Args:
            targets (dict[int, Tokens]): By teacher layer, as the step before
                left them; values of shape (B, N, D).
            outputs (TeacherOutputs): Of the teacher's pass.

        Returns:
            tuple[dict[int, Tokens], dict[str, Tensor]]: The new targets, and
            losses (scalars) by name.
        """
        raise NotImplementedError
