"""What all distillation methods share: a student and a frozen teacher."""
import copy
from typing import Any, Callable, Dict, Literal, Optional, Tuple, Type, Union

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsinger.checkpoint import safe_loading
from mmsinger.errors import ConfigError, check_keys
from mmsinger.images import first_view
from mmsinger.models.features.anatomy import find_part
from mmsinger.models.teachers.frozen import (PRECISIONS, FrozenModule,
                                             FrozenTeacher, Normalisation)
from mmsinger.registry import (MODELS, arguments_of, check_arguments,
                               find_type)
from mmsinger.schema import NonNegative


class BaseDistiller(BaseModel):
    """A student that learns from a frozen teacher.

    In ``loss`` mode the teacher and the student see the same batch once each.
    :meth:`make_targets` turns what the teacher gave into targets, before the
    student runs, and :meth:`distill` compares the student with them; these
    losses join the student's own. ``predict`` and ``tensor`` go to the
    student alone. The state dict holds everything but the teacher.

    A method is a subclass with :meth:`run_teacher`, :meth:`run_student` and
    :meth:`distill`; one that compares block outputs is a subclass of
    :class:`FeatureDistiller`, with a :meth:`distill` alone.

    Args:
        student (dict): Config of any mmpretrain or mmseg model with a
            ``backbone`` (ImageClassifier, EncoderDecoder, DepthEstimator,
            with or without a head), exactly as in a plain config; or of a
            backbone alone.
        teacher (dict): Arguments of :attr:`teacher_class`.
        task_loss_weight (float): Factor of the student's own losses. 0 trains
            on the teacher alone: labels are not used, and what its outputs do
            not reach keeps its weights. Defaults to 1.0.
        teacher_dtype (str, optional): ``'bf16'``: the teacher is stored and
            run so, whatever the student's precision; half its memory.
            ``'fp32'``: likewise in float32. Defaults to None: stored in
            float32, run as the student (autocast).
        data_preprocessor (dict, optional): Goes to the student if its config
            has none. Defaults to None.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    # The one list of hooks that a run gets; ``prepare_training`` adds those
    # that a config does not list with arguments of its own.
    required_hooks: Tuple[str, ...] = (
        'SafeCheckpointHook', 'StudentCheckpointHook', 'RunGuardHook',
        'RandomStateHook')
    teacher_class = FrozenTeacher
    place = 'model'  # where a config has it, for messages

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 task_loss_weight: NonNegative = 1.0,
                 teacher_dtype: Optional[Literal['fp32', 'bf16']] = None,
                 data_preprocessor: Optional[dict] = None,
                 **unknown: Any) -> None:
        if {'pretrained', 'train_cfg'} <= set(unknown):  # set to None there
            raise ConfigError(
                'The inference functions of mmseg build plain models, no '
                f'{type(self).__name__}. Give them what training wrote for '
                'this: the config NAME_student.py and a checkpoint '
                '…_student.pth of the work dir.')
        check_keys('model', unknown, arguments_of(type(self)).hints,
                   type(self).__name__)
        if not isinstance(student, dict) or 'type' not in student:
            raise ConfigError('student must be a model config with a type, '
                              f'got {student!r}.')
        if 'backbone' in student and data_preprocessor is not None:
            student = {'data_preprocessor': data_preprocessor, **student}
        with safe_loading():
            student_model = MODELS.build(student)
        super().__init__(data_preprocessor=getattr(
            student_model, 'data_preprocessor', None) or data_preprocessor)
        self.student = student_model
        self._student_keys = tuple(student_model.state_dict())
        self.task_loss_weight = task_loss_weight
        self.teacher_dtype = teacher_dtype
        # Not a submodule: never in state_dict(), parameters() or DDP.
        self.__dict__['teacher'] = build_teacher(teacher, self.teacher_class)
        self._register_load_state_dict_pre_hook(self._accept_plain_student)

    # -- what a method implements ------------------------------------------

    def run_teacher(self, inputs: Tensor,
                    data_samples: Optional[list] = None) -> Any:
        """Pass images through the teacher.

        Args:
            inputs (Tensor): Preprocessed images, shape (B, 3, H, W).
            data_samples (list, optional): Annotations, of which only what
                they say about padding may be read. Defaults to None.

        Returns:
            What :meth:`make_targets` needs of it, without gradients.
        """
        raise NotImplementedError

    def make_targets(self, teacher_outputs: Any
                     ) -> Tuple[Any, Dict[str, Tensor]]:
        """Make what the student is compared with, before it runs.

        Args:
            teacher_outputs: What :meth:`run_teacher` returned.

        Returns:
            tuple: The targets, here what was given, and losses of their own.
        """
        return teacher_outputs, {}

    def run_student(self, inputs: Tensor, data_samples: Optional[list]
                    ) -> Tuple[Dict[str, Any], Any]:
        """Pass images through the student.

        Args:
            inputs (Tensor): Preprocessed images, shape (B, 3, H, W).
            data_samples (list, optional): Annotations; if
                ``task_loss_weight`` is 0, only what they say about padding
                may be read.

        Returns:
            tuple: Its own losses (see :meth:`task_losses`), and what
            :meth:`distill` needs, padding weighed.
        """
        raise NotImplementedError

    def distill(self, targets: Any, student_outputs: Any
                ) -> Dict[str, Tensor]:
        """Compute losses of the student against its targets.

        Args:
            targets: What :meth:`make_targets` made.
            student_outputs: What :meth:`run_student` returned for it.

        Returns:
            dict[str, Tensor]: Scalars by name; those whose name has ``loss``
            in it are summed for training.
        """
        raise NotImplementedError

    # -- building ----------------------------------------------------------

    @property
    def student_backbone(self) -> nn.Module:
        """The student's backbone; the student itself if it is one."""
        return find_part(self.student, 'backbone') or self.student

    # What the toolboxes' test-time augmentation and inference functions read
    # off a plain model
    decode_head = property(lambda self: self.student.decode_head)
    extract_feat = property(lambda self: self.student.extract_feat)
    out_channels = property(lambda self: self.student.out_channels)

    def get_layer_depth(self, *_: Any) -> None:
        """Refuse layer-wise decay, which would pass over the student's layers
        and the multipliers of adapters and projectors: mmpretrain's asks the
        model for this, mmseg's and mmdet's for :attr:`backbone`.

        Raises:
            ConfigError: Always. ``prepare_training`` has put
                :class:`~mmsinger.engine.optim.StudentFirstConstructor` in its
                place.
        """
        raise ConfigError(
            f'A {type(self).__name__} is no plain model; its student\'s '
            'backbone is model.student_backbone. If optim_wrapper.constructor '
            'asks, start with tools/train.py of mmsinger; or set '
            "optim_wrapper.constructor='mmsinger.StudentFirstConstructor' and "
            'name the other in optim_wrapper.paramwise_cfg.'
            'student_constructor.')

    backbone = property(get_layer_depth)

    def init_weights(self) -> None:
        """Initialise the student as its config says, load the teacher, and
        start what depends on the teacher's weights.

        A Runner calls it before it loads a checkpoint and wraps the model,
        and sends the result to all processes.
        """
        self._say_missing_hooks()
        with safe_loading():
            super().init_weights()
        if self.teacher.dtype is not None:  # loaded before
            self.teacher.cast(torch.float32)
        self.teacher.load_weights()
        self._init_from_teacher()
        if self.teacher_dtype is not None:
            self.teacher.cast(PRECISIONS[self.teacher_dtype])

    def _say_missing_hooks(self) -> None:
        """Warn if a Runner was made from a config that
        ``prepare_training`` has not completed."""
        config = MessageHub.get_current_instance().get_info('cfg')
        missing = [hook for hook in self.required_hooks
                   if config and hook not in config]
        if missing:
            print_log(
                f'{type(self).__name__}: this run lacks {", ".join(missing)}. '
                'Start it with tools/train.py of mmsinger, call '
                'mmsinger.engine.prepare.prepare_training(cfg) before the '
                'runner is built, or add these to custom_hooks, as in '
                f"dict(type='mmsinger.{missing[0]}').", logger='current',
                level=30)

    def _init_from_teacher(self) -> None:
        """Start what depends on the teacher's weights, in full precision."""

    def _accept_plain_student(self, state_dict: Dict[str, Tensor],
                              prefix: str, *_) -> None:
        """Let ``load_from`` take a checkpoint of the plain student too: its
        keys lack ``student.``, and would all be passed over."""
        if any(k.startswith(f'{prefix}student.') for k in state_dict):
            return
        plain = [name for name in self._student_keys
                 if prefix + name in state_dict]
        for name in plain:
            state_dict[f'{prefix}student.{name}'] = \
                state_dict.pop(prefix + name)
        if plain:
            print_log(f'{len(plain)} tensors of a plain checkpoint go to the '
                      'student', logger='current')

    def _freeze_unreached(self, module: nn.Module,
                          run: Callable[[nn.Module], Tensor], others: str
                          ) -> None:
        """Freeze the student parameters that get no gradient: without a task
        loss, those that distillation does not reach (the final norm, the
        heads, the blocks after the last distilled one). DDP refuses
        parameters without gradients.

        Args:
            module (nn.Module): The student, or its backbone.
            run (Callable): Given a copy of it, returns a scalar of what is
                distilled.
            others (str): What is not reached, for the log.

        Raises:
            ConfigError: If nothing is reached: nothing would be learnt.
        """
        reached = reached_parameters(module, run)
        parameters = list(self.student.parameters())
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        if not reached:
            why = 'all its parameters are frozen (frozen_stages, or ' \
                'requires_grad=False)' if not any(
                    p.requires_grad for p in self.student_backbone.parameters()
                ) else 'its backbone does not hand gradients on to them: ' \
                'what is distilled is frozen, or the backward pass is its ' \
                'own (RevViT)'
            raise ConfigError(
                'student: distillation reaches no parameter of '
                f'{type(self.student_backbone).__name__}, since {why}. Let '
                'the distilled part train, or take another student.')
        if frozen:
            total = sum(p.numel() for p in parameters)
            print_log(f'The student config freezes {frozen:,} of the '
                      f"student's {total:,} parameters", logger='current')
        if self.task_loss_weight > 0:
            return
        unreached = [p for p in parameters
                     if p.requires_grad and id(p) not in reached]
        for parameter in unreached:
            parameter.requires_grad_(False)
        if unreached:
            count = sum(p.numel() for p in unreached)
            print_log(
                f'task_loss_weight=0: {count:,} student parameters '
                f'{others} get no gradient and stay as they are',
                logger='current')

    # -- running -----------------------------------------------------------

    def forward(self, inputs: Tensor, data_samples: Optional[list] = None,
                mode: str = 'tensor') -> Union[Dict[str, Tensor], list,
                                               Tensor, tuple]:
        """Run the model in one of OpenMMLab's modes.

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
        """Compute the student's own losses and ``distill.*``.

        Args:
            inputs (Tensor | list[Tensor]): Preprocessed images, shape
                (B, 3, H, W); of several views, the first counts.
            data_samples (list, optional): Annotations; of these only the
                padding is read if ``task_loss_weight`` is 0.

        Returns:
            dict[str, Tensor]: Losses by name.
        """
        self._check_ready()
        if not isinstance(inputs, Tensor):
            inputs = first_view(inputs)
        targets, of_targets = self.make_targets(
            self.run_teacher(inputs, data_samples))
        losses, student_outputs = self.run_student(inputs, data_samples)
        of_student = self.distill(targets, student_outputs)
        refuse_same_names(of_targets, of_student, 'model')
        for name, value in {**of_student, **of_targets}.items():
            losses[f'distill.{name}'] = value
        return losses

    def _check_ready(self) -> None:
        """Raise RuntimeError if something is still to be prepared."""

    def task_losses(self, inputs: Tensor, data_samples: list
                    ) -> Dict[str, Any]:
        """The student's own losses, times ``task_loss_weight``.

        A classifier's ``loss`` is ``task.loss`` here: mmengine logs the sum
        of all by that name.
        """
        losses = self.student.loss(inputs, data_samples)
        losses = {'task.loss' if name == 'loss' else name: value
                  for name, value in losses.items()}
        if self.task_loss_weight != 1:
            losses = {name: _scaled(value, self.task_loss_weight)
                      if 'loss' in name else value
                      for name, value in losses.items()}
        return losses

    @property
    def student_normalisation(self) -> Normalisation:
        """What the data preprocessor normalised the images with."""
        preprocessor = self.data_preprocessor
        if not getattr(preprocessor, '_enable_normalize', False):
            return Normalisation()
        if not hasattr(self, '_normalisation'):  # read once: it is a sync
            self._normalisation = Normalisation(
                tuple(preprocessor.mean.flatten().tolist()),
                tuple(preprocessor.std.flatten().tolist()))
        return self._normalisation

    # -- the teacher is no submodule ---------------------------------------

    def _apply(self, fn, *args, **kwargs):
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


def is_distiller(model_cfg: dict, kind: type = BaseDistiller) -> bool:
    """Whether a model config is one of mmsinger's distillers, of a kind."""
    cls = find_type(model_cfg.get('type'))
    return isinstance(cls, type) and issubclass(cls, kind)


