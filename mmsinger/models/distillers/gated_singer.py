"""SiNGER for outliers alone. Ours, not the paper's."""
from typing import Any, Tuple

import torch
from torch import Tensor

from mmsinger.metrics.norms import robust_threshold
from mmsinger.models.distillers.singer import SiNGERDistiller
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.filter import check_limit, clip_norms
from mmsinger.registry import MODELS


@MODELS.register_module()
class GatedSiNGERDistiller(SiNGERDistiller):
    """SiNGER that refines tokens of abnormal norm and no other.

    **Not in the paper.** The paper's adapter acts on all patch tokens and may
    shrink ordinary ones, most of all where the teacher has few artifacts. For
    patch norms n of a batch, in the space that ``target_norm`` makes, with
    median ``med`` and ``tau = med + k * 1.4826 * MAD``, this class departs
    from it in three places:

    - ``F_hat = F + g delta(F)`` with the gate ``g = 1[n > tau]``;
    - L_outlier is half the mean of ``(||F_hat|| - med)^2`` over the gated
      tokens with ``||F_hat|| > med``, 0 if there are none (in place of the
      quantile, which then only chooses what ``inlier_variance`` looks at);
    - the KD target of gated tokens is ``F_hat min(1, med / ||F_hat||)``.

    Args:
        gate (dict): ``mad``: k. Defaults to ``dict(mad=8.0)``.
        **kwargs: See :class:`SiNGERDistiller`.
    """

    def __init__(self, gate: dict = dict(mad=8.0), **kwargs: Any) -> None:
        check_limit('gate', gate, ('mad', ))
        super().__init__(**kwargs)
        self.gate = gate

    def refine(self, layer: int, tokens: Tokens
               ) -> Tuple[Tokens, Tokens, Tensor]:
        """See :meth:`SiNGERDistiller.refine`."""
        norms = torch.linalg.vector_norm(tokens.patches.float(), dim=-1)
        median, threshold = robust_threshold(norms, **self.gate)
        gate = norms > threshold  # (B, P)
        refined = torch.where(
            gate.unsqueeze(-1), self.adapters[str(layer)](tokens.patches),
            tokens.patches)
        norms = torch.linalg.vector_norm(refined.float(), dim=-1)
        long = gate & (norms > median)
        excess = torch.where(long, norms - median, 0.).square().sum() \
            / (2 * long.sum().clamp(min=1))
        limit = torch.where(gate, median, float('inf'))
        return (tokens.with_patches(refined),
                tokens.with_patches(clip_norms(refined, norms, limit)),
                self.loss_outlier.loss_weight * excess)
