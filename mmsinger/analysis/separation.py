"""What tells artifacts from content in the norms of patch tokens.

Pure functions; docs/analysis.md says why these. Norms are compared with the
median of their own image throughout, so that images and blocks of different
scale can be put together.
"""
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from mmsinger.metrics.norms import (MAD_TO_STD, outlier_threshold,
                                    robust_outliers)
from mmsinger.models.features.tokens import Grid

# The histogram of log2(norm / median): bins of 1/16 octave from 1/16 to 256
BINS_PER_OCTAVE = 16
LOWEST, HIGHEST = -4, 8
NUM_BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE

SMOOTHING = 2.  # bins, standard deviation


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
    """Tokens that are far from the rest of their image by three measures:
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


def ratio_spread(counts: Tensor) -> float:
    """Robust standard deviation of norm over median, of all images together.

    Args:
        counts (Tensor): From :func:`ratio_histogram`, shape (NUM_BINS, ).

    Returns:
        float: 1.4826 times the median absolute deviation from 1, as exact as
        the bins are.
    """
    deviations, order = (bin_ratios() - 1).abs().sort()
    cumulated = counts[order].cumsum(0)
    middle = int((cumulated < cumulated[-1] / 2).sum())
    return MAD_TO_STD * float(deviations[middle])


def bin_ratios() -> Tensor:
    """Norm over median at the centre of each bin, shape (NUM_BINS, )."""
    centres = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5
               ) / BINS_PER_OCTAVE + LOWEST
    return 2**centres


def tail_group(counts: Tensor, min_share: float = 0.001,
               max_share: float = 0.15, min_ratio: float = 2.,
               significance: float = 4.) -> Optional[TailGroup]:
    """Look for a second, small group of tokens above the bulk.

    The histogram is smoothed; of all valleys to the right of its highest
    peak the deepest one counts. What lies above it has to be a small share of
    the tokens, far enough up, and more than chance: its peak has to exceed
    the valley by ``significance`` standard deviations of the difference of
    two counts.

    Args:
        counts (Tensor): From :func:`ratio_histogram`, shape (NUM_BINS, ).
        min_share (float): Of all tokens. Defaults to 0.001.
        max_share (float): What is more frequent is content. Defaults to 0.15.
        min_ratio (float): Least median of the group. Defaults to 2.
        significance (float): Defaults to 4.

    Returns:
        TailGroup | None: The group, None if there is none.
    """
    total = counts.sum()
    density = _smooth(counts)
    # What the counts under a peak of the smoothed histogram are worth
    window = 2 * torch.pi**0.5 * SMOOTHING
    top = int(density.argmax())
    best = None
    for valley in range(top + 1, NUM_BINS - 1):
        share = float(counts[valley:].sum() / total)
        if not min_share <= share <= max_share:
            continue
        peak, low = density[valley:].max(), density[valley]
        ratio = _median_ratio(counts, valley)
        chance = (window * (peak + low)).sqrt()
        if ratio < min_ratio or window * (peak - low) < significance * chance:
            continue
        depth = float(1 - low / peak)
        if best is None or depth > best.depth:
            best = TailGroup(share, ratio, depth,
                             2**(LOWEST + valley / BINS_PER_OCTAVE))
    return best


def _smooth(counts: Tensor) -> Tensor:
    reach = int(4 * SMOOTHING)
    steps = torch.arange(-reach, reach + 1, dtype=counts.dtype)
    kernel = torch.exp(-0.5 * (steps / SMOOTHING)**2)
    return torch.nn.functional.conv1d(
        counts[None, None], (kernel / kernel.sum())[None, None],
        padding=reach)[0, 0]


def _median_ratio(counts: Tensor, start: int) -> float:
    cumulated = counts[start:].cumsum(0)
    middle = int((cumulated < cumulated[-1] / 2).sum())
    return float(bin_ratios()[start + middle])


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
    ordered = values.sort(dim=1).values
    values = values.contiguous()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * values.shape[1])


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


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles of two subspaces: 1 if they
    are the same, r / D on average if one is random.

    Args:
        a (Tensor): Orthonormal rows, shape (r, D).
        b (Tensor): Orthonormal rows, shape (r, D).

    Returns:
        float: In [0, 1].
    """
    return float((a.double() @ b.double().T).square().sum() / len(a))