def refuse_same_names(losses: Dict[str, Tensor], more: Dict[str, Tensor],
                      place: str) -> None:
    """Raise ConfigError if two losses have one name.

    Args:
        losses (dict): Of the steps in ``model.targets`` so far, by name.
        more (dict): Of another step or of the method.
        place (str): Where ``more`` come from, for the message.
    """
    for name in losses.keys() & more.keys():
        raise ConfigError(
            f'{place}: its loss {name!r} has the name of a loss of an earlier '
            'step in model.targets, and one would replace the other. Let the '
            'step return it under another name.')


def reached_parameters(module: nn.Module,
                       run: Callable[[nn.Module], Tensor]) -> set:
    """Identities of a module's parameters that an output depends on, from
    one small pass.

    Args:
        module (nn.Module): The module; it stays as it is.
        run (Callable): Given a copy of it, runs it and returns a scalar.

    Returns:
        set[int]: The ``id`` of each such parameter; none if there are none in
        training mode (reversible backbones have a backward pass of their
        own there).
    """

    def with_gradient(training: bool) -> set:
        # On a copy: EVA-02 for one keeps buffers of the last image's size
        copied = copy.deepcopy(module)
        copied.train(training)  # alone: some backbones return None from it
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            total = run(copied)
        if total.requires_grad:
            total.backward()  # not autograd.grad(): checkpointing refuses it
        return {id(ours) for ours, theirs in zip(
            module.parameters(), copied.parameters())
            if theirs.grad is not None}

    try:
        if not with_gradient(training=True):
            return set()
    except ValueError:  # batch norms of a single value
        pass
    # Where no drop path leaves anything out
    return with_gradient(training=False)


def build_teacher(cfg: dict, cls: Type[FrozenModule] = FrozenTeacher
                  ) -> FrozenModule:
    """Build the teacher.

    Args:
        cfg (dict): Arguments of ``cls``.
        cls (type): :class:`FrozenTeacher` (default), which gives features, or
            :class:`FrozenClassifier`, which gives logits.

    Returns:
        FrozenModule: The teacher.
    """
    if not isinstance(cfg, dict) or cls.part not in cfg:
        got = sorted(cfg) if isinstance(cfg, dict) else repr(cfg)
        raise ConfigError(
            f'teacher must be dict({cls.part}=…, checkpoint=…), got {got}.')
    check_arguments('model.teacher', cls, cfg)
    return cls(**cfg)


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return [factor * item for item in value]
    return factor * value
