"""Standardising the features that a student is to match."""
from typing import Literal, Optional

import torch
from torch import Tensor, nn

from mmsinger.metrics.norms import lower_median
from mmsinger.schema import check_value

Mode = Optional[Literal['standardise', 'layernorm']]


class TargetNorm(nn.Module):
    """Brings one teacher layer's tokens to a common scale.

    Raw block outputs have a large mean and norm; a student learns them slowly
    or not at all. Statistics are robust, so that artifacts hardly move them.

    Args:
        dim (int): Channels D of the teacher.
        mode (str, optional): ``'standardise'``: subtract the channels' median
            and divide by the median norm of what is left over sqrt(D); the
            whole method (adapter, outlier and Gram losses) then works in that
            space, where a typical token has the norm sqrt(D).
            ``'layernorm'``: the KD target alone passes a layer norm without
            weights. None: raw features, the paper. Defaults to None.
    """

    def __init__(self, dim: int, mode: Mode = None) -> None:
        super().__init__()
        check_value('target_norm', mode, Mode)
        self.mode = mode
        if mode == 'standardise':
            self.register_buffer('centre', torch.full((dim, ), float('nan')))
            self.register_buffer('scale', torch.full((), float('nan')))

    def calibrate(self, values: Tensor) -> None:
        """Set centre and scale from a calibration pass.

        Args:
            values (Tensor): Patch tokens of many images, shape (n, D).
        """
        values = values.float()
        self.centre.copy_(lower_median(values, dim=0)[0])
        norms = (values - self.centre).norm(dim=-1)
        self.scale.copy_(
            (norms.median() / values.shape[1]**0.5).clamp(min=1e-6))

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`calibrate` is still to be called."""
        # Of a checkpoint for another width, mmengine loads the scale alone
        return self.mode == 'standardise' and not torch.isfinite(
            self.centre * self.scale).all()

    def normalise(self, tokens: Tensor) -> Tensor:
        """Raw tokens (B, N, D) to the space that the method works in."""
        if self.mode == 'standardise':
            return (tokens.float() - self.centre) / self.scale
        return tokens

    def restore(self, tokens: Tensor) -> Tensor:
        """Back to raw tokens (B, N, D), as the next teacher block expects."""
        if self.mode == 'standardise':
            return tokens * self.scale + self.centre
        return tokens

    def target(self, tokens: Tensor) -> Tensor:
        """Normalised (refined) tokens (B, N, D) to the KD target."""
        if self.mode == 'layernorm':
            return nn.functional.layer_norm(tokens.float(),
                                            tokens.shape[-1:])
        return tokens
