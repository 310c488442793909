"""Token norms: how far they spread, which are outliers, how they grow.

Pure functions on the norms of patch tokens, without a wait for the device
unless it is said.
"""
import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

# The standard deviation of a normal distribution over its MAD
MAD_TO_STD = 1.4826


class NormStatistics(NamedTuple):
    """What each image's patch norms are like; every field has shape (B, ).

    Attributes:
        median (Tensor): Median.
        p95 (Tensor): 95th percentile.
        p99 (Tensor): 99th percentile.
        max_over_median (Tensor): Largest norm over the median.
        kurtosis (Tensor): Fourth standardised moment: 3 for a normal
            distribution, more with a heavy tail; NaN if all norms are equal.
    """
    median: Tensor
    p95: Tensor
    p99: Tensor
    max_over_median: Tensor
    kurtosis: Tensor


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norms of tokens (B, P, C): shape (B, P), float32."""
    return torch.linalg.vector_norm(tokens.float(), dim=-1)


def norm_statistics(norms: Tensor) -> NormStatistics:
    """Describe the distribution of each image's patch norms.

    Args:
        norms (Tensor): Shape (B, P).

    Returns:
        NormStatistics: Its fields have shape (B, ).
    """
    norms = norms.float()
    levels = norms.new_tensor([0.5, 0.95, 0.99])
    median, p95, p99 = torch.quantile(norms, levels, dim=1)
    centred = norms - norms.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1)
    return NormStatistics(
        median, p95, p99, norms.amax(dim=1) / median,
        centred.pow(4).mean(dim=1) / variance.square())


def lower_median(values: Tensor, dim: int) -> Tensor:
    """``values.median(dim).values``, which has no deterministic version on
    GPUs.

    Args:
        values (Tensor): Any shape.
        dim (int): The dimension to reduce.

    Returns:
        Tensor: The shape of ``values`` with ``dim`` of length 1.
    """
    middle = (values.shape[dim] - 1) // 2
    return values.sort(dim=dim).values.narrow(dim, middle, 1)


def outlier_threshold(norms: Tensor, quantile: float,
                      weight: Optional[Tensor] = None) -> Tensor:
    """The quantile of each image's patch norms, without gradient.

    Args:
        norms (Tensor): Token norms, shape (B, P).
        quantile (float): In (0, 1).
        weight (Tensor, optional): Shape (B, P); tokens of weight 0 do not
            count, all others alike. Defaults to None, all count.

    Returns:
        Tensor: Shape (B, 1), float32; infinite for an image without a token
        that counts.
    """
    norms = norms.detach().float()
    if weight is None:
        return torch.quantile(norms, quantile, dim=1, keepdim=True)
    norms = norms.masked_fill(weight == 0, math.nan)
    return torch.nanquantile(norms, quantile, dim=1, keepdim=True).nan_to_num(
        nan=math.inf, posinf=math.inf)


def robust_threshold(norms: Tensor, mad: float,
                     weight: Optional[Tensor] = None
                     ) -> Tuple[Tensor, Tensor]:
    """A norm that no ordinary token has: ``median + mad * 1.4826 * MAD``.

    MAD is the median absolute deviation from the median, so that up to half
    of the tokens may be artifacts. Medians are the lower of the two middle
    values of an even number.

    Args:
        norms (Tensor): Patch norms of a batch, shape (B, P).
        mad (float): Distance from the median in robust standard deviations,
            1.4826 MAD each.
        weight (Tensor, optional): Shape (B, P); tokens of weight 0 do not
            count, all others alike. Defaults to None, all count.

    Returns:
        tuple[Tensor, Tensor]: The median norm and the threshold, scalars
        without gradient, float32. Both infinite where no token counts.
    """
    norms = norms.detach().float()

    def median_of(values: Tensor) -> Tensor:
        if weight is None:
            return values.median()
        # nanmedian() waits for the device in some versions of torch
        values = values.masked_fill(weight == 0, math.inf).flatten().sort()[0]
        middle = ((weight != 0).sum() - 1).clamp(min=0) // 2
        return values.gather(0, middle[None])[0]

    median = median_of(norms)
    deviation = median_of((norms - median).abs())
    return median, median + mad * MAD_TO_STD * deviation


def quantile_outliers(norms: Tensor, quantile: float = 0.95) -> Tensor:
    """Which norms exceed a quantile of their image, as in L_outlier.

    About a share of 1 - quantile in every image, artifacts or not.

    Args:
        norms (Tensor): Shape (B, P).
        quantile (float): In (0, 1). Defaults to 0.95.

    Returns:
        Tensor: Shape (B, P), bool. Its mean over P is the share.
    """
    return norms.float() > outlier_threshold(norms, quantile)


def robust_outliers(norms: Tensor, k: float = 5.,
                    weight: Optional[Tensor] = None) -> Tensor:
    """Which norms exceed ``median + k * 1.4826 * MAD`` of their image, with
    medians between the two middle values of an even number. An image without
    artifacts has hardly any.

    Args:
        norms (Tensor): Shape (B, P).
        k (float): Standard deviations of a normal distribution. Defaults
            to 5.
        weight (Tensor, optional): Shape (B, P); tokens of weight 0 are none
            and do not count. Defaults to None, all count.

    Returns:
        Tensor: Shape (B, P), bool. Its mean over P is the share.
    """
    norms = norms.float()
    median = outlier_threshold(norms, 0.5, weight)  # (B, 1)
    deviation = outlier_threshold((norms - median).abs(), 0.5, weight)
    outliers = norms > median + k * MAD_TO_STD * deviation
    return outliers if weight is None else outliers & (weight != 0)
