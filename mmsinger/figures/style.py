"""What all figures share: colours, sizes, captions, files.

Figures are made without pyplot, so that drawing changes nothing in a process
that has figures or a backend of its own.
"""
import os
import textwrap
from typing import Any, Tuple

import numpy as np

from mmsinger.errors import ConfigError, check_output_file

# Okabe and Ito: told apart by colour-blind readers. The yellow, too light for
# print, is left out; no figure relies on colour alone.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9',
           '#000000')
LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)),
         (0, (7, 2)))
MARKERS = ('o', 's', '^', 'D', 'v', 'X', 'P')
SUFFIXES = ('.png', '.svg', '.pdf')


def line_style(number: int) -> dict:
    """Colour, dashes and marker of the n-th curve, as for ``plot()``."""
    round_, pick = divmod(number, len(COLOURS))
    return dict(color=COLOURS[pick],
                linestyle=LINES[(pick + round_) % len(LINES)],
                marker=MARKERS[(pick + 2 * round_) % len(MARKERS)])


def new_figure(size: Tuple[float, float]) -> Any:
    """An empty figure.

    Args:
        size (tuple[float, float]): Width and height in inches.

    Returns:
        matplotlib.figure.Figure: With room made for all that is on it.
    """
    from matplotlib.figure import Figure
    return Figure(figsize=size, layout='constrained')


def add_caption(figure: Any, caption: str) -> None:
    """Write a caption under a figure, wrapped to its width."""
    columns = int(figure.get_figwidth() * 15)
    figure.supxlabel(textwrap.fill(caption, columns), fontsize=8, x=0.01,
                     ha='left')


def check_output(path: str) -> None:
    """Raise :class:`ConfigError` unless a figure can be written there."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f'--out={path!r}: the suffix says what to write; '
                          f'end it with {", ".join(SUFFIXES)}.')
    check_output_file(path)


def save_figure(figure: Any, path: str) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix.

    Args:
        figure (matplotlib.figure.Figure): The figure.
        path (str): Where to write.

    Raises:
        ConfigError: If the suffix is another or the folder is missing.
    """
    check_output(path)
    import matplotlib

    # Text stays text in SVG and PDF
    with matplotlib.rc_context({'svg.fonttype': 'none', 'pdf.fonttype': 42}):
        figure.savefig(path, dpi=200)


def to_array(figure: Any) -> np.ndarray:
    """A figure as pixels: RGB, (H, W, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
