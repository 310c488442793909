"""The steps that a benchmark compares, on random images and weights."""
import contextlib
import re
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence
from unittest import mock

import torch
from mmpretrain.models import VisionTransformer
from step_cost.cost import Step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsinger.engine.diagnostics import step_diagnostics
from mmsinger.errors import ConfigError, check_choice
from mmsinger.models import (FeatureDistiller, FitNetDistiller, Refine,
                             RemoveOutlierSubspace, SiNGERDistiller)
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.compiled import compile_blocks
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.losses import outlier_loss
from mmsinger.models.targets.outlier_subspace import OutlierSubspace

SIZES = dict(t='deit-tiny', s='deit-small', b='deit-base', l='l', h='h',
             g='dinov2-g')
PRECISIONS = ('fp32', 'tf32', 'bf16')


def vision_transformer(name: str, size: int) -> Dict[str, Any]:
    """The config of a plain vision transformer.

    Args:
        name (str): ``'vit_l16'``: its size (t, s, b, l, h, g) and the side of
            its patches.
        size (int): Side of the images.

    Returns:
        dict: Of mmpretrain's VisionTransformer.

    Raises:
        ConfigError: If the name or the size does not fit.
    """
    match = re.fullmatch(f'vit_([{"".join(SIZES)}])(\\d+)', name)
    if match is None:
        raise ConfigError(
            f'{name!r} is no vision transformer that this tool knows: write '
            f'vit_, one of {", ".join(SIZES)}, and the side of its patches, '
            'for instance vit_l16 or vit_g14.')
    letter, patch = match[1], int(match[2])
    if patch < 1 or size < patch or size % patch:
        raise ConfigError(f'--size {size}: {name} takes multiples of {patch}, '
                          'the side of its patches.')
    swiglu = dict(layer_cfgs=dict(ffn_type='swiglu_fused'))
    return dict(type='mmpretrain.VisionTransformer', arch=SIZES[letter],
                img_size=size, patch_size=patch,
                **(swiglu if letter == 'g' else {}))


