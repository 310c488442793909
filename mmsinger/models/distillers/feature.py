"""What the methods that compare block outputs share."""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, check_choice
from mmsinger.models.distillers.base import (BaseDistiller, build_loss,
                                             reached_parameters)
from mmsinger.models.distillers.layer_map import LAYER_MAPS, map_layers
from mmsinger.models.distillers.step_record import StepRecord, Value
from mmsinger.models.features.compiled_blocks import compile_blocks
from mmsinger.models.features.taps import (Blocks, BlockTaps, Layer,
                                           find_blocks, fixed_input_size,
                                           in_channels, patch_stride,
                                           resolve_layer)
from mmsinger.models.features.tokens import Tokens, align_tokens
from mmsinger.models.losses import FeatureMSELoss
from mmsinger.models.targets.filter import TargetCure
from mmsinger.models.targets.normalise import MODES as TARGET_NORMS
from mmsinger.models.targets.normalise import TargetNorm


class FeatureDistiller(BaseDistiller):
    """A student that learns from a frozen teacher's block outputs.

    A method is a subclass with a :meth:`distill`.

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
        clip (dict, optional): Shorten targets of abnormal norm, see
            :class:`TargetCure`. Defaults to None, not at all.
        mask (dict | str, optional): Leave such targets out, see
            :class:`TargetCure`. Defaults to None, none.
        task_loss_weight (float): Factor of the student's own losses. 0 trains
            on features alone: labels are not used, heads not run, and what
            follows the last distilled block keeps its weights. Defaults
            to 1.0.
        compile (bool | dict): Compile the blocks of teacher and student with
            ``torch.compile``; a dict holds its options. ``tools/train.py``
            sets it where a config has mmengine's ``compile``. Defaults to
            False.
        loss_kd (dict): Config of the loss between projected student tokens
            and targets. Defaults to ``dict(type='mmsinger.FeatureMSELoss')``.
        data_preprocessor (dict, optional): See :class:`BaseDistiller`.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    required_hooks = ('TargetNormHook', *BaseDistiller.required_hooks)
    layer_maps = LAYER_MAPS

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 layers: Optional[Sequence[Layer]] = None,
                 student_layers: Optional[Sequence[Layer]] = None,
                 layer_map: str = 'relative',
                 target_norm: Optional[str] = None,
                 clip: Optional[dict] = None,
                 mask: Union[dict, str, None] = None,
                 compile: Union[bool, dict] = False,
                 loss_kd: Optional[dict] = None,
                 **kwargs: Any) -> None:
        check_choice('layer_map', layer_map, self.layer_maps)
        check_choice('target_norm', target_norm, TARGET_NORMS)
        if clip is not None and target_norm == 'layernorm':
            raise ConfigError(
                "clip has no effect with target_norm='layernorm', which "
                'gives all targets the same norm. Use '
                "target_norm='standardise' or None.")
        cure = TargetCure(clip, mask)
        kd = build_loss('loss_kd', loss_kd, 'mmsinger.FeatureMSELoss')
        super().__init__(student=student, teacher=teacher, **kwargs)
        self.cure = cure
        cure.check_teacher(self.teacher)
        self.find_student_blocks()
        self.layers = self._resolve_layers(
            self.teacher.layers if layers is None else layers)
        self.student_layers = self._resolve_student_layers(
            student_layers, layer_map)
        self._check_same_images()
        self._check_task_loss()

        dim = self.teacher.blocks.dim
        self.projectors = nn.ModuleDict({
            str(layer): nn.Linear(self._student_blocks.dim, dim)
            for layer in self.layers
        })
        self.target_norms = nn.ModuleDict({
            str(layer): TargetNorm(dim, target_norm)
            for layer in self.layers
        })
        self.loss_kd = kd
        self._compile = compile
        # Put here by hooks, for the steps that they measure
        self.records: List[StepRecord] = []
        if self.task_loss_weight == 0:
            self._freeze_what_features_do_not_reach()

    def distill(self, taps: BlockTaps, student_tokens: Dict[int, Tokens]
                ) -> Dict[str, Tensor]:
        """Losses between teacher and student tokens.

        Args:
            taps (BlockTaps): Of the teacher's pass; holds the outputs of
                :attr:`tapped_teacher_layers`.
            student_tokens (dict[int, Tokens]): Raw student tokens by teacher
                layer, on the student's grid.

        Returns:
            dict[str, Tensor]: Scalars by name; those whose name has ``loss``
            in it are summed for training.
        """
        raise NotImplementedError

    @property
    def tapped_teacher_layers(self) -> List[int]:
        """Teacher blocks whose outputs :meth:`distill` reads."""
        return self.layers

    # -- building ----------------------------------------------------------

    def find_student_blocks(self) -> Blocks:
        """Find the student's blocks, anew where they have been wrapped."""
        self._student_blocks = find_blocks(self.student_backbone, 'student')
        return self._student_blocks

    def _resolve_layers(self, layers: Sequence[Layer]) -> List[int]:
        if isinstance(layers, (int, str)) or not len(layers):
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
        blocks = self._student_blocks
        if layers is None:
            return map_layers(self.layers, len(self.teacher.blocks),
                              len(blocks), layer_map)
        if isinstance(layers, (int, str)) or \
                len(layers) != len(self.layers):
            raise ConfigError(
                f'student_layers={layers!r} must name one student block for '
                f'each of the {len(self.layers)} teacher layers '
                f'{self.layers}.')
        return [resolve_layer(layer, blocks, 'student_layers')
                for layer in layers]

    def _check_same_images(self) -> None:
        ours = in_channels(self._student_blocks.patch_embed)
        theirs = in_channels(self.teacher.blocks.patch_embed)
        if ours != theirs:
            raise ConfigError(
                f'teacher and student have no common input: the student '
                f'takes images of {ours} channels, the teacher of {theirs}. '
                'Set in_channels of the student (or of teacher.backbone) so '
                'that they agree.')

    @property
    def _not_reached(self) -> str:
        return f'after block {max(self.student_layers)} (final norm, heads)'

    def _parameters_reached(self) -> set:

        def run(backbone: nn.Module) -> Tensor:
            blocks = find_blocks(backbone, 'student')
            size = fixed_input_size(backbone) or tuple(
                2 * step for step in patch_stride(blocks.patch_embed))
            with BlockTaps(blocks, self.student_layers, stop=True) as taps:
                taps.run(backbone, torch.randn(
                    1, in_channels(blocks.patch_embed), *size))
            return sum(taps.tokens(layer).values.sum()
                       for layer in set(self.student_layers))

        return reached_parameters(self.student_backbone, run)

    # -- running -----------------------------------------------------------

    def run_teacher(self, inputs: Tensor) -> BlockTaps:
        return self.teacher(inputs, self.tapped_teacher_layers,
                            self.student_normalisation)

    def run_student(self, inputs: Tensor, data_samples: Optional[list]
                    ) -> Tuple[Dict[str, Any], Dict[int, Tokens]]:
        features_only = self.task_loss_weight == 0
        with BlockTaps(self._student_blocks, self.student_layers,
                       stop=features_only) as taps:
            if features_only:
                losses = {}
                taps.run(self.student_backbone, inputs)
            else:
                losses = self.task_losses(inputs, data_samples)
        return losses, self._by_teacher_layer(taps)

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
            with BlockTaps(self._student_blocks, self.student_layers,
                           stop=True) as taps:
                taps.run(self.student_backbone, inputs)
        finally:
            self.train(training)
        return self._by_teacher_layer(taps)

    def _by_teacher_layer(self, taps: BlockTaps) -> Dict[int, Tokens]:
        return {
            layer: taps.tokens(student_layer)
            for layer, student_layer in zip(self.layers, self.student_layers)
        }

    def _check_ready(self) -> None:
        if self._compile is not False:
            # Not while building: a copy made until then is a plain model
            options = {} if self._compile is True else self._compile
            for blocks in (self.teacher.blocks, self._student_blocks):
                compile_blocks(blocks, **options)
            self._compile = False
        if self.needs_calibration:
            raise RuntimeError(
                "target_norm='standardise' has not been calibrated. Add "
                "dict(type='mmsinger.TargetNormHook') to custom_hooks, or "
                'call calibrate_target_norms().')

    def kd_loss(self, layer: int, student: Tokens, target: Tokens) -> Tensor:
        """L_KD of one layer: projected student tokens against a target.

        Args:
            layer (int): The teacher layer.
            student (Tokens): Raw student tokens, (B, n, C_S), any grid.
            target (Tokens): Normalised (and refined) teacher tokens,
                (B, N, D).

        Returns:
            Tensor: A scalar.
        """
        projected, target, weight = self.compare(layer, student, target)
        if isinstance(self.loss_kd, FeatureMSELoss):
            self.record_kd_gradient(layer, projected.values, target.values,
                                    weight)
        weights = {} if weight is None else dict(weight=weight)
        return self.loss_kd(projected.values, target.values, **weights)

    def compare(self, layer: int, student: Tokens, target: Tokens
                ) -> Tuple[Tokens, Tokens, Optional[Tensor]]:
        """Student and target tokens of one layer that correspond, token by
        token and channel by channel.

        Args:
            layer (int): The teacher layer.
            student (Tokens): Raw student tokens, (B, n, C_S), any grid.
            target (Tokens): Normalised (and refined) teacher tokens,
                (B, N, D).

        Returns:
            tuple[Tokens, Tokens, Tensor | None]: Projected student tokens and
            KD targets, (B, k, D); and the weight of each, 0 or 1, of shape
            (B, k), None if all count.
        """
        self.record(layer, student=student)
        target, weight = self.cure(target, self.teacher)
        student, target = align_tokens(student, target)
        projected = self.projectors[str(layer)](student.values)
        norm = self.target_norms[str(layer)]
        if weight is not None:
            weight = nn.functional.pad(
                weight, (target.num_prefix, 0), value=1.)
        return Tokens(projected, target.grid), Tokens(
            norm.target(target.values), target.grid), weight

    def teacher_tokens(self, taps: BlockTaps, layer: int) -> Tokens:
        """Teacher tokens of one layer, normalised as ``target_norm`` says."""
        tokens = taps.tokens(layer)
        norm = self.target_norms[str(layer)]
        tokens = Tokens(norm.normalise(tokens.values), tokens.grid)
        self.record(layer, teacher=tokens)
        return tokens

    # -- what hooks measure ------------------------------------------------

    def record(self, layer: int, **values: Value) -> None:
        """Offer values of a step to :attr:`records`, see
        :class:`StepRecord`."""
        for record in self.records:
            record.add(layer, **values)

    def record_kd_gradient(self, layer: int, pred: Tensor, target: Tensor,
                           weight: Optional[Tensor] = None) -> None:
        """Record how strongly each token pulls at the student (equation 3).

        The gradient of a (weighted) MSE with respect to the prediction of
        token i is ``c w_i (pred_i - target_i)`` with one c for all tokens. Its
        norm, up to c, is ``w_i ||pred_i - target_i||``: no backward pass is
        needed, and the step's own tokens suffice.

        Args:
            layer (int): The teacher layer.
            pred (Tensor): What the MSE compares, (B, k, D).
            target (Tensor): With this, (B, k, D).
            weight (Tensor, optional): Of each token, (B, k). Defaults to
                None, all the same.
        """
        if not self.records:
            return
        norms = torch.linalg.vector_norm(
            pred.detach().float() - target.detach().float(), dim=-1)
        if weight is not None:
            norms = weight * norms
        self.record(layer, kd_gradient=norms)

    # -- calibration -------------------------------------------------------

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`calibrate_target_norms` is still to be called."""
        return any(n.needs_calibration for n in self.target_norms.values())

    @torch.no_grad()
    def calibrate_target_norms(self, batches, tokens_per_image: int = 64
                               ) -> Dict[int, float]:
        """Set the statistics of ``target_norm='standardise'``.

        Args:
            batches (Iterable[Tensor]): Preprocessed images (B, 3, H, W).
            tokens_per_image (int): Patch tokens to keep of each image, evenly
                spaced. Defaults to 64.

        Returns:
            dict[int, float]: The scale of each layer.
        """
        layers = [int(layer) for layer in self.target_norms]
        kept: Dict[int, List[Tensor]] = {layer: [] for layer in layers}
        for inputs in batches:
            taps = self.teacher(inputs, layers, self.student_normalisation)
            for layer in layers:
                patches = taps.tokens(layer).patches
                step = max(1, patches.shape[1] // tokens_per_image)
                kept[layer].append(patches[:, ::step].flatten(0, 1).float())
        if not any(kept.values()):
            raise ConfigError("target_norm='standardise' needs images to "
                              'calibrate on, but there are none.')
        for layer, tokens in kept.items():
            self.target_norms[str(layer)].calibrate(tokens)
        return {layer: self.target_norms[str(layer)].scale.item()
                for layer in layers}
