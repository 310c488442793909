"""What tells artifacts from content in the norms of patch tokens.

Pure functions; docs/analysis.md says why these. Norms are compared with the
median of their own image throughout, so that images and blocks of different
scale can be put together.
"""
from typing import NamedTuple, Optional

import torch
from scipy.ndimage import gaussian_filter1d
from scipy.stats import rankdata
from torch import Tensor

from mmsinger.metrics.norms import (MAD_TO_STD, outlier_threshold,
                                    robust_outliers)
from mmsinger.models.features.tokens import Grid

# The histogram of log2(norm / median): bins of 1/16 octave from 1/16 to 256
BINS_PER_OCTAVE = 16
LOWEST, HIGHEST = -4, 8
NUM_BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE
SMOOTHING = 2.  # bins, standard deviation

# A group of artifacts
MIN_SHARE, MAX_SHARE = 0.001, 0.15  # of all tokens; more is content
MIN_RATIO = 2.  # median of the group in medians of the images
SIGNIFICANCE = 4.  # standard deviations of the difference of two counts


class TailGroup(NamedTuple):
    """Tokens that form a group of their own above the bulk.

    Attributes:
        share (float): Of all tokens, those above the valley.
        ratio (float): Their median norm, in medians of their images.
        depth (float): 1 - density in the valley / at the group's peak: 1 for
            an empty gap, 0 for a tail that only falls.
        cut (float): Where the valley is, in medians.
    """
    share: float
    ratio: float
    depth: float
    cut: float


def far_outliers(norms: Tensor, spread: float, k: float = 10.,
                 ratio: float = 2.) -> Tensor:
    """Find tokens that are far from the rest of their image by three measures:
    more than ``k`` robust standard deviations of their image above its
    median, as many of a usual image, and more than ``ratio`` times the median.

    An image that is mostly plain background has next to no spread, so that by
    its own measure alone every object on it would be an outlier.

    Args:
        norms (Tensor): Shape (B, P).
        spread (float): Robust standard deviation of norm over median of a
            usual image, see :func:`ratio_spread`.
        k (float): See :func:`mmsinger.metrics.robust_outliers`. Defaults
            to 10, which 1 of 58,000 tokens exceeds even where norms have a
            two-sided exponential distribution.
        ratio (float): Defaults to 2.

    Returns:
        Tensor: Shape (B, P), bool.
    """
    least = max(ratio, 1 + k * spread)
    return robust_outliers(norms, k) & (
        norms.float() > least * outlier_threshold(norms, 0.5))


def ratio_histogram(norms: Tensor) -> Tensor:
    """Count ``log2(norm / median of its image)``.

    Args:
        norms (Tensor): Shape (B, P).

    Returns:
        Tensor: Counts, shape (NUM_BINS, ), float64; what lies outside is
        counted in the first or last bin. Counts of several batches add up.
    """
    ratios = norms.float() / outlier_threshold(norms, 0.5)  # (B, P)
    bins = (ratios.log2() - LOWEST) * BINS_PER_OCTAVE
    bins = bins.nan_to_num(0.).clamp(0, NUM_BINS - 1).long()
    return torch.bincount(bins.flatten(), minlength=NUM_BINS).double()


def bin_ratios() -> Tensor:
    """Norm over median at the centre of each bin, shape (NUM_BINS, )."""
    centres = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5
               ) / BINS_PER_OCTAVE + LOWEST
    return 2**centres


def ratio_spread(counts: Tensor) -> float:
    """Robust standard deviation of norm over median, of all images together.

    Args:
        counts (Tensor): From :func:`ratio_histogram`, shape (NUM_BINS, ).

    Returns:
        float: 1.4826 times the median absolute deviation from 1, as exact as
        the bins are.
    """
    return MAD_TO_STD * _median((bin_ratios() - 1).abs(), counts)