class Steps:
    """Forward and backward passes of one pair and batch.

    Features only, without a head and without the optimizer's step.

    Args:
        teacher (str): See :func:`vision_transformer`.
        student (str): See :func:`vision_transformer`.
        batch_size (int): Images a step.
        size (int): Their side.
        precision (str): ``'fp32'``, ``'bf16'`` (autocast) or, on CUDA,
            ``'tf32'``. Defaults to ``'fp32'``.
        rank (int): Of the adapters. Defaults to 16.
        layers (Sequence[int], optional): Distilled blocks of the teacher.
            Defaults to None: the one at three quarters of the depth and the
            last, the paper's 17 and 23 of 24.
        depth (int, optional): Of the teacher. Defaults to None: as published.
        device (str): Defaults to ``'cpu'``.

    Raises:
        ConfigError: If a value is not valid.
    """

    def __init__(self, teacher: str, student: str, batch_size: int, size: int,
                 precision: str = 'fp32', rank: int = 16,
                 layers: Optional[Sequence[int]] = None,
                 depth: Optional[int] = None, device: str = 'cpu') -> None:
        torch.manual_seed(0)
        self.device = device
        self.precision = precision
        self.images = torch.randn(batch_size, 3, size, size, device=device)
        backbone = vision_transformer(teacher, size)
        arch = dict(VisionTransformer.arch_zoo[backbone['arch']])
        depth = depth or arch['num_layers']
        backbone['arch'] = dict(arch, num_layers=depth)
        if layers is None:
            layers = (3 * depth // 4 - 1, depth - 1)
        shared = dict(
            student=dict(type='mmpretrain.ImageClassifier',
                         backbone=vision_transformer(student, size)),
            teacher=dict(backbone=backbone, layers=layers),
            task_loss_weight=0)
        self.singer = SiNGERDistiller(adapter=dict(rank=rank), **shared)
        self.singer.refinement.init_weights(self.singer.teacher)
        self.fitnet = FitNetDistiller(**shared)
        self.fitnet.__dict__['teacher'] = self.singer.teacher
        for model in (self.singer, self.fitnet):
            model.to(device).train()
        self.outliers = self._find_outliers()

    @property
    def precision(self) -> str:
        """That of the steps, which may be set anew between two of them."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        check_choice('--precision', precision, PRECISIONS)
        if precision == 'tf32' and self.device != 'cuda':
            raise ConfigError('--precision tf32 needs a CUDA device.')
        self._precision = precision
        torch.backends.cuda.matmul.allow_tf32 = precision == 'tf32'
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'

    @property
    def weight_bytes(self) -> Dict[str, int]:
        """Bytes of the weights that FitNet and SiNGER hold, the teacher's
        included."""
        teacher = _bytes(self.singer.teacher)
        return {name: teacher + _bytes(model) for name, model in (
            ('FitNet', self.fitnet), ('SiNGER', self.singer))}

    # -- steps -------------------------------------------------------------

    def parts(self) -> Dict[str, Step]:
        """The teacher's pass, and the student's forward and backward pass,
        each alone: no feature distillation does with less."""
        return dict(teacher=Step(self._teacher), student=Step(self._student))

    def methods(self) -> Dict[str, Step]:
        """FitNet, and SiNGER with each of its own losses on and off."""
        outlier = mock.patch.object(self.singer.loss_outlier, 'loss_weight',
                                    0.)
        info = mock.patch.object(self.singer.loss_info, 'loss_weight', 0.)
        return {
            'FitNet': Step(partial(self._distil, self.fitnet)),
            'robust preset': Step(self._robust),
            'SiNGER': self._varied(),
            'SiNGER without L_outlier': self._varied(outlier),
            'SiNGER without L_info': self._varied(info),
            'SiNGER without both': self._varied(outlier, info),
        }

    def levers(self) -> Dict[str, Step]:
        """SiNGER with what might make it cheaper, one at a time."""
        patch = mock.patch.object
        return {
            'info_fraction=0.5': self._varied(
                patch(self.singer.refinement, 'info_fraction', 0.5)),
            'info_fraction=0.25': self._varied(
                patch(self.singer.refinement, 'info_fraction', 0.25)),
            "teacher_dtype='bf16'": self._varied(self._cast_teacher),
            'quantile by partial selection': self._varied(
                patch(outlier_loss, 'outlier_threshold', selected_quantile)),
            'block l+1 checkpointed': self._varied(
                patch(BlockTaps, 'rerun', _checkpointed_rerun)),
            'channels-last patch embeddings': self._varied(
                self._channels_last),
            "official code's order": self._varied(
                patch(Refine, '_info_loss', _recomputing_info_loss),
                self._weight_gradients),
            'DiagnosticsHook measures': Step(self._measured),
        }

    def compiled(self, **options: Any) -> Dict[str, Step]:
        """FitNet and SiNGER with compiled blocks, see
        :func:`compile_blocks`, and options of ``torch.compile``."""
        groups = (self.singer.teacher.blocks,
                  self.singer.student_features,
                  self.fitnet.student_features)
        blocks = [block for group in groups for block in group.modules]
        plain = [type(block) for block in blocks]
        for group in groups:
            compile_blocks(group, **options)
        compiled = [type(block) for block in blocks]

        @contextlib.contextmanager
        def setting() -> Iterator[None]:
            _set_classes(blocks, compiled)
            yield
            _set_classes(blocks, plain)

        _set_classes(blocks, plain)
        return {f'{name}, compiled': Step(
            partial(self._distil, model), setting) for name, model in (
                ('FitNet', self.fitnet), ('SiNGER', self.singer))}

    def _varied(self, *changes: Any) -> Step:
        """A SiNGER step under patches or other context managers, or functions
        that give one."""
        @contextlib.contextmanager
        def setting() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                for change in changes:
                    stack.enter_context(
                        change if hasattr(change, '__enter__') else change())
                yield

        return Step(partial(self._distil, self.singer), setting)

    # -- how they run ------------------------------------------------------

    def _autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16,
                              enabled=self.precision == 'bf16')

    def _teacher(self) -> None:
        with self._autocast():
            self.fitnet.run_teacher(self.images)

    def _student(self) -> None:
        self.fitnet.zero_grad()
        with self._autocast():
            _, tokens = self.fitnet.run_student(self.images, None)
            total = sum(t.values.float().square().mean()
                        for t in tokens.values())
        total.backward()

    def _robust(self) -> None:
        with mock.patch.object(self.outliers, '_rank', 8):
            self._distil(self.fitnet)

    def _distil(self, model: FeatureDistiller) -> None:
        model.zero_grad()
        with self._autocast():
            total = sum(model.loss(self.images, None).values())
        total.backward()

    def _measured(self) -> None:
        """What DiagnosticsHook adds to a step, apart from the logging."""
        record = StepRecord()
        self.singer.records.append(record)
        self._distil(self.singer)
        self.singer.records.remove(record)
        numbers = step_diagnostics(record)
        torch.stack([value for layer in numbers.values()
                     for value in layer.values()]).tolist()

    def _find_outliers(self) -> OutlierSubspace:
        """Let the robust preset find, in one block of the teacher, a
        twentieth of the tokens with long components in eight directions; off
        until its step."""
        step = RemoveOutlierSubspace(inside=True)
        step.prepare(self.singer.teacher, self.fitnet.layers)
        step.to(self.device)
        tokens = torch.randn(4096, self.singer.teacher.blocks.dim)
        tokens[:200, :8] *= 30.
        found = step.subspaces[str(self.fitnet.layers[0])]
        found.calibrate(tokens.to(self.device), torch.arange(
            4096, device=self.device) < 200, step.mad, step.ratio)
        found._rank = 0
        return found

    # -- what is changed ---------------------------------------------------

    @contextlib.contextmanager
    def _cast_teacher(self) -> Iterator[None]:
        teacher = self.singer.teacher
        teacher.cast(torch.bfloat16)
        yield
        teacher.cast(torch.float32)
        teacher.dtype = None

    @contextlib.contextmanager
    def _channels_last(self) -> Iterator[None]:
        embeddings = [self.singer.teacher.blocks.patch_embed,
                      self.singer.student_features.patch_embed]
        for module in embeddings:
            module.to(memory_format=torch.channels_last)
        yield
        for module in embeddings:
            module.to(memory_format=torch.contiguous_format)

    @contextlib.contextmanager
    def _weight_gradients(self) -> Iterator[None]:
        blocks = [self.singer.teacher.blocks.modules[layer + 1]
                  for layer in self.singer.layers
                  if layer != self.singer.refinement.last_layer]
        for block in blocks:
            block.requires_grad_(True)
        yield
        for block in blocks:
            block.requires_grad_(False)
            block.zero_grad()


def selected_quantile(norms: Tensor, quantile: float,
                      weight: None = None) -> Tensor:
    """:func:`outlier_threshold` without sorting all: the two largest-but-k
    norms that the quantile lies between."""
    norms = norms.detach().float()
    place = quantile * (norms.shape[1] - 1)
    below = int(place)
    top = norms.topk(norms.shape[1] - below, dim=1).values  # descending
    low, high = top[:, -1:], top[:, -2:-1] if top.shape[1] > 1 else top
    return torch.lerp(low, high, place - below)


def _recomputing_info_loss(self, outputs, targets, found):
    """The next block's output computed anew, not taken from the pass."""
    with torch.no_grad():
        for layer in targets:
            if layer != self.last_layer:
                outputs.next_block(layer, outputs.tokens(layer))
    return _INFO_LOSS(self, outputs, targets, found)


def _checkpointed_rerun(self, layer, values):
    return checkpoint(_RERUN, self, layer, values, use_reentrant=False)


_INFO_LOSS = Refine._info_loss
_RERUN = BlockTaps.rerun


def _set_classes(modules: List[nn.Module], classes: List[type]) -> None:
    for module, cls in zip(modules, classes):
        module.__class__ = cls


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size()
               for t in (*module.parameters(), *module.buffers()))
