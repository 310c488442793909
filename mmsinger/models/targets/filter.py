"""Simple cures for artifacts in KD targets: clip them, or leave them out."""
from typing import Optional, Tuple, Union

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError, check_keys
from mmsinger.metrics.norms import outlier_threshold, robust_threshold
from mmsinger.models.features.tokens import Tokens


class TargetCure:
    """Treats target tokens of abnormal norm; of patch tokens alone, in the
    space that ``target_norm`` makes.

    Not from the paper: baselines that any refinement has to beat.

    Args:
        clip (dict, optional): ``dict(quantile=0.95)``: patch tokens longer
            than this quantile of their image's norms are shortened to it.
            ``dict(mad=6.0)``: the threshold is :func:`robust_threshold` of
            the batch. Defaults to None, no clipping.
        mask (dict | str, optional): ``dict(mad=6.0)``: patch tokens longer
            than that threshold are left out of the KD loss. ``'oracle'``:
            those that the teacher says it planted (``planted_mask`` of
            :class:`PlantedArtifacts`). Defaults to None, no mask.

    Raises:
        ConfigError: If a value is not valid.
    """

    def __init__(self, clip: Optional[dict] = None,
                 mask: Union[dict, str, None] = None) -> None:
        if clip is not None:
            check_limit('clip', clip, ('quantile', 'mad'))
        if mask is not None and mask != 'oracle':
            check_limit('mask', mask, ('mad', ), " or 'oracle'")
        self.clip = clip
        self.mask = mask

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise :class:`ConfigError` if the teacher cannot give the mask."""
        if self.mask == 'oracle' and _planter(teacher) is None:
            raise ConfigError(
                "mask='oracle' needs a teacher that plants its artifacts "
                "itself: teacher.backbone=dict(type="
                "'mmsinger.PlantedArtifacts', backbone=…). For any other, "
                'use mask=dict(mad=6.0).')
        if self.mask == 'oracle' and teacher.remember:
            raise ConfigError(
                "mask='oracle' asks the teacher about its last pass, which "
                f'teacher.remember={teacher.remember} leaves out for known '
                'images. Set teacher.remember=0.')

    def __call__(self, target: Tokens, teacher: nn.Module
                 ) -> Tuple[Tokens, Optional[Tensor]]:
        """Apply the cure.

        Args:
            target (Tokens): Values of shape (B, N, D).
            teacher (nn.Module): Which has just been run on the batch.

        Returns:
            tuple[Tokens, Tensor | None]: The tokens, clipped; and the weight
            of each patch token, 1 or 0, of shape (B, P), None if all count.
        """
        if self.clip is None and self.mask is None:
            return target, None
        norms = torch.linalg.vector_norm(target.patches.float(), dim=-1)
        weight = None
        if self.mask == 'oracle':
            weight = (~_planter(teacher).planted_mask).float()
        elif self.mask is not None:
            weight = (norms <= robust_threshold(norms, **self.mask)[1]).float()
        if self.clip is not None:
            target = target.with_patches(clip_norms(
                target.patches, norms, self._limit(norms)))
        return target, weight

    def _limit(self, norms: Tensor) -> Tensor:
        if 'quantile' in self.clip:
            return outlier_threshold(norms, self.clip['quantile'])
        return robust_threshold(norms, **self.clip)[1]


def clip_norms(patches: Tensor, norms: Tensor, limit: Tensor) -> Tensor:
    """Shorten tokens to at most a norm; shorter ones stay as they are.

    Args:
        patches (Tensor): Shape (B, P, D).
        norms (Tensor): Their norms, shape (B, P).
        limit (Tensor): Broadcastable to (B, P).

    Returns:
        Tensor: Shape (B, P, D).
    """
    scale = (limit / norms.clamp(min=1e-6)).clamp(max=1)
    return patches * scale.unsqueeze(-1).to(patches.dtype)


def _planter(teacher: nn.Module) -> Optional[nn.Module]:
    return next((module for module in teacher.modules()
                 if hasattr(module, 'planted_mask')), None)


def check_limit(key: str, cfg: dict, known: Tuple[str, ...], more: str = ''
                ) -> None:
    """Raise :class:`ConfigError` unless ``cfg`` says one limit of norms.

    Args:
        key (str): Its key in ``model``.
        cfg (dict): What the user wrote: ``dict(quantile=…)``,
            ``dict(mad=…)``.
        known (tuple[str]): The names that it may have.
        more (str): What else would be valid, for the message. Defaults
            to ``''``.
    """
    form = ' or '.join(f'dict({name}={0.95 if name == "quantile" else 6.0})'
                       for name in known) + more
    if not isinstance(cfg, dict) or len(cfg) != 1:
        raise ConfigError(f'model.{key}={cfg!r} is not valid: give {form}.')
    check_keys(f'model.{key}', cfg, known)
    (name, value), = cfg.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value <= 0 or (name == 'quantile' and value >= 1):
        raise ConfigError(
            f'model.{key}.{name}={value!r} is not valid: give a number '
            + ('between 0 and 1, both excluded.' if name == 'quantile'
               else 'above 0.'))