def tail_group(counts: Tensor) -> Optional[TailGroup]:
    """Look for a second, small group of tokens above the bulk.

    The histogram is smoothed; of all valleys to the right of its highest
    peak the deepest one counts. What lies above it has to be a small share of
    the tokens (0.1 to 15 %), far enough up (2 medians), and more than chance:
    its peak has to exceed the valley by 4 standard deviations of the
    difference of two counts.

    Args:
        counts (Tensor): From :func:`ratio_histogram`, shape (NUM_BINS, ).

    Returns:
        TailGroup | None: The group, None if there is none.
    """
    total = counts.sum()
    density = torch.from_numpy(gaussian_filter1d(
        counts.numpy(), SMOOTHING, mode='constant'))
    # What the counts under a peak of the smoothed histogram are worth
    window = 2 * torch.pi**0.5 * SMOOTHING
    best = None
    for valley in range(int(density.argmax()) + 1, NUM_BINS - 1):
        share = float(counts[valley:].sum() / total)
        if not MIN_SHARE <= share <= MAX_SHARE:
            continue
        peak, low = density[valley:].max(), density[valley]
        ratio = _median(bin_ratios()[valley:], counts[valley:])
        chance = (window * (peak + low)).sqrt()
        if ratio < MIN_RATIO or window * (peak - low) < SIGNIFICANCE * chance:
            continue
        depth = float(1 - low / peak)
        if best is None or depth > best.depth:
            best = TailGroup(share, ratio, depth,
                             2**(LOWEST + valley / BINS_PER_OCTAVE))
    return best


def _median(values: Tensor, counts: Tensor) -> float:
    """The lower median of values that occur several times each."""
    values, order = values.sort()
    cumulated = counts[order].cumsum(0)
    return float(values[int((cumulated < cumulated[-1] / 2).sum())])


def patch_contrast(images: Tensor, grid: Grid) -> Tensor:
    """How much there is to see in each patch: the standard deviation of its
    pixels, root mean square over the channels.

    Args:
        images (Tensor): Shape (B, 3, H, W).
        grid (tuple[int, int]): Rows h and columns w of patches.

    Returns:
        Tensor: Shape (B, h * w), float64.
    """
    pool = torch.nn.functional.adaptive_avg_pool2d
    images = images.double()
    variance = pool(images.square(), grid) - pool(images, grid).square()
    return variance.clamp(min=0).mean(dim=1).sqrt().flatten(1)


def within_image_rank(values: Tensor) -> Tensor:
    """The share of an image's patches that have a smaller value, equal ones
    counted half: its mean over an image is 0.5.

    Args:
        values (Tensor): Shape (B, P).

    Returns:
        Tensor: Shape (B, P), float64, in (0, 1).
    """
    ranks = torch.from_numpy(rankdata(values.cpu().numpy(), axis=1))
    return ((ranks - 0.5) / values.shape[1]).to(values.device)


def excess(patches: Tensor, outliers: Tensor) -> Tensor:
    """What outliers have that the other tokens of their image have not: the
    difference to their mean.

    Args:
        patches (Tensor): Shape (B, P, D).
        outliers (Tensor): Fewer than all of an image, shape (B, P), bool.

    Returns:
        Tensor: One row an outlier, shape (n, D), float32.
    """
    patches = patches.float()
    others = (~outliers).unsqueeze(-1)
    mean = (patches * others).sum(1, keepdim=True) / others.sum(
        1, keepdim=True)
    return (patches - mean)[outliers]


def spanned_dimensions(rows: Tensor, energy: float = 0.9) -> int:
    """The number of directions that hold a share of the rows' energy.

    Args:
        rows (Tensor): Shape (n, D), n > 0.
        energy (float): Share of the squared Frobenius norm. Defaults to 0.9.

    Returns:
        int: At least 1.
    """
    squares = torch.linalg.svdvals(rows.double().cpu()).square()
    cumulated = squares.cumsum(0) / squares.sum()
    return int((cumulated < energy).sum()) + 1
