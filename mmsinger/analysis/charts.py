"""Pictures for a page without scripts: inline SVG, and PNG as data URIs.

SVG takes its colours from the page's style sheet, so that it follows light
and dark mode.
"""
import base64
import math
from html import escape
from typing import List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from torch import Tensor

from mmsinger.analysis.separation import bin_ratios

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 34


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        label (str): For the legend; empty for none.
        values (Sequence[float | None]): One a position; None leaves a gap.
        style (str): A class of the style sheet.
    """
    label: str
    values: Sequence[Optional[float]]
    style: str


def line_chart(title: str, lines: Sequence[Line], x_label: str, log: bool,
               unit: str = '', marks: Sequence[Tuple[int, str]] = (),
               dots: bool = True) -> str:
    """Lines over equally spaced positions 0, 1, 2, …

    Args:
        title (str): Read out by screen readers.
        lines (Sequence[Line]): All of one length.
        x_label (str): Name of the positions.
        log (bool): Whether the y axis is logarithmic; values are positive
            then.
        unit (str): Behind the numbers of the y axis. Defaults to ``''``.
        marks (Sequence[tuple[int, str]]): Positions to mark, with a word.
        dots (bool): Whether to mark each value. Defaults to True.

    Returns:
        str: An svg element.
    """
    count = max(len(line.values) for line in lines)
    known = [v for line in lines for v in line.values if v is not None]
    low, high, ticks = _axis(min(known), max(known), log)

    def x(position: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (
            position / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        if log:
            part = math.log(max(value, low) / low) / math.log(high / low)
        else:
            part = (value - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H'
                     f'{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 4, y(tick) + 3, f'{tick:g}{unit}', 'end'))
    for position in _positions(count):
        parts.append(_text(x(position), HEIGHT - BOTTOM + 13, str(position)))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 5, x_label))
    for position, word in marks:
        parts.append(f'<path class="mark" d="M{x(position):.1f} {TOP}V'
                     f'{HEIGHT - BOTTOM}"/>')
        right = position > count / 2
        parts.append(_text(x(position) + (-4 if right else 4), TOP + 8, word,
                           'end' if right else 'start'))
    for line in lines:
        points, pen = [], 'M'
        for i, value in enumerate(line.values):
            if value is None:
                pen = 'M'
                continue
            points.append(f'{pen}{x(i):.1f} {y(value):.1f}')
            pen = 'L'
            if dots:
                parts.append(f'<circle class="{line.style}" cx="{x(i):.1f}" '
                             f'cy="{y(value):.1f}" r="2.2"/>')
        parts.append(f'<path class="line {line.style}" '
                     f'd="{"".join(points)}"/>')
    return _svg(title, HEIGHT, parts) + legend(lines)


def legend(lines: Sequence[Line]) -> str:
    """What the lines of a chart stand for, as text below it."""
    items = ''.join(
        f'<span><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<path class="line {line.style}" d="M0 4H24"/></svg>'
        f'{escape(line.label)}</span>' for line in lines if line.label)
    return f'<p class="legend">{items}</p>' if items else ''


def ridge_chart(title: str, histograms: Sequence[Tensor],
                marked: Sequence[int]) -> str:
    """Distributions of norm / median, one above the other, the first on top.

    Args:
        title (str): Read out by screen readers.
        histograms (Sequence[Tensor]): Counts by bin, (NUM_BINS, ) each.
        marked (Sequence[int]): Which to set off in colour.

    Returns:
        str: An svg element.
    """
    used = sum(histograms).nonzero().flatten()
    first, last = int(used[0]), int(used[-1])
    ratios = bin_ratios()
    span = max(1, last - first)
    step = 22 if len(histograms) <= 12 else 15
    height = TOP + 14 + step * len(histograms) + BOTTOM

    def x(index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index - first) / span

    parts = []
    for octave in range(-4, 9):
        if ratios[first] <= 2.**octave <= ratios[last]:
            at = x((octave + 4) * 16 - 0.5)
            parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V'
                         f'{height - BOTTOM}"/>')
            parts.append(_text(at, height - BOTTOM + 13, f'{2.**octave:g}x'))
    parts.append(_text((LEFT + WIDTH) / 2, height - 5,
                       'norm over the median of its image'))
    for row, counts in enumerate(histograms):
        base = TOP + 14 + step * (row + 1)
        # The logarithm shows a few tokens among many thousands
        heights = (1 + counts).log2() / (1 + counts.max()).log2()
        points = ''.join(
            f'L{x(i):.1f} {base - 1.5 * step * float(heights[i]):.1f}'
            for i in range(first, last + 1))
        style = 'second' if row in marked else 'first'
        parts.append(f'<path class="ridge {style}" d="M{x(first):.1f} {base}'
                     f'{points}L{x(last):.1f} {base}Z"/>')
        parts.append(_text(LEFT - 6, base, str(row), 'end'))
    return _svg(title, height, parts)


def _axis(low: float, high: float, log: bool
          ) -> Tuple[float, float, List[float]]:
    """Limits and ticks."""
    if log:
        first, last = (math.floor(math.log10(low)),
                       math.ceil(math.log10(high)))
        last = max(last, first + 1)
        skip = -(-(last - first) // 5)
        return 10.**first, 10.**last, [
            10.**e for e in range(first, last + 1, skip)]
    size = 10.**math.floor(math.log10(high)) if high > 0 else 1.
    step = next(s for s in (0.1 * size, 0.2 * size, 0.5 * size, size,
                            2 * size, 5 * size) if high <= 5 * s)
    count = max(1, math.ceil(high / step))
    return 0., count * step, [round(i * step, 10) for i in range(count + 1)]


def _positions(count: int) -> range:
    return range(0, count, next(
        s for s in (1, 2, 5, 10, 20, 50, 100) if count <= 12 * s))


def _text(x: float, y: float, text: str, anchor: str = 'middle') -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f'{escape(text)}</text>')


def _svg(title: str, height: float, parts: List[str]) -> str:
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img">'
            f'<title>{escape(title)}</title>{"".join(parts)}</svg>')


def photo_uri(image: Tensor, longest: int = 256) -> str:
    """A data URI of an image (3, H, W), RGB, uint8, scaled down if needed."""
    pixels = image.permute(1, 2, 0).numpy()[..., ::-1]
    scale = longest / max(pixels.shape[:2])
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale,
                            interpolation=cv2.INTER_AREA)
    return _png_uri(pixels)


def map_uri(values: Tensor, top: float, marked: Optional[Tensor] = None
            ) -> str:
    """A data URI of a map in colours from 0 (dark blue) to ``top`` (yellow).

    Args:
        values (Tensor): Shape (h, w).
        top (float): The brightest value.
        marked (Tensor, optional): Cells to frame, shape (h, w), bool.
            Defaults to None.

    Returns:
        str: Of a PNG.
    """
    cell = max(4, 160 // max(values.shape))
    levels = (255 * values.float() / max(top, 1e-12)).clamp(0, 255)
    pixels = cv2.applyColorMap(levels.round().byte().numpy(),
                               cv2.COLORMAP_CIVIDIS)
    pixels = pixels.repeat(cell, 0).repeat(cell, 1)
    if marked is not None:
        for row, column in marked.nonzero().tolist():
            corner = np.array((column, row)) * cell
            cv2.rectangle(pixels, corner.tolist(),
                          (corner + cell - 1).tolist(), (40, 60, 255),
                          max(1, cell // 8))
    return _png_uri(pixels)


def _png_uri(pixels: np.ndarray) -> str:
    content = cv2.imencode('.png', pixels)[1].tobytes()
    return 'data:image/png;base64,' + base64.b64encode(content).decode()
