"""What all feature distillation methods share."""
import copy
import inspect
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsinger.errors import ConfigError, check_choice, check_keys
from mmsinger.models.layer_map import LAYER_MAPS, map_layers
from mmsinger.models.taps import (BlockTaps, Layer, fixed_input_size,
                                  find_blocks, in_channels, patch_stride,
                                  resolve_layer)
from mmsinger.models.target_norm import MODES as TARGET_NORMS
from mmsinger.models.target_norm import TargetNorm
from mmsinger.models.teacher import FrozenTeacher, Normalisation
from mmsinger.models.tokens import Tokens, align_tokens
from mmsinger.registry import MODELS


class BaseDistiller(BaseModel):
    """A student that learns from a frozen teacher's block outputs.

    In ``loss`` mode the teacher and the student see the same batch once each;
    :meth:`distill` turns their tokens into losses, which join the student's
    own. ``predict`` and ``tensor`` go to the student alone. The state dict
    holds everything but the teacher.

    A method is a subclass with a :meth:`distill`.

    Args:
        student (dict): Config of any mmpretrain or mmseg model with a vision
            transformer as ``backbone`` (ImageClassifier, EncoderDecoder,
            DepthEstimator, with or without a head), exactly as in a plain
            config; or of a backbone alone.
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
        task_loss_weight (float): Factor of the student's own losses. 0 trains
            on features alone: labels are not used, heads not run, and what
            follows the last distilled block keeps its weights. Defaults
            to 1.0.
        loss_kd (dict): Config of the loss between projected student tokens
            and targets. Defaults to ``dict(type='mmsinger.FeatureMSELoss')``.
        data_preprocessor (dict, optional): Goes to the student if its config
            has none. Defaults to None.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    # Hooks that a run needs; ``tools/train.py`` adds the ones that a config
    # does not list.
    required_hooks: Tuple[str, ...] = (
        'TargetNormHook', 'StudentCheckpointHook', 'RunGuardHook',
        'RandomStateHook')

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 layers: Optional[Sequence[Layer]] = None,
                 student_layers: Optional[Sequence[Layer]] = None,
                 layer_map: str = 'relative',
                 target_norm: Optional[str] = None,
                 task_loss_weight: float = 1.0,
                 loss_kd: Optional[dict] = None,
                 data_preprocessor: Optional[dict] = None,
                 **unknown: Any) -> None:
        reject_unknown_keys(unknown, type(self))
        if task_loss_weight < 0:
            raise ConfigError('task_loss_weight must not be negative, got '
                              f'{task_loss_weight}.')
        check_choice('layer_map', layer_map, LAYER_MAPS)
        check_choice('target_norm', target_norm, TARGET_NORMS)
        kd = build_loss('loss_kd', loss_kd, 'mmsinger.FeatureMSELoss')
        student_model = build_student(student, data_preprocessor)
        super().__init__(data_preprocessor=getattr(
            student_model, 'data_preprocessor', None) or data_preprocessor)
        self.student = student_model
        self.task_loss_weight = task_loss_weight
        # Not a submodule: never in state_dict(), parameters() or DDP.
        self.__dict__['teacher'] = build_teacher(teacher)

        self._student_blocks = find_blocks(self.student_backbone, 'student')
        self.layers = self._resolve_layers(
            self.teacher.layers if layers is None else layers)
        self.student_layers = self._resolve_student_layers(
            student_layers, layer_map)
        self._check_same_task()

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
        if task_loss_weight == 0:
            self._freeze_what_features_do_not_reach()
        self._register_load_state_dict_pre_hook(self._accept_plain_student)

    # -- what a method implements ------------------------------------------

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

    @property
    def student_backbone(self) -> nn.Module:
        """The student's vision transformer."""
        return getattr(self.student, 'backbone', self.student)

    def init_weights(self) -> None:
        """Initialise the student as its config says, then load the
        teacher."""
        super().init_weights()
        self.teacher.load_weights()

    def _accept_plain_student(self, state_dict: Dict[str, Tensor],
                              prefix: str, *_) -> None:
        """Let ``load_from`` take a checkpoint of the plain student too: its
        keys lack ``student.``, and would all be passed over."""
        if any(k.startswith(f'{prefix}student.') for k in state_dict):
            return
        plain = [name for name in self.student.state_dict()
                 if prefix + name in state_dict]
        for name in plain:
            state_dict[f'{prefix}student.{name}'] = \
                state_dict.pop(prefix + name)
        if plain:
            print_log(f'{len(plain)} tensors of a plain checkpoint go to the '
                      'student', logger='current')

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

    def _check_same_task(self) -> None:
        ours = in_channels(self._student_blocks.patch_embed)
        theirs = in_channels(self.teacher.blocks.patch_embed)
        if ours != theirs:
            raise ConfigError(
                f'teacher and student have no common input: the student '
                f'takes images of {ours} channels, the teacher of {theirs}. '
                'Set in_channels of the student (or of teacher.backbone) so '
                'that they agree.')
        if self.task_loss_weight > 0 and not has_head(self.student):
            raise ConfigError(
                f'task_loss_weight={self.task_loss_weight}, but the student '
                f'{type(self.student).__name__} has no head to compute a '
                'task loss with. Set task_loss_weight=0 (features only), or '
                'give it a head.')

    def _freeze_what_features_do_not_reach(self) -> None:
        """Without a task loss the final norm, the heads and the blocks after
        the last distilled one get no gradient. DDP refuses parameters without
        gradients, so they are marked as frozen."""
        reached = self._parameters_reached()
        frozen = 0
        for parameter in self.student.parameters():
            if parameter.requires_grad and id(parameter) not in reached:
                parameter.requires_grad_(False)
                frozen += parameter.numel()
        if frozen:
            print_log(
                f'task_loss_weight=0: {frozen:,} student parameters after '
                f'block {max(self.student_layers)} (final norm, heads) get '
                'no gradient and stay as they are', logger='current')

    def _parameters_reached(self) -> set:
        """Identities of the student parameters that the distilled features
        depend on, from one small forward pass."""
        # On a copy: EVA-02 for one keeps buffers of the last image's size
        backbone = copy.deepcopy(self.student_backbone)
        backbone.eval()
        blocks = find_blocks(backbone, 'student')
        size = fixed_input_size(backbone) or \
            tuple(2 * step for step in patch_stride(blocks.patch_embed))
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), \
                BlockTaps(blocks, self.student_layers, stop=True) as taps:
            taps.run(backbone, torch.randn(
                1, in_channels(blocks.patch_embed), *size))
            total = sum(taps.tokens(layer).values.sum()
                        for layer in set(self.student_layers))
        total.backward()  # not autograd.grad(): checkpointing refuses it
        return {id(original) for original, copied in zip(
            self.student_backbone.parameters(), backbone.parameters())
            if copied.grad is not None}

    # -- running -----------------------------------------------------------

    def forward(self, inputs: Tensor, data_samples: Optional[list] = None,
                mode: str = 'tensor') -> Union[Dict[str, Tensor], list,
                                               Tensor, tuple]:
        """As any OpenMMLab model.

        Args:
            inputs (Tensor): Preprocessed images, shape (B, 3, H, W).
            data_samples (list, optional): Their annotations.
            mode (str): ``'loss'``, ``'predict'`` or ``'tensor'``.

        Returns:
            In ``loss`` mode a dict of losses; otherwise what the student
            returns.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if self.student_backbone is self.student:
            return self.student(inputs)
        return self.student(inputs, data_samples, mode=mode)

    def loss(self, inputs: Tensor, data_samples: Optional[list]
             ) -> Dict[str, Tensor]:
        """The student's own losses and ``distill.*``.

        Args:
            inputs (Tensor): Preprocessed images, shape (B, 3, H, W).
            data_samples (list, optional): Annotations; not read if
                ``task_loss_weight`` is 0.

        Returns:
            dict[str, Tensor]: Losses by name.
        """
        self._check_ready()
        taps = self.teacher(inputs, self.tapped_teacher_layers,
                            self.student_normalisation)
        losses, tokens = self._run_student(inputs, data_samples)
        for name, value in self.distill(taps, tokens).items():
            losses[f'distill.{name}'] = value
        return losses

    def _check_ready(self) -> None:
        if self.needs_calibration:
            raise RuntimeError(
                "target_norm='standardise' has not been calibrated. Add "
                "dict(type='mmsinger.TargetNormHook') to custom_hooks, or "
                'call calibrate_target_norms().')

    def _run_student(self, inputs: Tensor, data_samples: Optional[list]
                     ) -> Tuple[Dict[str, Any], Dict[int, Tokens]]:
        features_only = self.task_loss_weight == 0
        with BlockTaps(self._student_blocks, self.student_layers,
                       stop=features_only) as taps:
            if features_only:
                losses = {}
                taps.run(self.student_backbone, inputs)
            else:
                losses = self.student.loss(inputs, data_samples)
        if self.task_loss_weight not in (0, 1):
            losses = {name: _scaled(value, self.task_loss_weight)
                      if 'loss' in name else value
                      for name, value in losses.items()}
        return dict(losses), {
            layer: taps.tokens(student_layer)
            for layer, student_layer in zip(self.layers, self.student_layers)
        }

    @property
    def student_normalisation(self) -> Normalisation:
        """What the data preprocessor normalised the images with."""
        preprocessor = self.data_preprocessor
        if not getattr(preprocessor, '_enable_normalize', False):
            return Normalisation(None, None)
        if not hasattr(self, '_normalisation'):  # read once: it is a sync
            self._normalisation = Normalisation(
                tuple(preprocessor.mean.flatten().tolist()),
                tuple(preprocessor.std.flatten().tolist()))
        return self._normalisation

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
        student, target = align_tokens(student, target)
        projected = self.projectors[str(layer)](student.values)
        norm = self.target_norms[str(layer)]
        return self.loss_kd(projected, norm.target(target.values))

    def teacher_tokens(self, taps: BlockTaps, layer: int) -> Tokens:
        """Teacher tokens of one layer, normalised as ``target_norm`` says."""
        tokens = taps.tokens(layer)
        norm = self.target_norms[str(layer)]
        return Tokens(norm.normalise(tokens.values), tokens.grid)

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

    # -- the teacher is no submodule ---------------------------------------

    def _apply(self, fn, *args, **kwargs):
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


def reject_unknown_keys(unknown: Dict[str, Any], cls: type) -> None:
    """Raise :class:`ConfigError` for arguments that no class of ``cls``'s
    ancestry takes, listing near matches."""
    if not unknown:
        return
    known = set()
    for ancestor in cls.__mro__:
        if ancestor is BaseModel:
            break
        known.update(argument_names(ancestor))
    check_keys('model', unknown, sorted(known), cls.__name__)


def argument_names(cls: type) -> List[str]:
    """What a constructor takes by name."""
    return [name for name, p in inspect.signature(
        cls.__init__).parameters.items()
        if name != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def build_loss(key: str, cfg: Optional[dict], default: str) -> nn.Module:
    """Build one of the distiller's losses.

    Args:
        key (str): Its config key, for error messages.
        cfg (dict, optional): Its config; ``type`` may be left out.
        default (str): The type then.

    Returns:
        nn.Module: The loss.

    Raises:
        ConfigError: If its class does not take one of the keys.
    """
    if cfg is not None and not isinstance(cfg, dict):
        raise ConfigError(f'model.{key} must be a dict, got {cfg!r}. For '
                          f'instance dict(type={default!r}, loss_weight=1.0).')
    cfg = {'type': default, **(cfg or {})}
    cls = MODELS.get(cfg['type']) if isinstance(cfg['type'], str) \
        else cfg['type']
    if cls is None:
        raise ConfigError(f"model.{key}.type={cfg['type']!r}: there is no "
                          'such loss. Write its scope too, as in '
                          f'{default!r}.')
    if inspect.isclass(cls) and issubclass(cls, nn.Module) and not any(
            p.kind is p.VAR_KEYWORD for p in
            inspect.signature(cls.__init__).parameters.values()):
        check_keys(f'model.{key}', cfg,
                   ['type', '_scope_', *argument_names(cls)], cls.__name__)
    return MODELS.build(cfg)


def build_student(cfg: dict, data_preprocessor: Optional[dict]) -> nn.Module:
    """Build the student from its plain config.

    Args:
        cfg (dict): Of a model or of a backbone.
        data_preprocessor (dict, optional): For a model that has none.

    Returns:
        nn.Module: The student.
    """
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ConfigError('student must be a model config with a type, got '
                          f'{cfg!r}.')
    cfg = dict(cfg)
    if 'backbone' in cfg and data_preprocessor is not None:
        cfg.setdefault('data_preprocessor', data_preprocessor)
    return MODELS.build(cfg)


def build_teacher(cfg: dict) -> FrozenTeacher:
    """Build the teacher from the arguments of :class:`FrozenTeacher`."""
    if not isinstance(cfg, dict) or 'backbone' not in cfg:
        got = sorted(cfg) if isinstance(cfg, dict) else repr(cfg)
        raise ConfigError(
            f'teacher must be dict(backbone=…, checkpoint=…), got {got}.')
    check_keys('model.teacher', cfg, argument_names(FrozenTeacher))
    return FrozenTeacher(**cfg)


def has_head(student: nn.Module) -> bool:
    """Whether a model can compute its own loss."""
    if hasattr(student, 'decode_head'):
        return True
    return getattr(student, 'head', None) is not None


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return [factor * item for item in value]
    return factor * value
