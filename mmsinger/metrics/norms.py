"""Token norms: how far they spread, which are outliers, how they grow.

Pure functions on the norms of patch tokens, one result an image, without a
wait for the device unless it is said.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from mmsinger.models.features.tokens import Grid
from mmsinger.models.losses import outlier_threshold
from mmsinger.models.targets.filter import MAD_TO_STD


class NormStatistics(NamedTuple):
    """Of the patch norms of each image; every field has shape (B, ).

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


def robust_outliers(norms: Tensor, k: float = 5.) -> Tensor:
    """Which norms exceed ``median + k * 1.4826 * MAD`` of their image.

    MAD is the median absolute deviation from the median, so that up to half
    of the tokens may be artifacts; an image without artifacts has hardly any.
    One threshold an image, unlike
    :func:`mmsinger.models.targets.filter.robust_threshold`, which takes a batch
    together.

    Args:
        norms (Tensor): Shape (B, P).
        k (float): Standard deviations of a normal distribution. Defaults
            to 5.

    Returns:
        Tensor: Shape (B, P), bool. Its mean over P is the share.
    """
    norms = norms.float()
    median = outlier_threshold(norms, 0.5)  # (B, 1)
    deviation = outlier_threshold((norms - median).abs(), 0.5)
    return norms > median + k * MAD_TO_STD * deviation


def outlier_positions(outliers: Tensor, grid: Grid) -> Tensor:
    """Where outliers lie. Waits for the device: their number is data.

    Args:
        outliers (Tensor): Shape (B, P), bool.
        grid (tuple[int, int]): Rows h and columns w of patches, P = h w.

    Returns:
        Tensor: One row (image, patch row, patch column) an outlier, shape
        (n, 3), int64.
    """
    return outliers.unflatten(1, tuple(grid)).nonzero()


def norm_gain(before: Tensor, after: Tensor) -> Tensor:
    """``G = ||after|| / ||before||`` of token norms (appendix A, Table 7).

    Args:
        before (Tensor): Norms of what goes in, any shape.
        after (Tensor): Norms of what comes out, the same shape.

    Returns:
        Tensor: The same shape.
    """
    return after / before


def norm_growth(before: Tensor, after: Tensor) -> Tensor:
    """``delta = (||after|| - ||before||) / ||before||`` of token norms
    (appendix A, Table 7).

    Args:
        before (Tensor): Norms of what goes in, any shape.
        after (Tensor): Norms of what comes out, the same shape.

    Returns:
        Tensor: The same shape; negative where norms shrink.
    """
    return (after - before) / before
