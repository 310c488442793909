"""SiNGER: distil refined teacher features (arXiv 2509.20986)."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, check_choice, check_keys
from mmsinger.metrics.norms import outlier_threshold
from mmsinger.metrics.subspaces import subspace_energy
from mmsinger.models.adapters import (SiNGERAdapter,
                                      cached_singular_directions,
                                      linearised_ffn)
from mmsinger.models.adapters.nullspace import SELECTIONS
from mmsinger.models.adapters.singer_adapter import INITS
from mmsinger.models.distillers.base import build_loss
from mmsinger.models.distillers.feature import FeatureDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.normalise import TargetNorm
from mmsinger.registry import MODELS

# The keys of ``adapter``, by who reads them.
_BUILD_KEYS = ('rank', 'gain')
_FFN_KEYS = ('fold_layer_scale', 'fold_norm')
_INIT_KEYS = ('init', 'selection', 'threshold', 'seed')


@MODELS.register_module()
class SiNGERDistiller(FeatureDistiller):
    """Singular Nullspace-Guided Energy Reallocation (sections 3.1 to 3.3).

    Each distilled teacher layer gets a :class:`SiNGERAdapter` on its patch
    tokens. The student learns the refined features (L_KD), the largest norms
    of which are pulled down (L_outlier) while the next teacher block must
    hardly notice (L_info). Losses are means over the distilled layers, named
    ``distill.loss_kd``, ``distill.loss_outlier``, ``distill.loss_info``.

    The adapters are called ``adapters`` in ``paramwise_cfg``::

        optim_wrapper = dict(paramwise_cfg=dict(custom_keys={
            'adapters': dict(lr_mult=0.1)}))

    Args:
        adapter (dict, optional): ``rank`` (16), ``gain`` (1.0), ``init``
            (``'nullspace'``), ``selection`` (``'smallest'``), ``threshold``
            (0.05), ``seed`` (0), ``fold_layer_scale`` (False), ``fold_norm``
            (False); see :class:`SiNGERAdapter`, :func:`left_nullspace` and
            :func:`linearised_ffn`. Defaults to the values in parentheses.
        loss_outlier (dict, optional): Defaults to ``dict(
            type='mmsinger.OutlierSuppressionLoss', quantile=0.95,
            loss_weight=0.01)``.
        loss_info (dict, optional): Defaults to ``dict(
            type='mmsinger.GramInformationLoss', loss_weight=1.0)``.
        last_layer (str): Which distilled layer has no next block, so that its
            own FFN and its own tokens take that place. ``'final'``: the
            teacher's final block alone. ``'listed'``: the last of ``layers``
            whatever follows it (the official code). Defaults to ``'final'``.
        info_fraction (float): L_info is computed on this share of each
            batch's images, drawn anew in every step, at least one. Its mean
            is an unbiased estimate, with the teacher's block run again for
            these images alone. Defaults to 1.0, all.
        **kwargs: See :class:`FeatureDistiller`.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    required_hooks = FeatureDistiller.required_hooks + ('SiNGERAdapterHook', )

    def __init__(self,
                 adapter: Optional[dict] = None,
                 loss_outlier: Optional[dict] = None,
                 loss_info: Optional[dict] = None,
                 last_layer: str = 'final',
                 target_norm: Optional[str] = None,
                 info_fraction: float = 1.0,
                 **kwargs) -> None:
        # Mistakes are found before the models are built, which takes long.
        check_choice('last_layer', last_layer, ('final', 'listed'))
        if isinstance(info_fraction, bool) or \
                not isinstance(info_fraction, (int, float)) or \
                not 0 < info_fraction <= 1:
            raise ConfigError(
                f'info_fraction={info_fraction!r} must be above 0 and at most '
                '1, the share of images to compute L_info on. To leave L_info '
                'out, set loss_info.loss_weight=0.')
        adapter_cfg = _check_adapter_keys(dict(adapter or {}))
        outlier = build_loss(
            'loss_outlier', loss_outlier, 'mmsinger.OutlierSuppressionLoss')
        info = build_loss(
            'loss_info', loss_info, 'mmsinger.GramInformationLoss')
        super().__init__(target_norm=target_norm, **kwargs)
        self.last_layer = self.layers[-1] if last_layer == 'listed' \
            else len(self.teacher.blocks) - 1
        self.adapter_cfg = adapter_cfg
        self.info_fraction = info_fraction
        self._linearised: Dict[int, Tensor] = {}
        dim = self.teacher.blocks.dim
        self.adapters = nn.ModuleDict({
            str(layer): SiNGERAdapter(dim, **_pick(
                self.adapter_cfg, _BUILD_KEYS))
            for layer in self.layers
        })
        for layer in self.tapped_teacher_layers:
            if str(layer) not in self.target_norms:
                self.target_norms[str(layer)] = TargetNorm(dim, target_norm)
        self.loss_outlier, self.loss_info = outlier, info

    @property
    def tapped_teacher_layers(self) -> List[int]:
        """The distilled blocks and, of intermediate ones, the next block."""
        following = [layer + 1 for layer in self.layers
                     if layer != self.last_layer]
        return sorted({*self.layers, *following})

    # -- adapters ----------------------------------------------------------

    @property
    def needs_adapters(self) -> bool:
        """Whether :meth:`initialise_adapters` is still to be called."""
        return not all(a.initialised for a in self.adapters.values())

    def initialise_adapters(self) -> List[Dict[str, object]]:
        """Start the adapters from the teacher's weights (section 3.2).

        Returns:
            list[dict]: For each layer: ``layer``, ``block`` whose FFN was
            linearised, ``init``, ``rank``, ``singular_values`` kept,
            ``num_random``, ``e_safe`` and ``e_prob`` of the up-projection
            (Table 5a).

        Raises:
            ConfigError: If the teacher's FFN cannot be linearised.
        """
        if not self.teacher.loaded:
            raise RuntimeError('The adapters start from the teacher, which '
                               'has no weights yet: call init_weights().')
        infos = []
        for layer in self.layers:
            block, decomposition = self.decompose_ffn(layer)
            adapter = self.adapters[str(layer)]
            info = adapter.initialise(
                decomposition, **_pick(self.adapter_cfg, _INIT_KEYS))
            e_safe, e_prob = subspace_energy(adapter.up, decomposition[0])
            infos.append(dict(layer=layer, block=block, **info,
                              e_safe=e_safe, e_prob=e_prob))
        return infos

    def decompose_ffn(self, layer: int) -> Tuple[int, Tuple[Tensor, Tensor]]:
        """The linearised FFN that a layer's adapter starts from.

        Args:
            layer (int): A distilled layer.

        Returns:
            tuple[int, tuple[Tensor, Tensor]]: The block that it belongs to,
            and what :func:`cached_singular_directions` makes of it.
        """
        weight = self._linearised.get(layer)
        if weight is None:
            weight = self._linearise(layer)
        return self._next_block(layer), cached_singular_directions(weight)

    def _next_block(self, layer: int) -> int:
        return layer if layer == self.last_layer else layer + 1

    def _linearise(self, layer: int) -> Tensor:
        return linearised_ffn(
            self.teacher.blocks.modules[self._next_block(layer)],
            **_pick(self.adapter_cfg, _FFN_KEYS))

    def _read_teacher(self) -> None:
        # Small singular values do not survive rounding to bfloat16
        self._linearised = {} if self.teacher_dtype in (None, 'fp32') else {
            layer: self._linearise(layer) for layer in self.layers}

    def _check_ready(self) -> None:
        super()._check_ready()
        if self.needs_adapters:
            raise RuntimeError(
                'The adapters have not been initialised. Add '
                "dict(type='mmsinger.SiNGERAdapterHook') to custom_hooks, or "
                'call initialise_adapters() after init_weights().')

    def inlier_variance(self, record: StepRecord) -> Dict[int, Tensor]:
        """How much ordinary tokens shrink, see
        :func:`inlier_variance_ratio`.

        Args:
            record (StepRecord): Of a step.

        Returns:
            dict[int, Tensor]: A scalar for each layer, on its device.
        """
        return {
            layer: inlier_variance_ratio(
                values['teacher'].patches, values['refined'].patches,
                self.loss_outlier.quantile)
            for layer, values in record.layers.items()
        }

    # -- losses ------------------------------------------------------------

    def distill(self, taps: BlockTaps, student_tokens: Dict[int, Tokens]
                ) -> Dict[str, Tensor]:
        """L_KD, L_outlier and L_info, see :meth:`FeatureDistiller.distill`."""
        kd, outlier, info = [], [], []
        previous = None
        images = choose_images(
            len(student_tokens[self.layers[0]].values), self.info_fraction)
        for layer in self.layers:
            tokens = self.teacher_tokens(taps, layer)
            refined, target, excess = self.refine(layer, tokens)
            kd.append(self.kd_loss(layer, student_tokens[layer], target))
            outlier.append(excess)
            info.append(self._info_loss(taps, layer, tokens, refined,
                                        previous, images))
            previous = refined
            self.record(layer, refined=refined)
        count = len(self.layers)
        return dict(loss_kd=sum(kd) / count,
                    loss_outlier=sum(outlier) / count,
                    loss_info=sum(info) / count)

    def refine(self, layer: int, tokens: Tokens
               ) -> Tuple[Tokens, Tokens, Tensor]:
        """Refine the tokens of one layer.

        Args:
            layer (int): The teacher layer.
            tokens (Tokens): Its normalised output F, (B, N, D).

        Returns:
            tuple[Tokens, Tokens, Tensor]: F_hat, the KD target (the same, in
            the paper), and L_outlier.
        """
        refined = tokens.with_patches(
            self.adapters[str(layer)](tokens.patches))
        return refined, refined, self.loss_outlier(refined.patches)

    def _info_loss(self, taps: BlockTaps, layer: int, tokens: Tokens,
                   refined: Tokens, previous: Optional[Tokens],
                   images: List[slice]) -> Tensor:
        if self.loss_info.loss_weight == 0:
            return refined.values.new_zeros(())
        ours = take(refined.values, images)
        if layer == self.last_layer:
            reference = tokens
            if self.loss_info.last == 'previous' and previous is not None:
                reference = previous
            return self.loss_info(ours, take(reference.values, images),
                                  num_prefix=tokens.num_prefix)
        restored = self.target_norms[str(layer)].restore(ours)
        following = self.target_norms[str(layer + 1)]
        return self.loss_info(
            following.normalise(taps.rerun(layer + 1, restored)),
            following.normalise(
                take(taps.tokens(layer + 1).values, images)),
            num_prefix=tokens.num_prefix, is_last=False)


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
    """The chosen images of a batch (B, N, D)."""
    parts = [values[part] for part in images]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def inlier_variance_ratio(original: Tensor, refined: Tensor,
                          quantile: float) -> Tensor:
    """Variance of refined over original tokens that are no outliers.

    About 1 while refinement leaves them alone; an adapter that collapses
    shrinks them, and the KD loss then looks best when it is worst.

    Args:
        original (Tensor): Patch tokens F, shape (B, P, D).
        refined (Tensor): F_hat, shape (B, P, D).
        quantile (float): Tokens whose original norm is above their image's
            quantile are left out.

    Returns:
        Tensor: A scalar, on the tokens' device.
    """
    norms = torch.linalg.vector_norm(original.float(), dim=-1)
    inliers = (norms <= outlier_threshold(norms, quantile)).unsqueeze(-1)
    count = inliers.sum()

    def variance(tokens: Tensor) -> Tensor:
        tokens = tokens.float() * inliers
        mean = tokens.sum(dim=(0, 1)) / count
        return ((tokens - mean) * inliers).square().sum() / count

    return variance(refined) / variance(original).clamp(min=1e-12)


def _check_adapter_keys(cfg: Dict[str, Any]) -> Dict[str, Any]:
    known = _BUILD_KEYS + _FFN_KEYS + _INIT_KEYS
    check_keys('model.adapter', cfg, known)
    for key, choices in (('init', INITS), ('selection', SELECTIONS)):
        if key in cfg:
            check_choice(f'model.adapter.{key}', cfg[key], choices)
    return cfg


def _pick(cfg: Dict[str, Any], keys) -> Dict[str, Any]:
    return {key: cfg[key] for key in keys if key in cfg}
