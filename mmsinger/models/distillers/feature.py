"""What the methods that compare block outputs share."""
from functools import partial
from typing import (Annotated, Any, Dict, List, Literal, Optional, Sequence,
                    Tuple, Union)

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, prefixed_errors
from mmsinger.models.distillers.base import BaseDistiller, refuse_same_names
from mmsinger.models.distillers.layer_map import LayerMap, map_layers
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.anatomy import (Features, Layer, at_same_paths,
                                              example_images, find_features,
                                              find_part, resolve_layer)
from mmsinger.models.features.compiled import compile_blocks
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.features.tokens import (Grid, Tokens, align_tokens,
                                             find_padding)
from mmsinger.models.losses import FeatureMSELoss
from mmsinger.models.targets import (ClipNorms, Refine, TargetNorm, TargetStep,
                                     TeacherOutputs)
from mmsinger.models.targets.normalise import Mode
from mmsinger.registry import build_part
from mmsinger.schema import DefaultType

StepConfigs = Union[Sequence[dict], Dict[str, dict]]
FeatureLossConfig = Annotated[dict, DefaultType('mmsinger.FeatureMSELoss')]
Projector = Annotated[dict, DefaultType('mmsinger.LinearProjector')]


class FeatureDistiller(BaseDistiller):
    """A student that learns from a frozen teacher's block outputs.

    The teacher's tokens are normalised (``target_norm``) and pass the steps
    in ``targets``; a method is a subclass with :meth:`distill`, which
    compares the student's tokens with what comes out.

    Args:
        student (dict): See :class:`BaseDistiller`.
        teacher (dict): Arguments of :class:`FrozenTeacher`.
        layers (Sequence[int | str], optional): Teacher blocks whose outputs
            are distilled, by index from 0 or by module path, such as
            ``'layers.17'``. Defaults to None: the teacher's ``layers``, which
            are ``(17, 23)`` if not given, the paper's for 24 blocks.
        student_layers (Sequence[int | str], optional): The student block for
            each of them. Defaults to None: derived by ``layer_map``.
        layer_map (str): ``'relative'`` or ``'official'``, see
            :func:`map_layers`. Defaults to ``'relative'``.
        target_norm (str, optional): ``'standardise'``, ``'layernorm'`` or
            None, see :class:`TargetNorm`. Defaults to None, the paper.
        targets (Sequence[dict] | dict[str, dict]): Configs of the
            :class:`TargetStep` that normalised tokens pass, first to last:
            :class:`RemoveOutlierSubspace`, :class:`ClipNorms`,
            :class:`MaskTokens`, :class:`WeighByEntropy`, :class:`Refine`, or
            your own. As a dict, each has a name by which other configs and
            ``--cfg-options`` can change it. Defaults to none: the tokens as
            they are.
        projector (dict): Config of what brings student tokens to
            the teacher's width, one for each layer:
            :class:`LinearProjector`, :class:`MLPProjector`, or your own.
            Defaults to ``dict(type='mmsinger.LinearProjector')``.
        resample (str): Whose tokens are resampled where the grids of student
            and teacher differ: ``'student'``, to the teacher's grid;
            ``'teacher'``, to the student's, which for a coarse map of a
            pyramid compares fewer cells, none of them interpolated. Defaults
            to ``'student'``.
        compile (bool | dict): Compile the blocks of teacher and student with
            ``torch.compile``; a dict holds its options. ``tools/train.py``
            sets it where a config has mmengine's ``compile``. Defaults to
            False.
        loss_kd (dict): Config of the loss between projected student tokens
            and targets: :class:`FeatureMSELoss`,
            :class:`FeatureSmoothL1Loss`, :class:`FeatureCosineLoss`, or your
            own. Defaults to ``dict(type='mmsinger.FeatureMSELoss')``.
        **kwargs: ``task_loss_weight``, ``teacher_dtype``,
            ``data_preprocessor``: see :class:`BaseDistiller`.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    required_hooks = ('CalibrationHook', *BaseDistiller.required_hooks,
                      'SiNGERAdapterHook', 'DiagnosticsHook')

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 layers: Optional[Sequence[Layer]] = None,
                 student_layers: Optional[Sequence[Layer]] = None,
                 layer_map: LayerMap = 'relative',
                 target_norm: Mode = None,
                 targets: StepConfigs = (),
                 projector: Projector = dict(),
                 resample: Literal['student', 'teacher'] = 'student',
                 compile: Union[bool, dict] = False,
                 loss_kd: FeatureLossConfig = dict(),
                 **kwargs: Any) -> None:
        # Mistakes are found before the models are built, which takes long.
        steps = build_steps(targets, target_norm)
        kd = build_part('model.loss_kd', loss_kd, 'mmsinger.FeatureMSELoss')
        super().__init__(student=student, teacher=teacher, **kwargs)
        self.student_features: Features = find_features(
            self.student_backbone, 'student')
        self.layers = self._resolve_layers(
            self.teacher.layers if layers is None else layers)
        self.student_layers = self._resolve_student_layers(
            student_layers, layer_map)
        self._check_same_images()
        self._check_task_loss()

        dim = self.teacher.blocks.dim
        self.projectors = nn.ModuleDict({
            str(layer): build_part(
                'model.projector', projector, 'mmsinger.LinearProjector',
                in_channels=self.student_features.channels[student_layer],
                out_channels=dim)
            for layer, student_layer in zip(self.layers, self.student_layers)
        })
        self.resample = resample
        self.steps = steps
        for step in steps:
            with prefixed_errors(step.place):
                step.prepare(self.teacher, self.layers)
        #: Teacher blocks that are read: the distilled ones and what steps
        #: ask for
        self.tapped_teacher_layers: List[int] = sorted({
            *self.layers, *(layer for step in steps
                            for layer in step.extra_layers(self.layers))})
        self.target_norms = nn.ModuleDict({
            str(layer): TargetNorm(dim, target_norm)
            for layer in self.tapped_teacher_layers
        })
        self.loss_kd = kd
        self._hold_parts_of_steps()
        self._compile = compile
        self._ready = False
        # Put here by hooks, for the steps that they measure
        self.records: List[StepRecord] = []
        last = self.student_features.paths[max(self.student_layers)]
        self._freeze_unreached(self.student_backbone, self._sum_of_tokens,
                               f'after {last} (final norm, heads)')

    @property
    def refinement(self) -> Optional[Refine]:
        """The step that refines targets; None if no step does."""
        return next((s for s in self.steps if isinstance(s, Refine)), None)

    # -- building ----------------------------------------------------------

    def follow_wrapped_student(self) -> None:
        """Tap the student's blocks or maps where they are now, after they
        have been wrapped in place."""
        self.student_features = at_same_paths(
            self.student_features, self.student_backbone)

    def _hold_parts_of_steps(self) -> None:
        # Under their own names: the order of steps is not in checkpoints
        for step in self.steps:
            for name, part in step.named_children():
                if name in self._modules:
                    raise ConfigError(
                        f'model.targets: {type(step).__name__} cannot hold '
                        f'its {name!r} in the distiller, which has one '
                        'already. A step with parts can be taken once.')
                self.add_module(name, part)

    def _init_from_teacher(self) -> None:
        for step in self.steps:
            step.init_weights(self.teacher)

    def _resolve_layers(self, layers: Sequence[Layer]) -> List[int]:
        if not len(layers):
            raise ConfigError(f'layers={layers!r} must be a list of teacher '
                              'blocks, for instance (17, 23).')
        resolved = [resolve_layer(layer, self.teacher.blocks, 'layers')
                    for layer in layers]
        if sorted(set(resolved)) != resolved:
            raise ConfigError(f'layers={tuple(layers)} must be in ascending '
                              'order, each once.')
        return resolved

    def _resolve_student_layers(self, layers: Optional[Sequence[Layer]],
                                layer_map: str) -> List[int]:
        blocks = self.student_features
        if layers is None:
            return map_layers(self.layers, len(self.teacher.blocks),
                              len(blocks), layer_map)
        if len(layers) != len(self.layers):
            raise ConfigError(
                f'student_layers={layers!r} must name one student block for '
                f'each of the {len(self.layers)} teacher layers '
                f'{self.layers}.')
        resolved = [resolve_layer(layer, blocks, 'student_layers')
                    for layer in layers]
        if sorted(resolved) != resolved:
            raise ConfigError(
                f'student_layers={tuple(layers)} descends, while the teacher '
                f'layers {self.layers} that they learn from ascend. Give them '
                'in ascending order.')
        return resolved

    def _check_same_images(self) -> None:
        ours = self.student_features.in_channels
        theirs = self.teacher.blocks.in_channels
        if ours != theirs:
            raise ConfigError(
                f'teacher and student have no common input: the student '
                f'takes images of {ours} channels, the teacher of {theirs}. '
                'Set in_channels of the student (or of teacher.backbone) so '
                'that they agree.')

    def _check_task_loss(self) -> None:
        if self.task_loss_weight == 0:
            return
        but = f'task_loss_weight={self.task_loss_weight}, but the student ' \
            f'{type(self.student).__name__}'
        if find_part(self.student, 'head') is None:
            raise ConfigError(
                f'{but} has no head to compute a task loss with. Set '
                'task_loss_weight=0 (features only), or give it a head.')
        if any(cls.__name__ == 'BaseSelfSupervisor'  # mmpretrain's
               for cls in type(self.student).__mro__):
            raise ConfigError(
                f'{but} is a method of pre-training, which masks its images '
                'or compares views of them: what its backbone sees there is '
                'not what the teacher sees. Set task_loss_weight=0: its '
                'backbone learns from the teacher alone, on the first view '
                'of each image.')

    def _sum_of_tokens(self, backbone: nn.Module) -> Tensor:
        """A scalar of all that is distilled from a copy of the student's
        backbone."""
        blocks = find_features(backbone, 'student')
        with BlockTaps(blocks, self.student_layers, stop=True) as taps:
            taps.run(backbone, example_images(blocks, backbone))
        return sum(taps.tokens(layer).values.sum()
                   for layer in set(self.student_layers))

    # -- running -----------------------------------------------------------

    def distill(self, targets: Dict[int, Tokens],
                student_tokens: Dict[int, Tokens]) -> Dict[str, Tensor]:
        """Compare student tokens with targets; what a method implements.

        Args:
            targets (dict[int, Tokens]): By teacher layer, in ascending
                order; values of shape (B, N, D), with weights.
            student_tokens (dict[int, Tokens]): Raw student tokens by teacher
                layer, on the student's grid, values of shape (B, n, C_S).

        Returns:
            dict[str, Tensor]: Scalars by name; those whose name has ``loss``
            in it are summed for training.
        """
        raise NotImplementedError

    def run_teacher(self, inputs: Tensor,
                    data_samples: Optional[list] = None) -> TeacherOutputs:
        taps = self.teacher(inputs, self.tapped_teacher_layers,
                            self.student_normalisation)
        return TeacherOutputs(taps, self.target_norms, self.records,
                              find_padding(inputs, data_samples))

    def run_student(self, inputs: Tensor, data_samples: Optional[list]
                    ) -> Tuple[Dict[str, Any], Dict[int, Tokens]]:
        if self.task_loss_weight == 0:
            losses, tokens = {}, self._tap_student(inputs)
        else:
            with BlockTaps(self.student_features, self.student_layers) as taps:
                losses = self.task_losses(inputs, data_samples)
            tokens = self._by_teacher_layer(taps)
        padding = find_padding(inputs, data_samples)
        if padding is not None:
            tokens = {layer: padding.weigh(of_layer)
                      for layer, of_layer in tokens.items()}
        return losses, tokens

    @torch.no_grad()
    def student_tokens(self, inputs: Tensor) -> Dict[int, Tokens]:
        """The student's tokens in evaluation mode, without its heads.

        Args:
            inputs (Tensor): Preprocessed images, shape (B, 3, H, W).

        Returns:
            dict[int, Tokens]: Raw tokens (B, n, C_S) by teacher layer, on the
            student's grid.
        """
        training = self.training
        self.eval()
        try:
            return self._tap_student(inputs)
        finally:
            self.train(training)

    def _tap_student(self, inputs: Tensor) -> Dict[int, Tokens]:
        with BlockTaps(self.student_features, self.student_layers,
                       stop=True) as taps:
            taps.run(self.student_backbone, inputs)
        return self._by_teacher_layer(taps)

    def _by_teacher_layer(self, taps: BlockTaps) -> Dict[int, Tokens]:
        return {
            layer: taps.tokens(student_layer)
            for layer, student_layer in zip(self.layers, self.student_layers)
        }

    def make_targets(self, teacher_outputs: TeacherOutputs
                     ) -> Tuple[Dict[int, Tokens], Dict[str, Tensor]]:
        """Take the teacher's tokens through the steps.

        Args:
            teacher_outputs (TeacherOutputs): Of the teacher's pass.

        Returns:
            tuple[dict[int, Tokens], dict[str, Tensor]]: Targets by teacher
            layer, values of shape (B, N, D), and the losses of the steps.
        """
        targets = {layer: teacher_outputs.tokens(layer)
                   for layer in self.layers}
        for record in self.records:
            for layer, tokens in targets.items():
                record.add(layer, teacher=tokens)
        losses: Dict[str, Tensor] = {}
        for step in self.steps:
            targets, own = step(targets, teacher_outputs)
            refuse_same_names(losses, own, step.place)
            losses.update(own)
        return targets, losses

    def _check_ready(self) -> None:
        if self._ready:
            return
        if self.needs_calibration:
            raise RuntimeError(
                'target_norm or a step in targets has not been calibrated. '
                "Add dict(type='mmsinger.CalibrationHook') to custom_hooks, "
                'or call calibrate().')
        if self._compile is not False:
            # Not while building: a copy made until then is a plain model
            options = {} if self._compile is True else self._compile
            for blocks in (self.teacher.blocks, self.student_features):
                compile_blocks(blocks, **options)
        self._ready = True

    def kd_loss(self, layer: int, student: Tokens, target: Tokens) -> Tensor:
        """L_KD of one layer: projected student tokens against a target.

        Args:
            layer (int): The teacher layer.
            student (Tokens): Raw student tokens, (B, n, C_S), any grid.
            target (Tokens): What the steps made of the teacher's, (B, N, D).

        Returns:
            Tensor: A scalar.
        """
        student, target = self.compare(layer, student, target)
        if self.records and isinstance(self.loss_kd, FeatureMSELoss):
            self.record_kd_gradient(layer, student.values, target.values,
                                    target.grid, target.weight)
        # Losses of other packages need not know weights
        weight = {} if target.weight is None else dict(weight=target.weight)
        return self.loss_kd(student.values, target.values, **weight)

    def compare(self, layer: int, student: Tokens, target: Tokens
                ) -> Tuple[Tokens, Tokens]:
        """Student and target tokens of one layer that correspond, token by
        token and channel by channel.

        Args:
            layer (int): The teacher layer.
            student (Tokens): Raw student tokens, (B, n, C_S), any grid.
            target (Tokens): What the steps made of the teacher's, (B, N, D).

        Returns:
            tuple[Tokens, Tokens]: Projected student tokens and KD targets,
            (B, k, D); the targets' weights are those of the comparison.
        """
        for record in self.records:
            record.add(layer, student=student)
        student, target = align_tokens(student, target, self.resample)
        return (student._replace(
                    values=self.projectors[str(layer)](student.values)),
                target._replace(values=self.target_norms[str(layer)].target(
                    target.values)))

    # -- what hooks measure ------------------------------------------------

    def record_kd_gradient(self, layer: int, pred: Tensor, target: Tensor,
                           grid: Grid, weight: Optional[Tensor] = None
                           ) -> None:
        """Record how strongly each token pulls at the student (equation 3).

        The gradient of a (weighted) MSE with respect to the prediction of
        token i is ``c w_i (pred_i - target_i)`` with one c for all tokens. Its
        norm, up to c, is ``w_i ||pred_i - target_i||``: no backward pass is
        needed, and the step's own tokens suffice.

        Args:
            layer (int): The teacher layer.
            pred (Tensor): What the MSE compares, (B, k, D).
            target (Tensor): With this, (B, k, D).
            grid (tuple[int, int]): Of the patches among the k tokens.
            weight (Tensor, optional): Of each token, (B, k). Defaults to
                None, all the same.
        """
        norms = torch.linalg.vector_norm(
            pred.detach().float() - target.detach().float(), dim=-1,
            keepdim=True)  # (B, k, 1)
        if weight is not None:
            norms = weight.unsqueeze(-1) * norms
        for record in self.records:
            record.add(layer, kd_gradient=Tokens(norms, grid))

    # -- calibration -------------------------------------------------------

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`calibrate` is still to be called."""
        return any(part.needs_calibration for part in (
            *self.target_norms.values(), *self.steps))

    @torch.no_grad()
    def calibrate(self, batches, tokens_per_image: int = 64) -> List[str]:
        """Set the statistics of ``target_norm='standardise'`` and of steps,
        where they have none yet.

        Args:
            batches (Iterable[Tensor | dict]): Preprocessed images
                (B, 3, H, W); or dicts of them, ``inputs``, and their
                ``data_samples``, whose padding does not count.
            tokens_per_image (int): Patch tokens to look at in each image,
                evenly spaced. Defaults to 64.

        Returns:
            list[str]: What was found, for the log.
        """
        batches = [dict(inputs=batch) if isinstance(batch, Tensor) else batch
                   for batch in batches]
        if not batches:
            raise ConfigError('target_norm or a step in targets needs images '
                              'to calibrate on, but there are none.')
        look = partial(self._look, batches, tokens_per_image)
        found = [said for step in self.steps if step.needs_calibration
                 and (said := step.calibrate_teacher(look))]
        patches = look([int(layer) for layer in self.target_norms])
        norms = [norm for norm in self.target_norms.items()
                 if norm[1].needs_calibration]
        for layer, norm in norms:
            norm.calibrate(patches[int(layer)])
        if norms:
            found.append('scale by teacher layer: ' + ', '.join(
                f'{layer}: {norm.scale.item():.4g}' for layer, norm in norms))
        patches = {layer: self.target_norms[str(layer)].normalise(values)
                   for layer, values in patches.items()}
        return found + [step.calibrate(patches) for step in self.steps
                        if step.needs_calibration]

    def _look(self, batches: Sequence[Dict[str, Any]], tokens_per_image: int,
              layers: Sequence[int]) -> Dict[int, Tensor]:
        """Raw patch tokens of images, float32, (n, D) by layer."""
        kept: Dict[int, List[Tensor]] = {layer: [] for layer in layers}
        for batch in batches:
            padding = find_padding(batch['inputs'], batch.get('data_samples'))
            taps = self.teacher(batch['inputs'], layers,
                                self.student_normalisation, count=False)
            for layer in layers:
                tokens = taps.tokens(layer)
                chosen = evenly_spaced(tokens.patches.shape[1],
                                       tokens_per_image)
                patches = tokens.patches[:, chosen].float()  # (B, n, D)
                kept[layer].append(patches.flatten(0, 1) if padding is None
                                   else patches[padding.weigh(
                                       tokens).patch_weight[:, chosen] > 0.99])
        found = {layer: torch.cat(parts) for layer, parts in kept.items()}
        for layer, tokens in found.items():
            if not len(tokens):
                raise ConfigError(
                    'There is nothing but padding in the images to calibrate '
                    'on. Look at train_dataloader.dataset and at size and '
                    'size_divisor of the data preprocessor.')
            if not tokens.isfinite().all():
                raise ConfigError(
                    f'Teacher block {layer} gives values that are not finite '
                    'for training images. Look at model.teacher.checkpoint, '
                    'mean, std and teacher_dtype, and at the images.')
        return found


