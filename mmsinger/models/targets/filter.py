"""Target filtering: tokens of abnormal norm are shortened or left out.

Not from the paper: baselines that any refinement has to beat.
"""
from typing import Any, Dict, List, Optional, Tuple

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
        check_one('quantile', 'quantile=0.95 or mad=6.0', quantile, mad)
        self.quantile, self.mad = quantile, mad

    def filter(self, tokens: Tokens) -> Tokens:
        """See :meth:`FilterStep.filter`."""
        norms, weight = token_norms(tokens.patches), tokens.patch_weight
        limit = outlier_threshold(norms, self.quantile, weight) \
            if self.mad is None else robust_threshold(
                norms, self.mad, weight)[1]
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
        check_one('mad', 'mad=6.0 or oracle=True', mad, oracle or None)
        self.mad, self.oracle = mad, oracle

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
        return tokens.weighed(norms <= robust_threshold(
            norms, self.mad, tokens.patch_weight)[1])


def _planter(teacher: nn.Module) -> Optional[nn.Module]:
    return next((module for module in teacher.modules()
                 if hasattr(module, 'planted_mask')), None)


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


def check_one(key: str, form: str, *given: Any) -> None:
    """Raise :class:`ConfigError` unless one of two settings is given."""
    count = sum(value is not None for value in given)
    if count != 1:
        raise ConfigError(f'{key}: give {form}'
                          f'{", not both" if count else ""}.')
