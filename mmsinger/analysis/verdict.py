"""Has a teacher artifacts, from which block on, and what to do about it."""
import os
from typing import List, NamedTuple, Optional, Sequence

from mmsinger.analysis.separation import MIN_SHARE, TailGroup

# The criteria; docs/analysis.md gives the reasons.
MIN_IMAGES = 0.1     # share of the images that have some
MIN_DEPTH = 0.5      # of the valley below a separate group
MIN_GROWTH = 1.5     # of max / median over one block
MIN_RATIO = 2.       # max / median below which growth means nothing
ENOUGH_IMAGES = 16
RANKS = (16, 32, 64)
QUANTILES = (0.99, 0.97, 0.95, 0.9)
PRESET = 'configs/_base_/distillers/robust.py'


class Evidence(NamedTuple):
    """What was seen in the norms of one block's patch tokens.

    Attributes:
        far_share (float): Share of all tokens that are far, see
            :func:`mmsinger.analysis.separation.far_outliers`.
        far_images (float): Share of the images that have such tokens.
        max_over_median (float): Largest norm of an image over its median,
            mean over the images.
        group (TailGroup | None): The separate group, if there is one.
        busiest (float): Share of far tokens in an image, 95th percentile
            over the images.
        dimensions (int): Directions that hold 90 % of what far tokens have
            beyond the others; 0 without any.
    """
    far_share: float
    far_images: float
    max_over_median: float
    group: Optional[TailGroup] = None
    busiest: float = 0.
    dimensions: int = 0


class Signs(NamedTuple):
    """Which signs of artifacts a block shows."""
    far: bool
    separate: bool
    sudden: bool


class Verdict(NamedTuple):
    """The judgement on a teacher.

    Attributes:
        status (str): ``'artifacts'``, ``'unclear'`` or ``'clean'``.
        onset (int | None): The first block with artifacts.
        affected (list[int]): That block and the later ones that show them.
        signs (list[Signs]): For each block.
        headline (str): The verdict in one sentence.
        reasons (list[str]): The evidence in plain words.
    """
    status: str
    onset: Optional[int]
    affected: List[int]
    signs: List[Signs]
    headline: str
    reasons: List[str]

    @property
    def introduction(self) -> str:
        """What the suggested config is for; said before it."""
        if self.status == 'artifacts':
            return 'A SiNGER config to begin with:'
        return ("If you want to try SiNGER all the same, these are the paper's"
                ' settings for a teacher of this depth:')


class Suggestion(NamedTuple):
    """Settings of a ``SiNGERDistiller`` to begin with.

    Attributes:
        layers (list[int]): Teacher blocks to distil.
        rank (int): Rank of the adapters.
        quantile (float): Quantile of the outlier loss.
    """
    layers: List[int]
    rank: int
    quantile: float


def judge(evidence: Sequence[Evidence], num_images: int) -> Verdict:
    """Judge a teacher by its blocks.

    A block has artifacts if it shows two of three signs: tokens far above
    the rest, a separate group of them, and a sudden rise of the largest norms
    over this block. Later blocks, which receive them through the residual
    stream, need one of the first two.

    Args:
        evidence (Sequence[Evidence]): For each block, in order.
        num_images (int): How many images were seen.

    Returns:
        Verdict: The judgement.
    """
    signs = [_signs(seen, evidence[i - 1] if i else None)
             for i, seen in enumerate(evidence)]
    onset = next((i for i, s in enumerate(signs) if sum(s) >= 2), None)
    lasting = [i for i, s in enumerate(signs) if s.far or s.separate]
    affected = [] if onset is None else [
        onset, *(i for i in lasting if i > onset)]
    if affected:
        status, headline = 'artifacts', f'Artifacts from block {onset} on'
        if affected != list(range(onset, len(evidence))):
            headline += f', in blocks {_ranges(affected)} of {len(evidence)}'
        headline += '.'
        reasons = _artifact_reasons(evidence, signs, affected)
    elif lasting:
        status, headline = 'unclear', (
            'Unclear: norms have a long tail, but no block makes artifacts '
            'of the known kind.')
        reasons = _unclear_reasons(evidence, lasting)
    else:
        status, headline = 'clean', (
            'Clean: no artifacts found. There is nothing to suppress.')
        reasons = _clean_reasons(evidence)
    if num_images < ENOUGH_IMAGES:
        reasons.append(
            f'Only {num_images} image{"s were" if num_images > 1 else " was"}'
            ' seen: repeat this with 64 or more before you rely on it.')
    return Verdict(status, onset, affected, signs, headline, reasons)


def _signs(seen: Evidence, previous: Optional[Evidence]) -> Signs:
    return Signs(
        far=seen.far_share >= MIN_SHARE and seen.far_images >= MIN_IMAGES,
        separate=seen.group is not None and seen.group.depth >= MIN_DEPTH,
        sudden=previous is not None and seen.max_over_median >= MIN_RATIO and
        seen.max_over_median >= MIN_GROWTH * previous.max_over_median)


