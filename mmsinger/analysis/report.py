"""The report: one HTML page that needs nothing beside itself."""
import os
from typing import Any, Dict, List, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmsinger.analysis.analyse import Analysis
from mmsinger.analysis.charts import (ARTIFACT, block_chart, map_uri,
                                      photo_uri, ridge_chart, spectrum_chart)
from mmsinger.analysis.verdict import percent
from mmsinger.figures.style import COLOURS


def render(analysis: Analysis) -> str:
    """Make the page.

    Args:
        analysis (Analysis): From :func:`mmsinger.analysis.analyse`.

    Returns:
        str: HTML, with its style, its charts (SVG) and its pictures (data
        URIs) inside; no script.
    """
    # Names come from users' files: autoescape
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(__file__)), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, percent=percent)
    return environment.get_template('report.html.jinja').render(
        meta=analysis.meta, verdict=analysis.verdict, analysis=analysis,
        layers=analysis.collection.layers,
        colours=dict(artifacts=ARTIFACT, clean=COLOURS[2],
                     unclear=COLOURS[4]),
        charts=_charts(analysis), samples=_samples(analysis),
        positions=_positions(analysis))


def shown_blocks(analysis: Analysis) -> List[int]:
    """Choose the blocks whose norm maps are shown.

    Args:
        analysis (Analysis): From :func:`mmsinger.analysis.analyse`.

    Returns:
        list[int]: The blocks before and at the onset (without one the
        first), those suggested, and the last.
    """
    onset = analysis.verdict.onset
    chosen = {*analysis.suggestion.layers, len(analysis.collection.layers) - 1}
    chosen |= {0} if onset is None else {max(0, onset - 1), onset}
    return sorted(chosen)


def _number(value: Any) -> str:
    if value is None:
        return '–'
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def _charts(analysis: Analysis) -> Dict[str, Any]:
    layers, verdict = analysis.collection.layers, analysis.verdict
    last = len(layers) - 1

    def series(name: str, factor: float = 1.) -> List[Optional[float]]:
        values = [layer.mean(name) for layer in layers]
        return [None if v is None else factor * v for v in values]

    return dict(
        ratios=block_chart({
            '99th percentile / median': series('p99_over_median'),
            'largest norm / median': series('max_over_median')
        }, 'x', verdict.onset),
        shares=block_chart({
            'robust: 5 robust deviations': series('robust_share', 100),
            'far: 10 robust deviations\nand twice the median': series(
                'far_share', 100),
            'above the 0.95 quantile': series('quantile_share', 100)
        }, '%', verdict.onset),
        ridges=ridge_chart([layer.histogram for layer in layers],
                           verdict.affected),
        spectra=spectrum_chart(
            [spectrum['singular_values'] for spectrum in analysis.spectra],
            {min(layer + 1, last) for layer in analysis.suggestion.layers}))


def _samples(analysis: Analysis) -> List[Dict[str, Any]]:
    blocks, samples = shown_blocks(analysis), []
    for sample in analysis.collection.samples:
        top = max(float(sample.norms[b].max()) for b in blocks)
        samples.append(dict(
            name=sample.name, photo=photo_uri(sample.image),
            maps=[dict(block=b, far=int(sample.far[b].sum()),
                       largest=float(sample.norms[b].max()),
                       uri=map_uri(sample.norms[b], top, sample.far[b]))
                  for b in blocks]))
    return samples


def _positions(analysis: Analysis) -> Optional[Dict[str, Any]]:
    """Where far outliers are in the block where artifacts begin, else in the
    one with most of them; None if there are none."""
    layers, block = analysis.collection.layers, analysis.verdict.onset
    if block is None:
        block = max(range(len(layers)),
                    key=lambda i: layers[i].mean('far_share'))
    if not layers[block].mean('far_share'):
        return None
    share = layers[block].positions.double() / analysis.collection.count
    most = float(share.max())
    return dict(block=block, most=most, uri=map_uri(share, most),
                rank=layers[block].mean('contrast_rank'))