def evenly_spaced(count: int, most: int) -> Tensor:
    """Places in a row-major grid that come to all of its columns.

    Args:
        count (int): Cells of the grid.
        most (int): The most places.

    Returns:
        Tensor: Indices, all if there are no more than ``most``; else from the
        first to the last at distances that are no whole number, which would
        come back to the same columns.
    """
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def build_steps(cfgs: StepConfigs, target_norm: Optional[str]
                ) -> List[TargetStep]:
    """Build the steps of ``model.targets``.

    Args:
        cfgs (Sequence[dict] | dict[str, dict]): Their configs.
        target_norm (str, optional): The normalisation before them.

    Returns:
        list[TargetStep]: In the same order.

    Raises:
        ConfigError: If one is no step, or has no effect.
    """
    named = cfgs if isinstance(cfgs, dict) else dict(enumerate(cfgs))
    steps = []
    for key, cfg in named.items():
        # SiNGER's own, which has no name, has its settings in the model
        place = f'model.targets.{key}' if key != '' else 'model'
        step = build_part(place, cfg)
        steps.append(step)
        name = type(step).__name__
        if not isinstance(step, TargetStep):
            raise ConfigError(
                f'model.targets: {name} is no step for targets. Choose '
                'RemoveOutlierSubspace, ClipNorms, MaskTokens, '
                'WeighByEntropy, Refine, or a subclass of TargetStep.')
        own = [*step._parameters, *step._buffers]
        if own:
            raise ConfigError(
                f'model.targets: {name} holds {own} itself, which would not '
                'be trained, moved or saved. Put them into a submodule of it.')
        if isinstance(step, ClipNorms) and target_norm == 'layernorm':
            raise ConfigError(
                'model.targets: ClipNorms has no effect with '
                "target_norm='layernorm', which gives all targets the same "
                "norm. Use target_norm='standardise' or None.")
        step.place = place
        if getattr(step, 'gate', None) is not None and not all(
                before.keeps_values for before in steps[:-1]):
            raise ConfigError(
                f'{place}.gate: its threshold is of the tokens of the '
                'teacher, and a step that stands before it changes them. Put '
                'the gated Refine first.')
    return steps