def _artifact_reasons(evidence: Sequence[Evidence], signs: List[Signs],
                      affected: List[int]) -> List[str]:
    onset, last = affected[0], len(evidence) - 1
    seen, end, reasons = evidence[onset], evidence[last], []
    if signs[onset].far:
        reasons.append(
            f'Block {onset}: {percent(seen.far_share)} of the patch tokens, '
            f'in {percent(seen.far_images)} of the images, have norms far '
            'above the rest of their image (more than 10 robust standard '
            'deviations above its median, and more than twice the median).')
    if signs[onset].separate:
        reasons.append(
            f'Block {onset}: {percent(seen.group.share)} of the tokens form '
            f'a group of their own, at {seen.group.ratio:.1f} times the '
            f'median, above a gap in the distribution at '
            f'{seen.group.cut:.1f} times the median.')
    if signs[onset].sudden:
        before = evidence[onset - 1].max_over_median
        reasons.append(
            f'They come suddenly: the largest norm of an image is '
            f'{before:.1f} times the median after block {onset - 1} and '
            f'{seen.max_over_median:.1f} times after block {onset}.')
    if onset:
        reasons.append(f'No block before {onset} shows two of the three '
                       'signs (far, separate, sudden).')
    if last not in affected:
        reasons.append(
            f'The last block, {last}, is neither far nor separate any more: '
            f'its far tokens are {percent(end.far_share)} of all, and the '
            f'largest norm of an image is {end.max_over_median:.1f} times the '
            'median. They may still be there, hidden among longer tokens.')
    elif last != onset:
        reasons.append(
            f'They last: after the last block, {last}, '
            f'{percent(end.far_share)} of the tokens are far above the rest, '
            f'the largest at {end.max_over_median:.1f} times the median.')
    return [*reasons, f'To distil from it, begin with {PRESET}, which removes '
            'the directions that set such tokens apart; the config below is '
            'for SiNGER.']


def _unclear_reasons(evidence: Sequence[Evidence], hints: List[int]
                     ) -> List[str]:
    worst = max(hints, key=lambda i: evidence[i].far_share)
    return [
        f'{"Blocks" if len(hints) > 1 else "Block"} {_ranges(hints)}: '
        'tokens far above the rest or a separate group of them, most in block '
        f'{worst}: {percent(evidence[worst].far_share)} of the tokens, up to '
        f'{evidence[worst].max_over_median:.1f} times the median of an '
        'image.',
        'In no block do two of the three signs (far, separate, sudden) come '
        'together.',
        'Look at the norm maps: long tokens on objects are content, long '
        f'tokens on plain background are artifacts. {PRESET} leaves '
        'teachers without outliers as they are.']


def _clean_reasons(evidence: Sequence[Evidence]) -> List[str]:
    worst = max(range(len(evidence)),
                key=lambda i: evidence[i].max_over_median)
    most = max(seen.far_share for seen in evidence)
    return [
        f'The largest norm of an image is at most '
        f'{evidence[worst].max_over_median:.1f} times the median (mean over '
        f'images, block {worst}).',
        (f'In no block more than {percent(most)} of the tokens are' if most
         else 'No token is') + ' far above the rest of its image, and '
        'nowhere is there a separate group of long ones.',
        'Plain feature distillation (FitNet) is enough, and suppressing '
        f'norms that carry content may hurt. {PRESET} is FitNet, too, '
        'unless its own measure finds outliers; the training log says what '
        'it found.']


def suggest(verdict: Verdict, evidence: Sequence[Evidence], dim: int
            ) -> Suggestion:
    """Settings of a SiNGER recipe to begin with.

    - ``layers``: the block at three quarters of the depth (the paper's 17 of
      24), or the first one with artifacts if that comes later, and the last.
    - ``rank``: the smallest of 16, 32, 64 that holds 90 % of the artifacts'
      energy in these blocks.
    - ``quantile``: the largest of 0.99, 0.97, 0.95, 0.9 that leaves room for
      the artifacts of 95 % of the images.

    Without artifacts the paper's rank 16 and quantile 0.95.

    Args:
        verdict (Verdict): From :func:`judge`.
        evidence (Sequence[Evidence]): For each block, in order.
        dim (int): Channels of the tokens.

    Returns:
        Suggestion: Valid for a ``SiNGERDistiller`` with this teacher.
    """
    last = len(evidence) - 1
    middle = max(round(0.75 * len(evidence)) - 1, verdict.onset or 0)
    layers = sorted({min(middle, last), last})
    if verdict.status != 'artifacts':
        return Suggestion(layers, min(16, dim), 0.95)
    needed = max(evidence[i].dimensions for i in layers)
    rank = next((r for r in RANKS if r >= needed), RANKS[-1])
    busiest = max(evidence[i].busiest for i in verdict.affected)
    quantile = next((q for q in QUANTILES if 1 - q >= busiest),
                    max(0.5, int((1 - busiest) * 20) / 20))
    return Suggestion(layers, min(rank, dim), quantile)


def snippet(suggestion: Suggestion, recipe: Optional[str] = None) -> str:
    """A config to paste.

    Args:
        suggestion (Suggestion): From :func:`suggest`.
        recipe (str, optional): The SiNGER recipe to change, beside which the
            config will lie. Defaults to None: a placeholder.

    Returns:
        str: Python text of a config file.
    """
    base = os.path.basename(recipe or 'singer_YOUR_RECIPE.py')
    return (f'_base_ = [{"./" + base!r}]\n'
            'model = dict(\n'
            f'    layers={suggestion.layers},\n'
            f'    adapter=dict(rank={suggestion.rank}),\n'
            f'    loss_outlier=dict(quantile={suggestion.quantile}))\n')


def percent(share: float) -> str:
    """A share in words, two digits."""
    return f'{100 * share:.2g} %' if share < 0.995 else '100 %'


def _ranges(numbers: List[int]) -> str:
    parts: List[List[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ', '.join(f'{a}' if a == b else f'{a} to {b}' for a, b in parts)
