"""SiNGER's refinement of teacher tokens (arXiv 2509.20986)."""
import inspect
import math
from functools import partial
from typing import (Annotated, Any, Callable, Dict, List, Literal, NamedTuple,
                    Optional, Sequence, Tuple, TypedDict)

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.metrics.norms import robust_threshold, token_norms
from mmsinger.metrics.subspaces import subspace_energy
from mmsinger.models.adapters import (Init, Selection, SiNGERAdapter,
                                      SingularDirections,
                                      left_singular_directions, linearised_ffn)
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.losses import (OutlierSuppressionLoss, loss_behind_block,
                                    weighted_mean)
from mmsinger.models.targets.filter import clip_norms
from mmsinger.models.targets.step import Targets, TargetStep, TeacherOutputs
from mmsinger.registry import MODELS, build_part
from mmsinger.schema import (Count, DefaultType, Natural, NonNegative,
                             Positive, Share)


class Adapter(TypedDict, total=False):
    """Settings of the adapters, see :class:`Refine`."""
    rank: Count
    gain: float
    train_up: bool
    init: Init
    selection: Selection
    threshold: NonNegative
    seed: Natural
    fold_layer_scale: bool
    fold_norm: bool


class Gate(TypedDict):
    """Which tokens are refined, see :class:`Refine`."""
    mad: Positive


LastLayer = Literal['final', 'listed']
OutlierConfig = Annotated[
    dict, DefaultType('mmsinger.OutlierSuppressionLoss')]
InfoConfig = Annotated[dict, DefaultType('mmsinger.GramInformationLoss')]


class Refinement(NamedTuple):
    """One layer's tokens, refined.

    Attributes:
        tokens (Tokens): F_hat, values of shape (B, N, D).
        target (Tokens): What the student learns: F_hat, or capped.
        loss_outlier (Tensor): L_outlier, a scalar.
    """
    tokens: Tokens
    target: Tokens
    loss_outlier: Tensor


