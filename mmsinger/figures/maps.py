"""Norm, similarity and PCA maps of several images side by side."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from torch import Tensor

from mmsinger.figures.features import Features
from mmsinger.figures.style import add_caption, new_figure
from mmsinger.figures.token_maps import (norm_map, patch_at, pca_map,
                                         principal_components, similarity_map)
from mmsinger.models.features.tokens import Grid, Tokens
from mmsinger.schema import Point


class Column(NamedTuple):
    """One column of maps.

    Attributes:
        title (str): Above it.
        maps (np.ndarray): (B, h, w), or (B, h, w, 3) in [0, 1].
        limits (tuple[float, float], optional): Ends of the colour scale;
            columns next to each other with equal limits share a colour bar.
            None for colours.
    """
    title: str
    maps: np.ndarray
    limits: Optional[Tuple[float, float]] = None


def draw_maps(kind: str, images: np.ndarray, features: Dict[int, Features],
              note: str = '', point: Point = (0.5, 0.5)) -> Any:
    """Teacher, target and student side by side.

    Args:
        kind (str): ``'norm'``: norms of patch tokens, before and after
            the target steps (Figure 2: refinement). ``'similarity'``: cosine
            similarity of all patches to a marked one (Figure 4). ``'pca'``:
            the three main directions of patch tokens as colours.
        images (np.ndarray): RGB, (B, H, W, 3), uint8.
        features (dict[int, Features]): Their tokens, see
            :func:`extract_features`.
        note (str): What the data are, for the caption. Defaults to ``''``.
        point (tuple[float, float]): Where the marked patch is, as shares of
            height and width, see :func:`patch_at`. Defaults to the middle.

    Returns:
        matplotlib.figure.Figure: A row an image.
    """
    maps_of, label, caption = KINDS[kind]
    columns = []
    for layer, views in features.items():
        tokens = {name: view for name, view in views._asdict().items()
                  if isinstance(view, Tokens)}
        columns += [
            Column(f'{name}\n{"for " if name == "student" else ""}block '
                   f'{layer}', maps.cpu().numpy(), limits)
            for name, (maps, limits) in maps_of(tokens, point).items()]
    if kind == 'similarity':  # one scale, so that blocks compare
        low = min(float(column.maps.min()) for column in columns)
        columns = [column._replace(limits=(low, 1.)) for column in columns]
    if any(views.standardised for views in features.values()):
        caption += STANDARDISED
    return draw_columns(images, columns, label, f'{caption} {note}',
                        point if kind == 'similarity' else None)


STANDARDISED = (
    ' Tokens of teacher and target are standardised (target_norm): '
    "differences from the layer's median, of which long ones need not be "
    'artifacts.')

# Maps and the ends of their colour scale, by name
Scaled = Dict[str, Tuple[Tensor, Optional[Tuple[float, float]]]]


def _norms(views: Dict[str, Tokens], point: Point) -> Scaled:
    maps = {name: norm_map(tokens) for name, tokens in views.items()}
    tops = {name: float(values.max()) for name, values in maps.items()}
    shared = max(tops[name] for name in tops if name != 'student')
    return {name: (values, (0., tops[name] if name == 'student' else shared))
            for name, values in maps.items()}


def _similarities(views: Dict[str, Tokens], point: Point) -> Scaled:
    maps = {name: similarity_map(tokens, patch_at(tokens.grid, point))
            for name, tokens in views.items()}
    return {name: (values, None) for name, values in maps.items()}


def _colours(views: Dict[str, Tokens], point: Point) -> Scaled:
    shared = principal_components(views['teacher'])
    return {name: (pca_map(tokens, principal_components(tokens)
                           if name == 'student' else shared), None)
            for name, tokens in views.items()}


# By kind: its maps, the label of its colour scale, its caption
KINDS = dict(
    norm=(_norms, 'norm',
          'Norms of patch tokens by distilled teacher block, before and after '
          'the steps that make targets of them. Teacher and target share a '
          'scale, the student has its own.'),
    similarity=(_similarities, 'cosine',
                'Cosine similarity of patch tokens to the marked one, by '
                'distilled teacher block.'),
    pca=(_colours, '',
         "Three principal components of each image's patch tokens as red, "
         'green and blue. Teacher and target share components, so '
         "that equal colours are equal tokens; the student's are its own."))


def draw_columns(images: np.ndarray, columns: List[Column], label: str,
                 caption: str, point: Optional[Point] = None) -> Any:
    """Images, and columns of maps beside them.

    Args:
        images (np.ndarray): RGB, (B, H, W, 3), uint8.
        columns (list[Column]): The maps, a row an image.
        label (str): Of the colour bars.
        caption (str): Below it all.
        point (tuple[float, float], optional): A patch to mark, see
            :func:`patch_at`. Defaults to None.

    Returns:
        matplotlib.figure.Figure: A row an image.
    """
    rows, width = len(images), len(columns) + 1
    bars = any(column.limits for column in columns)
    figure = new_figure((max(4., 1.35 * width),
                         1.35 * rows + (1.2 if bars else 0.8)))
    cells = figure.add_gridspec(rows + bars, width,
                                height_ratios=[1.] * rows + [0.08] * bars)
    axes = np.array([[figure.add_subplot(cells[row, column])
                      for column in range(width)] for row in range(rows)])
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title('image', fontsize=8)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        if point is not None:
            _mark(axes[row, 0], image.shape[:2], columns[0].maps.shape[1:3],
                  point)
    start = 1
    for number, column in enumerate(columns, start=1):
        axes[0, number].set_title(column.title, fontsize=8)
        scale = {} if column.limits is None else dict(
            vmin=column.limits[0], vmax=column.limits[1], cmap='cividis')
        for row, values in enumerate(column.maps):
            shown = axes[row, number].imshow(
                values, interpolation='nearest', **scale)
            if point is not None:
                grid = values.shape[:2]
                _mark(axes[row, number], grid, grid, point)
        last = number == len(columns) or \
            columns[number].limits != column.limits
        if column.limits is not None and last:
            bar = figure.colorbar(
                shown, cax=figure.add_subplot(cells[rows, start:number + 1]),
                orientation='horizontal')
            bar.set_label(label, fontsize=8)
            bar.ax.tick_params(labelsize=7)
            ticks = np.linspace(*column.limits, 3)
            bar.set_ticks(ticks, labels=[f'{tick:.2g}' for tick in ticks])
            for text, side in zip(bar.ax.get_xticklabels(),
                                  ('left', 'center', 'right')):
                text.set_horizontalalignment(side)  # apart from the next bar's
        if last:
            start = number + 1
    add_caption(figure, caption.strip())
    return figure


def _mark(axis: Any, shape: Grid, grid: Grid, point: Point) -> None:
    """Frame the patch of a point: shape is what is drawn, in pixels."""
    from matplotlib.patches import Rectangle
    height, width = (length / count for length, count in zip(shape, grid))
    row, column = patch_at(grid, point)
    corner = (column * width - 0.5, row * height - 0.5)
    for colour, line in (('white', 2.6), ('#D55E00', 1.4)):
        axis.add_patch(Rectangle(corner, width, height, fill=False,
                                 edgecolor=colour, linewidth=line))
