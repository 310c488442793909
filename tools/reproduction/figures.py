"""Figures 1b and 6 from the CSV files that ``tools/reproduce.py`` writes."""
import csv
import math
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from mmsinger.errors import ConfigError, no_file
from mmsinger.figures.style import add_caption, line_style, new_figure

# Methods keep their line in all panels; others follow.
METHODS = ('SiNGER', 'FitNet', 'ViTKD', 'student as it is',
           'teacher as it is')


class Value(NamedTuple):
    """A cell. ``measured`` and ``std`` are None where there is none; ``data``
    is the table's caption."""
    published: Optional[float]
    measured: Optional[float]
    std: Optional[float]
    seeds: int
    data: str = ''


Cells = Dict[Tuple[str, str], Value]


def read_table(path: str, name: str) -> Cells:
    """Read a table's CSV.

    Args:
        path (str): As ``tools/reproduce.py`` wrote it.
        name (str): Which table is expected, ``'table1'`` or ``'sweep'``.

    Returns:
        dict[tuple[str, str], Value]: By row and column.

    Raises:
        ConfigError: If the file is missing, no such CSV, or another table.
    """
    fix = f'Give the {name}.csv that `python tools/reproduce.py` writes.'
    if not os.path.isfile(path):
        raise ConfigError(f'{path!r}: {no_file(path)} {fix}')
    needed = ('table', 'row', 'column', 'published', 'measured', 'std',
              'seeds')
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            lines, head = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f'{path!r} is no CSV: {error}. {fix}') from error
    missing = [column for column in needed if column not in head]
    if missing:
        raise ConfigError(f'{path!r} has no column {missing[0]!r}; its '
                          f'columns are {head[:10]}. {fix}')
    found = sorted({line['table'] or '' for line in lines})
    if found != [name]:
        raise ConfigError(f'{path!r} holds {", ".join(found) or "no rows"}, '
                          f'not {name}. {fix}')
    try:
        return {(line['row'], line['column']): Value(
            *(float(line[key]) if line[key] else None
              for key in ('published', 'measured', 'std')),
            int(line['seeds'] or 0), line.get('data') or '')
            for line in lines}
    except ValueError as error:
        raise ConfigError(f'{path!r}: {error}. {fix}') from error


def draw_radar(cells: Cells, values: str = 'measured') -> Any:
    """Methods over the columns of Table 1, a panel a pair (Figure 1b).

    Args:
        cells (dict[tuple[str, str], Value]): Of table1, see
            :func:`read_table`.
        values (str): ``'measured'`` or ``'published'``. Defaults to
            ``'measured'``.

    Returns:
        matplotlib.figure.Figure: On each axis the worst value of the panel
        is near the centre and the best on the rim.

    Raises:
        ConfigError: If no pair has a method with all columns.
    """
    columns = list(dict.fromkeys(column for _, column in cells))
    panels, partial = {}, []
    for pair, rows in _pairs(cells).items():
        panels[pair] = {}
        for method, row in rows.items():
            line = [getattr(cells[row, column], values) for column in columns]
            if None not in line:
                panels[pair][method] = line
            elif any(value is not None for value in line):
                partial.append(f'{row} ({line.count(None)} of '
                               f'{len(line)} missing)')
    panels = {pair: lines for pair, lines in panels.items()
              if any(' as it is' not in method for method in lines)}
    if not panels:
        other = 'published' if values == 'measured' else 'measured'
        raise ConfigError(
            f'table1 has no {values} values of all columns for any method. '
            f'Run more of it with tools/reproduce.py, or set --values '
            f'{other}.')
    measured = f'Measured, {_seeds(cells)}. {_data(cells)}'
    return _draw_radar(panels, columns, measured, values, partial)


def _pairs(cells: Cells) -> Dict[str, Dict[str, str]]:
    """The rows of each pair by method, its plain models among them."""
    rows = list(dict.fromkeys(row for row, _ in cells))
    pairs: Dict[str, Dict[str, str]] = {}
    for row in rows:
        pair, _, method = row.partition(', ')
        if ' -> ' not in pair:
            continue
        teacher, _, size = pair.partition(' -> ')
        plain = {'student as it is': teacher[:-1] + size,
                 'teacher as it is': teacher}
        known = pairs.setdefault(pair, {
            name: f'{model}, as it is' for name, model in plain.items()
            if f'{model}, as it is' in rows})
        known[method] = row
    return pairs