class NormThreshold(nn.Module):
    """A norm that no ordinary patch token of one layer has, found once on
    many images: the same in every process and for every batch.

    ``median`` and ``threshold``, buffers, are NaN until :meth:`calibrate`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('median', torch.full((), math.nan))
        self.register_buffer('threshold', torch.full((), math.nan))

    def calibrate(self, norms: Tensor, mad: float) -> None:
        """Set both, see :func:`robust_threshold`.

        Args:
            norms (Tensor): Of patch tokens, any shape.
            mad (float): Distance from the median in robust standard
                deviations.
        """
        median, threshold = robust_threshold(norms, mad)
        self.median.copy_(median)
        self.threshold.copy_(threshold)

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor],
                              prefix: str, *args: Any) -> None:
        # A checkpoint of 0.1 has neither: they are found anew then
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def calibrated(self) -> bool:
        """Whether :meth:`calibrate` was called, here or in the run that a
        checkpoint comes from."""
        return bool(torch.isfinite(self.threshold))


@MODELS.register_module()
class Refine(TargetStep):
    """Refines patch tokens by an adapter a layer (sections 3.1 to 3.3).

    The largest norms are pulled down (L_outlier) while the next teacher block
    must hardly notice (L_info). Its losses are means over the distilled
    layers, ``distill.loss_outlier`` and ``distill.loss_info``. The adapters
    start when the teacher's weights are loaded.

    With ``gate``, which is **not in the paper**, tokens of abnormal norm are
    refined and no others. The patch norms n of many training images, read
    before the first step, have the median ``med`` and ``tau = med + k *
    1.4826 * MAD``: ``F_hat = F + g delta(F)`` with ``g = 1[n > tau]``, and
    L_outlier is half the mean of ``(||F_hat|| - med)^2`` over the gated
    tokens with ``||F_hat|| > med``. Where no norm is above tau, targets are
    those of FitNet, bit by bit.

    Args:
        adapter (dict): ``rank`` (16), ``gain`` (1.0), ``train_up`` (True),
            ``init`` (``'nullspace'``), ``selection`` (``'smallest'``),
            ``threshold``
            (0.05), ``seed`` (0), ``fold_layer_scale`` (False), ``fold_norm``
            (False); see :class:`SiNGERAdapter`, :func:`left_nullspace` and
            :func:`linearised_ffn`. Defaults to the values in parentheses.
        loss_outlier (dict): Defaults to ``dict(
            type='mmsinger.OutlierSuppressionLoss', quantile=0.95,
            loss_weight=0.01)``. With a ``gate``, ``loss_weight`` alone is
            read.
        loss_info (dict): Defaults to ``dict(
            type='mmsinger.GramInformationLoss', loss_weight=1.0)``.
        last_layer (str): Which distilled layer has no next block, so that its
            own FFN and its own tokens take that place. ``'final'``: the
            teacher's final block alone. ``'listed'``: the last of ``layers``
            whatever follows it (the official code). Defaults to ``'final'``.
        info_fraction (float): L_info is computed on this share of each
            batch's images, drawn anew in every step, at least one. Where all
            tokens weigh the same, its mean is an unbiased estimate, with the
            teacher's block run again for these images alone. Defaults to
            1.0, all.
        gate (dict, optional): ``dict(mad=k)``: refine tokens above tau alone;
            8.0 gates hardly any token of a clean teacher. Defaults to None,
            all patch tokens, the paper.
        cap (bool): The student learns gated tokens shortened to ``med``,
            whatever refinement has left of them. Needs ``gate``. Defaults to
            False.
        kd_gradient (bool): Whether the gradient of L_KD reaches the adapters,
            as in the paper; they then also move targets to where the student
            is. Otherwise they learn from L_outlier and L_info alone. Defaults
            to True.

    Raises:
        ConfigError: If a value is not valid.
    """

    start_only = ('gate.mad', *(f'adapter.{name}' for name in (
        'init', 'selection', 'threshold', 'seed', 'fold_layer_scale',
        'fold_norm')))
    found_anew = ('gates', )

    def __init__(self,
                 adapter: Adapter = Adapter(),
                 loss_outlier: OutlierConfig = dict(),
                 loss_info: InfoConfig = dict(),
                 last_layer: LastLayer = 'final',
                 info_fraction: Share = 1.0,
                 gate: Optional[Gate] = None,
                 cap: bool = False,
                 kd_gradient: bool = True) -> None:
        super().__init__()
        if cap and gate is None:
            raise ConfigError('cap=True shortens gated tokens, but there is '
                              'no gate. Add gate=dict(mad=8.0).')
        self.adapter_cfg = adapter
        self.info_fraction = info_fraction
        self.gate = gate
        self.cap = cap
        self.kd_gradient = kd_gradient
        self.loss_outlier = build_part(
            'loss_outlier', loss_outlier, 'mmsinger.OutlierSuppressionLoss')
        self.loss_info = build_part(
            'loss_info', loss_info, 'mmsinger.GramInformationLoss')
        if gate is not None and (
                type(self.loss_outlier) is not OutlierSuppressionLoss
                or self.loss_outlier.of != 'refined'):
            raise ConfigError(
                f'loss_outlier={dict(loss_outlier)!r}: with a gate, L_outlier '
                'is that of the gated tokens, and loss_weight alone is read. '
                'Remove the other keys, or the gate.')
        self._last_layer = last_layer
        #: By layer, of the linearised FFN that its adapter starts from
        self.ffn_directions: Dict[int, SingularDirections] = {}

    # -- building ----------------------------------------------------------

    def prepare(self, teacher: nn.Module, layers: List[int]) -> None:
        """Make the adapters, see :meth:`TargetStep.prepare`."""
        #: The distilled layer without a next block
        self.last_layer = layers[-1] if self._last_layer == 'listed' \
            else len(teacher.blocks) - 1
        self.adapters = nn.ModuleDict({
            str(layer): SiNGERAdapter(
                teacher.blocks.dim, **self._settings_of(SiNGERAdapter))
            for layer in layers
        })
        self.gates = nn.ModuleDict({
            str(layer): NormThreshold() for layer in layers if self.gate})

    def _settings_of(self, reader: Callable) -> Dict[str, Any]:
        """Those keys of ``adapter`` that are arguments of a function."""
        return {key: value for key, value in self.adapter_cfg.items()
                if key in inspect.signature(reader).parameters}

    def ffn_block(self, layer: int) -> int:
        """The teacher block whose FFN a layer's adapter starts from."""
        return layer if layer == self.last_layer else layer + 1

    def extra_layers(self, layers: Sequence[int]) -> List[int]:
        """The next block of each intermediate layer."""
        return [layer + 1 for layer in layers if layer != self.last_layer]

    def init_weights(self, teacher: nn.Module) -> None:
        """Start the adapters from the teacher's weights (section 3.2).

        Raises:
            ConfigError: If the teacher's FFN cannot be linearised.
        """
        for name, adapter in self.adapters.items():
            layer = int(name)
            block = self.ffn_block(layer)
            singular = left_singular_directions(linearised_ffn(
                teacher.blocks.modules[block],
                **self._settings_of(linearised_ffn)))
            # Kept: what a teacher cast to bfloat16 has lost
            self.ffn_directions[layer] = singular
            start = adapter.initialise(
                singular, **self._settings_of(adapter.initialise))
            e_safe, e_prob = subspace_energy(adapter.up, singular.directions)
            values = start['singular_values']
            kept = f'singular values kept {min(values):.3g} to ' \
                f'{max(values):.3g}, ' if values else ''
            print_log(
                f"SiNGER adapter of layer {layer}: init={start['init']!r} on "
                f'the FFN of block {block}, rank {adapter.rank}, {kept}'
                f"{start['num_random']} random directions, E_safe "
                f'{e_safe:.4f}, E_prob {e_prob:.4f}', logger='current')

    def calibrate(self, patches: Dict[int, Tensor]) -> str:
        """Set the thresholds of the gate, see :meth:`TargetStep.calibrate`."""
        said = []
        for layer, part in self.gates.items():
            norms = token_norms(patches[int(layer)])
            part.calibrate(norms, self.gate['mad'])
            share = (norms > part.threshold).float().mean().item()
            said.append(f'{layer}: {100 * share:.2g} % of the tokens')
        return 'gated by teacher layer: ' + ', '.join(said)

    # -- running -----------------------------------------------------------

    def forward(self, targets: Targets, outputs: TeacherOutputs
                ) -> Tuple[Targets, Dict[str, Tensor]]:
        """Refine all layers; L_outlier and L_info, see
        :meth:`TargetStep.forward`."""
        found = {layer: self.refine(layer, tokens)
                 for layer, tokens in targets.items()}
        for record in outputs.records:
            for layer, result in found.items():
                record.add(layer, refined=result.tokens)
        losses = dict(
            loss_outlier=sum(result.loss_outlier for result
                             in found.values()) / len(found),
            loss_info=self._info_loss(outputs, targets, found))
        targets = {layer: result.target for layer, result in found.items()}
        if not self.kd_gradient:
            targets = {layer: target._replace(values=target.values.detach())
                       for layer, target in targets.items()}
        return targets, losses

    def refine(self, layer: int, tokens: Tokens) -> Refinement:
        """Refine the tokens of one layer.

        Args:
            layer (int): The teacher layer.
            tokens (Tokens): Its normalised output F, (B, N, D).

        Returns:
            Refinement: F_hat, the target and L_outlier.
        """
        patches, weight = tokens.patches, tokens.patch_weight
        refined = self.adapters[str(layer)](patches)
        if self.gate is None:
            tokens = tokens.with_patches(refined)
            # Losses of one's own need not know the teacher's tokens
            known = dict(original=patches) if getattr(
                self.loss_outlier, 'of', '') == 'teacher' else {}
            return Refinement(tokens, tokens, self.loss_outlier(
                refined, weight, **known))
        part = self.gates[str(layer)]
        median = part.median
        gate = token_norms(patches) > part.threshold  # (B, P)
        refined = torch.where(gate.unsqueeze(-1), refined, patches)
        norms = token_norms(refined)
        above = (gate & (norms > median)).float()
        if weight is not None:
            above = weight * above
        excess = weighted_mean((norms - median).square() / 2, above)
        target = refined
        if self.cap:
            target = clip_norms(refined, norms, torch.where(
                gate, median, float('inf')))
        return Refinement(
            tokens.with_patches(refined), tokens.with_patches(target),
            self.loss_outlier.loss_weight * excess)

    def _info_loss(self, outputs: TeacherOutputs, targets: Targets,
                   found: Dict[int, Refinement]) -> Tensor:
        """The mean of L_info over layers."""
        first = next(iter(targets.values()))
        if getattr(self.loss_info, 'loss_weight', 1) == 0:
            return first.values.new_zeros(())
        num_prefix = first.num_prefix
        images = None if self.info_fraction == 1 else choose_images(
            len(first.values), self.info_fraction)
        # A loss or weights of one's own may learn from it, too
        alone = not any(value is not None and value.requires_grad
                        for value in (*self.loss_info.parameters(),
                                      *(t.weight for t in targets.values())))
        losses, previous = [], None
        for layer, tokens in targets.items():
            refined = found[layer].tokens
            is_last = layer == self.last_layer
            if not is_last:
                reference = outputs.tokens(layer + 1)
            elif getattr(self.loss_info, 'last', '') == 'previous' and \
                    previous is not None:
                reference = previous
            else:
                reference = tokens
            previous = refined
            ours, theirs, weight = (
                value if images is None or value is None
                else take(value, images) for value in (
                    refined.values, reference.values, tokens.weight))
            compare = partial(self.loss_info, num_prefix=num_prefix,
                              is_last=is_last, weight=weight)
            losses.append(
                compare(ours, theirs) if is_last else loss_behind_block(
                    lambda values: outputs.next_block(
                        layer, refined._replace(values=values)).values,
                    lambda values: compare(values, theirs), ours, alone))
        return sum(losses) / len(losses)


def choose_images(batch: int, fraction: float) -> List[slice]:
    """Draw a share of a batch: neighbours from a random image on, beyond the
    last one from the first on. Every image is as likely as any other, and
    slices, unlike indices, need nothing from the device.

    Args:
        batch (int): Images in the batch.
        fraction (float): In (0, 1].

    Returns:
        list[slice]: One or two parts of the batch, at least one image.
    """
    count = max(1, round(batch * fraction))
    if count == batch:
        return [slice(None)]
    start = int(torch.randint(batch, ()))
    if start + count <= batch:
        return [slice(start, start + count)]
    return [slice(start, batch), slice(0, start + count - batch)]


def take(values: Tensor, images: List[slice]) -> Tensor:
    """The chosen images of a batch (B, …)."""
    parts = [values[part] for part in images]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
