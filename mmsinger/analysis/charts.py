"""Charts of the teacher report as inline SVG, pictures as data URIs."""
import base64
import io
import re
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
from markupsafe import Markup
from torch import Tensor

from mmsinger.analysis.separation import bin_ratios
from mmsinger.figures.style import COLOURS, line_style, new_figure

USUAL, ARTIFACT = COLOURS[:2]  # what has artifacts is set off by its colour
FAINT = '#9aa1ad'
FRAME = (255, 60, 40)  # red, seen on all of cividis


def block_chart(curves: Dict[str, Sequence[Optional[float]]], unit: str,
                onset: Optional[int]) -> Markup:
    """Draw values over the blocks of a teacher.

    Args:
        curves (dict[str, Sequence[float | None]]): By the name in the legend
            one value for each block; None leaves a gap.
        unit (str): Behind the numbers of the y axis.
        onset (int | None): The first block with artifacts, to mark.

    Returns:
        Markup: An svg element.
    """
    figure, axis = _axes((5, 3.2), 'block')
    for number, (label, values) in enumerate(curves.items()):
        axis.plot(np.array(values, dtype=float), label=label, linewidth=1.6,
                  markersize=4, **line_style(number))
    if onset is not None:
        axis.axvline(onset, color='black', linewidth=1, linestyle=':')
        right = 2 * onset > axis.get_xlim()[1]
        axis.annotate(
            'artifacts begin', (onset, 1), (-4 if right else 4, 0),
            xycoords=axis.get_xaxis_transform(), textcoords='offset points',
            fontsize=9, va='top', ha='right' if right else 'left')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(f'{{x:g}}{unit}')
    axis.set_ylim(bottom=0, top=1.1 * axis.get_ylim()[1])
    return _svg(figure)


def ridge_chart(histograms: Sequence[Tensor], affected: Collection[int]
                ) -> Markup:
    """Draw distributions of norm / median one above the other.

    Args:
        histograms (Sequence[Tensor]): For each block, the first on top, the
            counts by bin, (NUM_BINS, ).
        affected (Collection[int]): Blocks to set off in colour.

    Returns:
        Markup: An svg element.
    """
    count = len(histograms)
    figure, axis = _axes((5, max(6.4, 0.22 * count)),
                         'norm over the median of its image')
    used = sum(histograms).nonzero()
    bins = slice(int(used.min()), int(used.max()) + 1)
    for block, counts in enumerate(histograms):
        # The logarithm shows a few tokens among many thousands
        heights = ((1 + counts).log2() / (1 + counts.max()).log2())[bins]
        colour = ARTIFACT if block in affected else USUAL
        axis.fill_between(bin_ratios()[bins], block, block - 1.5 * heights,
                          facecolor=(colour, 0.4), edgecolor=colour)
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter('{x:g}x')
    axis.set_yticks(range(count))
    axis.set_ylim(count - 0.8, -1.7)
    axis.set_ylabel('block', fontsize=9)
    return _svg(figure)


def spectrum_chart(spectra: Sequence[List[float]], chosen: Collection[int]
                   ) -> Markup:
    """Draw singular values on a logarithmic scale.

    Args:
        spectra (Sequence[list[float]]): For each block, descending.
        chosen (Collection[int]): Blocks to set off in colour.

    Returns:
        Markup: An svg element.
    """
    figure, axis = _axes((5, 3.2), 'directions, most visible first, % of all')
    numbers = {block: number for number, block in enumerate(sorted(chosen))}
    for block, spectrum in enumerate(spectra):
        style = dict(color=FAINT, linewidth=0.8, zorder=1)
        if block in numbers:
            style = dict(line_style(numbers[block]), marker='', linewidth=1.6,
                         label=f'block {block}')
        values = np.array(spectrum)
        axis.plot(np.linspace(0, 100, len(values)),
                  values.clip(max(values[0] * 1e-6, 1e-12)), **style)
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter('{x:g}')
    return _svg(figure)


def _axes(size: Tuple[float, float], x_label: str) -> Tuple[Any, Any]:
    figure = new_figure(size)
    axis = figure.subplots()
    axis.set_xlabel(x_label, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    return figure, axis


def _svg(figure: Any) -> Markup:
    """Turn a figure into an svg element that refers to nothing outside."""
    import matplotlib
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc='outside lower left', fontsize=9, frameon=False,
                      ncols=2)
    text = io.StringIO()
    # Text stays text, and a report comes out the same each time
    with matplotlib.rc_context({'svg.fonttype': 'none',
                                'svg.hashsalt': 'report'}):
        figure.savefig(text, format='svg', transparent=True, metadata=dict(
            Creator=None, Date=None, Format=None, Type=None))
    element = '<svg class="chart" ' + text.getvalue().partition('<svg ')[2]
    # Namespaces are HTML's own; all charts would name their groups alike
    return Markup(re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', '',
                         element))


def photo_uri(image: Tensor) -> str:
    """Encode an image as a data URI, its longer side at most 256 pixels.

    Args:
        image (Tensor): RGB, uint8, shape (3, H, W).

    Returns:
        str: The URI of a PNG.
    """
    pixels = image.permute(1, 2, 0).numpy()
    scale = 256 / max(pixels.shape)
    if scale < 1:
        height, width = (max(1, round(scale * length))
                         for length in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height),
                            interpolation=cv2.INTER_AREA)
    return _png_uri(pixels)


def map_uri(values: Tensor, top: float, marked: Optional[Tensor] = None
            ) -> str:
    """Encode a map in colours from 0 (dark blue) to ``top`` (yellow).

    Args:
        values (Tensor): Shape (h, w).
        top (float): The brightest value.
        marked (Tensor, optional): Cells to frame, shape (h, w), bool.
            Defaults to None.

    Returns:
        str: The data URI of a PNG.
    """
    from matplotlib import colormaps
    side = max(4, 160 // max(values.shape))
    pixels = colormaps['cividis'](values.numpy() / max(top, 1e-12),
                                  bytes=True)[..., :3]
    pixels = pixels.repeat(side, 0).repeat(side, 1)
    if marked is not None:
        border = np.ones((side, side), dtype=bool)
        width = max(1, side // 8)
        border[width:-width, width:-width] = False
        pixels[np.kron(marked.numpy(), border)] = FRAME
    return _png_uri(pixels)


def _png_uri(pixels: np.ndarray) -> str:
    content = cv2.imencode('.png', pixels[..., ::-1])[1].tobytes()
    return 'data:image/png;base64,' + base64.b64encode(content).decode()