def _draw_radar(panels: Dict[str, Dict[str, List[float]]],
                columns: List[str], measured: str, values: str,
                partial: List[str]) -> Any:
    count = min(len(panels), 2)
    lines = math.ceil(len(panels) / count)
    figure = new_figure((4.4 * count, 3.9 * lines + 0.9))
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.1)
    angles = [2 * math.pi * i / len(columns) for i in range(len(columns))]
    handles: Dict[str, Any] = {}
    for number, (pair, rows) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(lines, count, number, polar=True)
        axis.set_theta_offset(math.pi / 2)
        axis.set_theta_direction(-1)
        ranges = []
        for i, column in enumerate(columns):
            ends = [row[i] for row in rows.values()]
            worst, best = min(ends), max(ends)
            ranges.append((best, worst) if 'RMSE' in column
                          else (worst, best))
        for method, row in rows.items():
            radii = [1. if best == worst else
                     0.2 + 0.8 * (value - worst) / (best - worst)
                     for value, (worst, best) in zip(row, ranges)]
            style = line_style(METHODS.index(method) if method in METHODS
                               else len(METHODS))
            handles[method], = axis.plot(
                [*angles, angles[0]], [*radii, radii[0]], markersize=5,
                linewidth=1.6, **style)
        axis.set_xticks(angles, [
            f'{column}\n{worst:.4g} to {best:.4g}' for column, (worst, best)
            in zip(columns, ranges)], fontsize=7)
        for angle, label in zip(angles, axis.get_xticklabels()):
            side = math.sin(angle)
            label.set_horizontalalignment(
                'center' if abs(side) < 0.1 else
                'left' if side > 0 else 'right')
        axis.set_ylim(0, 1.05)
        axis.set_yticks([0.2, 1.], [])
        axis.spines['polar'].set_visible(False)
        axis.set_title(pair, fontsize=10)
    order = [method for method in METHODS if method in handles]
    order += [method for method in handles if method not in order]
    figure.legend([handles[method] for method in order], order,
                  loc='outside upper center', ncols=len(order), fontsize=8,
                  frameon=False)
    caption = ('Linear evaluation (Table 1). On each axis the worst value of '
               'the panel lies on the inner circle, the best on the rim; the '
               'label names both. RMSE: lower is better. ')
    caption += 'Values as published (arXiv 2509.20986).' \
        if values == 'published' else measured
    if partial:
        caption += f' Left out for missing values: {", ".join(partial)}.'
    add_caption(figure, caption)
    return figure


def _seeds(cells: Cells) -> str:
    counts = sorted({value.seeds for value in cells.values() if value.seeds})
    if not counts:
        return 'no seed'
    if counts == [1]:
        return 'one seed'
    many = f'{counts[0]} to {counts[-1]}' if len(counts) > 1 else counts[0]
    return f'mean over {many} seeds'


def draw_sweep(cells: Cells) -> Any:
    """The student's depth error over rank, a line a quantile (Figure 6).

    Args:
        cells (dict[tuple[str, str], Value]): Of the sweep, see
            :func:`read_table`.

    Returns:
        matplotlib.figure.Figure: With standard deviations over seeds.

    Raises:
        ConfigError: If nothing was measured, or rows and columns are not
            named by rank and quantile.
    """
    ranks = sorted({_after('rank', row) for row, _ in cells})
    quantiles = sorted({_after('quantile', column) for _, column in cells})
    by_number = {(_after('rank', row), _after('quantile', column)): value
                 for (row, column), value in cells.items()}
    if all(value.measured is None for value in by_number.values()):
        raise ConfigError('The sweep has no measured value yet. Run it with '
                          '`python tools/reproduce.py sweep`.')
    figure = new_figure((5., 3.6))
    axis = figure.subplots()
    for number, quantile in enumerate(quantiles):
        points = [(rank, by_number[rank, quantile]) for rank in ranks
                  if (rank, quantile) in by_number
                  and by_number[rank, quantile].measured is not None]
        if points:
            axis.errorbar(
                [rank for rank, _ in points],
                [value.measured for _, value in points],
                yerr=[value.std or 0. for _, value in points], capsize=3,
                label=f'quantile {quantile:g}', **line_style(number))
    axis.set_xscale('log', base=2)
    axis.set_xticks(ranks, [f'{rank:g}' for rank in ranks])
    axis.minorticks_off()
    axis.set_xlabel('rank of the adapters')
    axis.set_ylabel('depth RMSE, lower is better')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    bars = ' Bars: standard deviation over seeds.' if any(
        value.std for value in cells.values()) else ''
    add_caption(figure, 'Depth error of the student by rank of the adapters '
                f'and quantile of L_outlier; {_seeds(cells)}.{bars} '
                f'{_data(cells)}')
    return figure


def _data(cells: Cells) -> str:
    return next((value.data for value in cells.values()), '')


def _after(word: str, label: str) -> float:
    found = re.fullmatch(rf'{word} ([0-9.]+)', label)
    if not found:
        raise ConfigError(f'sweep.csv: {label!r} is not named as {word!r} '
                          'and a number. Give the sweep.csv that `python '
                          'tools/reproduce.py` writes.')
    return float(found[1])
