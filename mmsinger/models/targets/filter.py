"""Target filtering: tokens of abnormal norm are shortened or left out.

Not from the paper: baselines that any refinement has to beat.
"""
import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.metrics.norms import (outlier_threshold, robust_threshold,
                                    token_norms)
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.step import Targets, TargetStep, TeacherOutputs
from mmsinger.registry import MODELS
from mmsinger.schema import Positive, Quantile


class FilterStep(TargetStep):
    """A step that treats each layer's patch tokens on their own."""

    def filter(self, tokens: Tokens) -> Tokens:
        """Treat the tokens of one layer.

        Args:
            tokens (Tokens): Values of shape (B, N, D).

        Returns:
            Tokens: On the same grid.
        """
        raise NotImplementedError

    def forward(self, targets: Targets, outputs: TeacherOutputs
                ) -> Tuple[Targets, Dict[str, Tensor]]:
        """Filter all layers, see :class:`TargetStep`."""
        return {layer: self.filter(tokens)
                for layer, tokens in targets.items()}, {}


@MODELS.register_module()
class ClipNorms(FilterStep):
    """Shortens patch tokens to a largest norm.

    Args:
        quantile (float, optional): That norm is this quantile of an image's
            norms, in (0, 1). A fixed share is clipped: artifacts beyond it
            stay, and of a clean teacher ordinary tokens are shortened.
        mad (float, optional): That norm is ``median + mad * 1.4826 * MAD``
            of the batch's norms; in a distributed run of each process's
            part. Give one of the two.

    Raises:
        ConfigError: If a value is not valid.
    """

    def __init__(self, quantile: Optional[Quantile] = None,
                 mad: Optional[Positive] = None) -> None:
        super().__init__()
        self.limit = norm_limit(quantile=quantile, mad=mad)

    def filter(self, tokens: Tokens) -> Tokens:
        """See :meth:`FilterStep.filter`."""
        norms = token_norms(tokens.patches)
        limit = self.limit(norms, tokens.patch_weight)
        return tokens.with_patches(clip_norms(tokens.patches, norms, limit))


@MODELS.register_module()
class MaskTokens(FilterStep):
    """Leaves patch tokens of abnormal norm out of all that follows: losses,
    means and quantiles.

    Args:
        mad (float, optional): Leave out norms above ``median + mad * 1.4826
            * MAD`` of the batch's norms; in a distributed run of each
            process's part.
        oracle (bool): Leave out the tokens that a :class:`PlantedArtifacts`
            teacher planted. Defaults to False. Give one of the two.

    Raises:
        ConfigError: If a value is not valid.
    """

    keeps_values = True

    def __init__(self, mad: Optional[Positive] = None,
                 oracle: bool = False) -> None:
        super().__init__()
        self.oracle = oracle
        if not oracle or mad is not None:
            self.limit = norm_limit(' or oracle=True', mad=mad)
        if oracle and mad is not None:
            raise ConfigError(f'mad={mad!r} has no effect with '
                              'oracle=True. Give one of the two.')

    def prepare(self, teacher: nn.Module, layers: List[int]) -> None:
        """Raise :class:`ConfigError` if the teacher cannot give the mask."""
        if not self.oracle:
            return
        self.__dict__['_teacher'] = teacher  # no submodule
        if _planter(teacher) is None:
            raise ConfigError(
                'oracle=True needs a teacher that plants its '
                "artifacts itself: teacher.backbone=dict(type="
                "'mmsinger.PlantedArtifacts', backbone=…). For any other, "
                'use mad=6.0.')
        if teacher.feature_cache:
            raise ConfigError(
                'oracle=True asks the teacher about its last '
                f'pass, which teacher.feature_cache={teacher.feature_cache} '
                'leaves out for known images. Set teacher.feature_cache=0.')

    def filter(self, tokens: Tokens) -> Tokens:
        """See :meth:`FilterStep.filter`."""
        if self.oracle:
            return tokens.weighed(~_planter(self._teacher).planted_mask)
        norms = token_norms(tokens.patches)
        return tokens.weighed(norms <= self.limit(norms, tokens.patch_weight))


def _planter(teacher: nn.Module) -> Optional[nn.Module]:
    return next((module for module in teacher.modules()
                 if hasattr(module, 'planted_mask')), None)


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


def clip_norms(patches: Tensor, norms: Tensor, limit: Tensor) -> Tensor:
    """Shorten tokens to at most a norm; shorter ones stay as they are.

    Args:
        patches (Tensor): Shape (B, P, D).
        norms (Tensor): Their norms, shape (B, P).
        limit (Tensor): Broadcastable to (B, P).

    Returns:
        Tensor: Shape (B, P, D).
    """
    over = norms > limit
    # No infinite limit in what is differentiated: its gradient would be NaN
    scale = torch.where(over, limit, 1.) / torch.where(over, norms, 1.)
    return patches * scale.unsqueeze(-1).to(patches.dtype)


Limit = Callable[[Tensor, Optional[Tensor]], Tensor]


def norm_limit(more: str = '', **given: Any) -> Limit:
    """A limit of norms from what the user wrote.

    Args:
        more (str): What else would be valid, for messages.
        **given (float, optional): ``quantile``, ``mad``, or both of which
            one is None.

    Returns:
        Callable: Takes norms and their weights, both (B, P), and returns the
        limit, (B, 1) or a scalar.

    Raises:
        ConfigError: Unless exactly one is given.
    """
    chosen = {name: value for name, value in given.items()
              if value is not None}
    form = ' or '.join(f'{name}={0.95 if name == "quantile" else 6.0}'
                       for name in given) + more
    if len(chosen) != 1:
        raise ConfigError(f'{next(iter(given))}: give {form}'
                          f'{", not both" if chosen else ""}.')
    (name, value), = chosen.items()
    if name == 'quantile':
        return lambda norms, weight: outlier_threshold(norms, value, weight)
    return lambda norms, weight: robust_threshold(
        norms, value, weight=weight)[1]
