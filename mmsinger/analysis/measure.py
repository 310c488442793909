"""The paper's tables 3, 5a, 5b, 7 and 8 for one distiller.

docs/measure.md says what each number means.
"""
import contextlib
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

import torch
from torch import Tensor

from mmsinger.analysis.nullspace import (STRENGTH, distilled_null_directions,
                                         intermediate_layers,
                                         nullspace_energies)
from mmsinger.analysis.streams import (CosineStream, DeviationStream,
                                       GramStream, InflationStream, Stream)
from mmsinger.errors import ConfigError, check_choice
from mmsinger.models.distillers import FeatureDistiller
from mmsinger.models.targets import TeacherOutputs

METRICS = ('nullspace', 'cosine', 'gram', 'inflation', 'deviation')
STREAMS = dict(cosine=CosineStream, gram=GramStream,
               inflation=InflationStream)

Batches = Callable[[], Iterable[Tensor]]
Results = Dict[str, Dict[str, Any]]


def _not_applicable(distiller: FeatureDistiller) -> Dict[str, str]:
    """The metrics that a method does not have, and why."""
    if not distiller.refinement:
        return dict.fromkeys(
            ('nullspace', 'cosine', 'deviation'),
            f'{type(distiller).__name__} refines nothing, which it measures. '
            'Choose from gram, inflation, or give a recipe with a refinement, '
            'such as a mmsinger.SiNGERDistiller.')
    if not intermediate_layers(distiller):
        return dict(deviation='it perturbs the input of the block after a '
                    f'distilled one, but layers={distiller.layers} has only '
                    'the last, which has none. Leave it out, or distil an '
                    'earlier layer too.')
    return {}


def applicable_metrics(distiller: FeatureDistiller) -> List[str]:
    """The metrics that a method has: without a refinement fewer."""
    lacking = _not_applicable(distiller)
    return [name for name in METRICS if name not in lacking]


def check_metrics(distiller: FeatureDistiller, metrics: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a metric that is unknown or that the
    method does not have."""
    lacking = _not_applicable(distiller)
    for name in metrics:
        check_choice('--metrics', name, METRICS)
        if name in lacking:
            raise ConfigError(f'--metrics {name}: {lacking[name]}')


def measure(distiller: FeatureDistiller,
            batches: Batches,
            metrics: Sequence[str],
            seed: int = 0,
            strength: float = STRENGTH,
            jacobian_images: int = 8,
            jacobian_products: Optional[int] = None) -> Results:
    """Measure a distiller on images, in constant memory.

    Args:
        distiller (FeatureDistiller): Ready to train: teacher and student
            loaded, adapters and target norms set.
        batches (Callable): Returns an iterable of preprocessed images
            (B, 3, H, W), the same each time; called once more for
            ``'deviation'``.
        metrics (Sequence[str]): From :func:`applicable_metrics`.
        seed (int): Seeds all that is random. Defaults to 0.
        strength (float): ``'deviation'``: length of the steps over the
            tokens' norms. Defaults to 0.3, about what refinement does in the
            paper (a cosine of 0.9566, Table 3).
        jacobian_images (int): ``'deviation'``: images at which the blocks are
            linearised. Defaults to 8.
        jacobian_products (int, optional): ``'deviation'``: see
            :func:`smallest_directions`. Defaults to None, exact.

    Returns:
        dict: ``{metric: {layer: numbers}}``, ready for JSON.

    Raises:
        ConfigError: If a metric does not apply, or there are no images.
    """
    check_metrics(distiller, metrics)
    results: Results = {}
    distiller.eval()
    if 'nullspace' in metrics:
        results['nullspace'] = nullspace_energies(distiller, seed)
    streams: Dict[str, Stream] = {
        name: stream(distiller, seed) for name, stream in STREAMS.items()
        if name in metrics}
    if 'deviation' in metrics:
        streams['deviation'] = DeviationStream(
            distiller, seed, strength, distilled_null_directions(
                distiller, batches(), jacobian_images, jacobian_products,
                seed))
    if streams:
        _run(distiller, batches(), list(streams.values()))
    results.update({name: stream.result()
                    for name, stream in streams.items()})
    return {name: results[name] for name in METRICS if name in results}


@torch.no_grad()
def _run(distiller: FeatureDistiller, batches: Iterable[Tensor],
         streams: List[Stream]) -> None:
    """One pass of teacher and, if needed, student for all metrics."""
    layers = sorted({layer for s in streams for layer in s.teacher_layers})
    seen = False
    for images in batches:
        seen = True
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(stream.watching())
            taps = distiller.teacher(images, layers,
                                     distiller.student_normalisation)
        outputs = TeacherOutputs(taps, distiller.target_norms)
        student = {}
        if any(s.needs_student for s in streams):
            student = distiller.student_tokens(images)
        for stream in streams:
            stream.update(outputs, student)
    if not seen:
        raise ConfigError('There are no images to measure on.')
