"""One pass over the images: what is known of every block afterwards."""
from itertools import islice
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from mmsinger.analysis.separation import (NUM_BINS, excess, far_outliers,
                                          patch_contrast, ratio_histogram,
                                          ratio_spread, spanned_dimensions,
                                          tail_group, within_image_rank)
from mmsinger.analysis.verdict import Evidence
from mmsinger.engine.loading import Subject
from mmsinger.errors import ConfigError
from mmsinger.metrics.accumulators import Moments, Sample
from mmsinger.metrics.norms import (norm_statistics, quantile_outliers,
                                    robust_outliers, token_norms)
from mmsinger.models.features.tokens import Grid, Tokens

QUANTILE = 0.95  # of the share by quantile, the default of L_outlier


class SampleImage(NamedTuple):
    """An image to show.

    Attributes:
        name (str): Its file, relative to the folder.
        image (Tensor): RGB, uint8, shape (3, H, W).
        norms (list[Tensor]): Patch norms after each block, over the median of
            the image, each of shape (h, w).
        far (list[Tensor]): Which are far outliers, each (h, w), bool.
    """
    name: str
    image: Tensor
    norms: List[Tensor]
    far: List[Tensor]


class LayerRecord:
    """What one block's patch tokens were like, in constant memory.

    Attributes:
        moments (dict[str, Moments]): By name, each of one value an image.
        histogram (Tensor): Counts of log2(norm / median), (NUM_BINS, ).
        positions (Tensor): How many images had a far outlier at each patch,
            shape (h, w).
        excess (Sample): What far outliers have beyond the other tokens of
            their image, rows (n, D).
        far_shares (Sample): Share of far outliers in an image, rows (n, 1).
    """

    def __init__(self) -> None:
        self.moments: Dict[str, Moments] = {}
        self.histogram = torch.zeros(NUM_BINS, dtype=torch.float64)
        self.positions = torch.zeros((), dtype=torch.int64)
        self.excess = Sample(512)
        self.far_shares = Sample()
        self._before = self._stayed = 0

    def add(self, layer: int, tokens: Tokens, ranks: Tensor,
            previous: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Take in one batch.

        Args:
            layer (int): Which block it is, for messages.
            tokens (Tokens): Its output, values of shape (B, N, D).
            ranks (Tensor): Rank of each patch's contrast within its image,
                (B, P).
            previous (Tensor | None): The far outliers after the block before,
                shape (B, P), bool.

        Returns:
            tuple[Tensor, Tensor]: Norms over their median, and far outliers,
            both (B, P).

        Raises:
            ConfigError: If tokens are not finite, or most of them are zero.
        """
        norms = token_norms(tokens.patches)
        statistics = norm_statistics(norms)
        if not torch.isfinite(norms).all() or (statistics.median == 0).any():
            raise ConfigError(
                f'Block {layer} gives patch tokens that are not finite, or '
                'all zero. Check the checkpoint, and the normalisation '
                '(--mean, --std).')
        # The histogram of all images so far: one pass is enough
        self.histogram += ratio_histogram(norms).cpu()
        far = far_outliers(norms, ratio_spread(self.histogram))
        far_share = far.double().mean(dim=1)
        self._take(
            **statistics._asdict(),
            p99_over_median=statistics.p99 / statistics.median,
            quantile_share=quantile_outliers(norms, QUANTILE).double().mean(1),
            robust_share=robust_outliers(norms).double().mean(1),
            far_share=far_share, far_images=far.any(dim=1).double())
        self.far_shares.add(far_share.unsqueeze(1).cpu())
        self.positions = self.positions + far.sum(dim=0).unflatten(
            0, tuple(tokens.grid)).cpu()
        if far.any():
            self.excess.add(excess(tokens.patches, far).cpu())
            self._take(contrast_rank=ranks[far])
        if previous is not None:
            self._before += int(previous.sum())
            self._stayed += int((previous & far).sum())
        return norms / statistics.median[:, None], far

    def _take(self, **values: Tensor) -> None:
        for name, value in values.items():
            # NaN is the kurtosis of norms that are all the same
            self.moments.setdefault(name, Moments()).add(
                value[torch.isfinite(value)])

    @property
    def stayed(self) -> Optional[float]:
        """The share of the far outliers after the block before that are still
        far; None if there were none."""
        return self._stayed / self._before if self._before else None

    def mean(self, name: str) -> Optional[float]:
        """The mean over the images of one of :attr:`moments`; None if no
        image has it."""
        moments = self.moments.get(name)
        return moments.summary()['mean'] if moments and moments.count \
            else None

    def evidence(self) -> Evidence:
        """What the verdict is built on."""
        rows = self.excess.rows
        return Evidence(
            far_share=self.mean('far_share'),
            far_images=self.mean('far_images'),
            max_over_median=self.mean('max_over_median'),
            group=tail_group(self.histogram),
            busiest=float(self.far_shares.rows.quantile(0.95)),
            dimensions=0 if rows is None else spanned_dimensions(rows))

    def numbers(self) -> Dict[str, Any]:
        """What was measured, for JSON, with :meth:`evidence` left out."""
        return dict(
            norms={name: moments.summary() if moments.count else None
                   for name, moments in self.moments.items()},
            histogram=self.histogram.long().tolist(),
            positions=self.positions.tolist(), stayed=self.stayed)


class Collection(NamedTuple):
    """What one pass found.

    Attributes:
        layers (list[LayerRecord]): For each block.
        samples (list[SampleImage]): The first images, to show.
        inputs (list[Tensor]): Some images as they were fed, (1, 3, H, W).
        count (int): Images seen.
        grid (tuple[int, int]): Rows and columns of patches.
    """
    layers: List[LayerRecord]
    samples: List[SampleImage]
    inputs: List[Tensor]
    count: int
    grid: Grid


@torch.no_grad()
def collect(subject: Subject, images: Iterable[Tuple[str, Tensor]],
            batch_size: int = 8, num_samples: int = 4, num_inputs: int = 0
            ) -> Collection:
    """Run the teacher over images, once, in constant memory.

    Args:
        subject (Subject): The teacher.
        images (Iterable): ``(name, image)`` with images in RGB, 0 to 255, all
            of one shape (3, H, W).
        batch_size (int): Images at a time. Defaults to 8.
        num_samples (int): Images to keep for showing. Defaults to 4.
        num_inputs (int): Images to keep as they were fed. Defaults to 0.

    Returns:
        Collection: All that was found.

    Raises:
        ConfigError: If there are no images, or the tokens are not finite.
    """
    teacher = subject.teacher
    device = next(teacher.backbone.parameters()).device
    depth = len(teacher.blocks)
    records = [LayerRecord() for _ in range(depth)]
    samples: List[SampleImage] = []
    inputs: List[Tensor] = []
    count, images = 0, iter(images)
    while chunk := list(islice(images, batch_size)):
        names, pictures = zip(*chunk)
        batch = torch.stack(pictures).to(device)
        fed = subject.feed(batch)
        taps = teacher(fed, range(depth), subject.normalisation)
        grid = tuple(taps.tokens(0).grid)
        ranks = within_image_rank(patch_contrast(batch, grid))
        ratios, fars, far = [], [], None
        for layer, record in enumerate(records):
            ratio, far = record.add(layer, taps.tokens(layer), ranks, far)
            ratios.append(ratio.unflatten(1, grid).cpu())
            fars.append(far.unflatten(1, grid).cpu())
        for i in range(min(len(names), num_samples - len(samples))):
            samples.append(SampleImage(names[i], pictures[i],
                                       [r[i] for r in ratios],
                                       [f[i] for f in fars]))
        inputs += [image[None] for image in
                   fed[:max(0, num_inputs - len(inputs))]]
        count += len(names)
    if not count:
        raise ConfigError('There are no images to look at.')
    return Collection(records, samples, inputs, count, grid)
