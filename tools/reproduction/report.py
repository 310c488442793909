"""Published and measured, side by side: Markdown, CSV, LaTeX, a plot."""
import csv
import math
import os
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np

from mmsinger.figures.style import COLOURS, new_figure, save_figure
from mmsinger.files import write_json, write_text
from reproduction.plan import Cell, Column, Table
from reproduction.workspace import Record


@dataclass
class Result:
    """What came of a cell.

    Attributes:
        mean (float, optional): Over seeds; None if nothing was measured.
        std (float, optional): Over seeds; None for fewer than two.
        values (list[float | None]): Of each seed; None: not measured.
        missing (str): ``'failed'``, ``'not logged'`` or ``'not run'`` if not
            all were; empty if they were.
    """
    mean: Optional[float]
    std: Optional[float]
    values: List[Optional[float]]
    missing: str = ''

    @property
    def count(self) -> int:
        """How many seeds were measured."""
        return sum(value is not None for value in self.values)


def result_of(cell: Cell, records: Dict[str, Record]) -> Result:
    """Combine a cell's sources: mean over members, then over seeds.

    Args:
        cell (Cell): The cell.
        records (dict[str, Record]): Of the jobs, by name.

    Returns:
        Result: A seed counts only if all its members were measured.
    """
    values, problems = [], set()
    for members in cell.sources:
        found = []
        for source in members:
            record = records.get(source.job)
            if record is None or record.status == 'running':
                problems.add('not run')
            elif record.status != 'finished':
                problems.add('failed')
            elif source.metric not in record.metrics:
                problems.add('not logged')
            else:
                found.append(source.scale * record.metrics[source.metric])
        values.append(mean(found) if len(found) == len(members) else None)
    measured = [value for value in values if value is not None]
    return Result(mean(measured) if measured else None,
                  stdev(measured) if len(measured) > 1 else None,
                  values, min(problems, default=''))


class Report:
    """A table with what its jobs measured.

    Args:
        table (Table): The table.
        records (dict[str, Record]): Of its jobs, by name; some may be
            missing.

    Attributes:
        results (list[list[Result]]): What came of the cells, by row.
    """

    def __init__(self, table: Table, records: Dict[str, Record]) -> None:
        self.table, self.records = table, records
        self.results = [[result_of(cell, records) for cell in cells]
                        for _, cells in table.rows]

    def write(self, folder: str) -> List[str]:
        """Write Markdown, CSV, LaTeX and a plot into a folder; returns the
        paths of the files."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, self.table.name)
        for extension, text in (('md', self.markdown()),
                                ('tex', self.latex())):
            write_text(text, f'{path}.{extension}')
        self.write_csv(f'{path}.csv')
        self.plot(f'{path}.png')
        extensions = ['md', 'csv', 'tex', 'png']
        if self.table.data is not None:
            write_json(self.table.data(self.by_place()), f'{path}.json')
            extensions.append('json')
        return [f'{path}.{extension}' for extension in extensions]

    def cells(self) -> Iterator[Tuple[str, Cell, Column, Result]]:
        """Row by row: label, cell, column and what came of the cell."""
        for (label, cells), results in zip(self.table.rows, self.results):
            for cell, column, result in zip(cells, self.table.columns,
                                            results):
                yield label, cell, column, result

    def by_place(self) -> Dict[Tuple[str, str], Result]:
        """What came of the cells, by row and column."""
        return {(label, column.title): result
                for label, _, column, result in self.cells()}

    def texts(self, bold: str = '') -> Iterator[List[str]]:
        """Label and cells of each row, the measured between ``bold``."""
        for (label, cells), results in zip(self.table.rows, self.results):
            yield [label, *map(partial(_text, bold=bold), cells,
                               self.table.columns, results)]

    def markdown(self) -> str:
        """A page: the table, what failed, and each run with the columns
        that it is in."""
        table = self.table
        lines = [f'# {table.title}', '', table.caption, '']
        bold = ''
        if any(cell.published is not None for _, cell, *_ in self.cells()):
            bold = '**'  # of two figures
            lines += ['Each cell: published / **measured** (difference).', '']
        lines += ['| | ' + ' | '.join(map(_heading, table.columns)) + ' |',
                  '|---' * (len(table.columns) + 1) + '|']
        lines += [f'| {" | ".join(row)} |' for row in self.texts(bold)]
        if table.conclude is not None:
            lines += ['', *table.conclude(self.by_place())]
        failed = [f'- `{name}`: {" ".join(record.error.split())}'
                  for name, record in self.records.items()
                  if record.status == 'failed']
        if failed:
            lines += ['', '## Failed runs', '', *failed]
        lines += ['', '## Where the figures come from', '',
                  '| row | columns | run | config | seed | commit | log |',
                  '|---|---|---|---|---|---|---|']
        shown: Dict[Tuple[str, str], Dict[str, None]] = {}
        for label, cell, column, _ in self.cells():
            for source in cell.all_sources:
                shown.setdefault((label, source.job), {})[column.title] = None
        for (label, job), columns in shown.items():
            record = self.records.get(job)
            if record is not None:
                nowhere = 'no repository' if record.command else 'not run'
                lines.append(
                    f'| {label} | {", ".join(columns)} | `{job}` | '
                    f'`{record.config}` | {record.seed} | '
                    f'{record.commit or nowhere} | `{record.log}` |')
        return '\n'.join(lines) + '\n'

    def write_csv(self, path: str) -> None:
        """Write one line for each source of each cell."""
        with open(path, 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow((
                'table', 'row', 'column', 'published', 'measured', 'std',
                'seeds', 'difference', 'missing', 'run', 'metric', 'value',
                'status', 'config', 'seed', 'commit', 'log', 'data'))
            for label, cell, column, result in self.cells():
                head = (self.table.name, label, column.title, cell.published,
                        result.mean, result.std, result.count,
                        _difference(cell, result), result.missing)
                for source in cell.all_sources:
                    record = self.records.get(source.job)
                    tail = ('', 'not run', '', '', '', '') \
                        if record is None else (
                            record.metrics.get(source.metric, ''),
                            record.status, record.config, record.seed,
                            record.commit, record.log)
                    writer.writerow((*head, source.job, source.metric, *tail,
                                     self.table.caption))

    def latex(self) -> str:
        """A ``table`` environment for booktabs."""
        table = self.table
        lines = [
            r'\begin{table}', r'\centering',
            rf'\caption{{{_escape(table.title)}. {_escape(table.caption)}}}',
            rf'\begin{{tabular}}{{l{"c" * len(table.columns)}}}', r'\toprule',
            *(' & '.join(map(_escape, row)) + r' \\' for row in (
                ['', *(column.title for column in table.columns)],
                *self.texts()))]
        lines.insert(6, r'\midrule')
        return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}',
                          r'\end{table}']) + '\n'

    def plot(self, path: str) -> None:
        """Draw a panel for each column: published and measured by row."""
        table = self.table
        rows = len(table.rows)
        columns = min(len(table.columns), 3)
        lines = math.ceil(len(table.columns) / columns)
        figure = new_figure((2.4 + 3 * columns, lines * (1.2 + 0.26 * rows)))
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        places = range(rows)
        for number, column in enumerate(table.columns):
            axis = axes.flat[number]
            results = [row[number] for row in self.results]
            published, means = (np.array(values, dtype=float) for values in (
                [cells[number].published for _, cells in table.rows],
                [r.mean for r in results]))  # None becomes NaN
            if not np.isnan(published).all():
                axis.plot(published, places, 'D', ms=6, mfc='white',
                          color=COLOURS[0], label='published')
            axis.errorbar(means, places,
                          xerr=[r.std or 0 for r in results], fmt='o', ms=6,
                          capsize=3, color=COLOURS[1], label='measured')
            axis.set_title(_heading(column, arrows=('higher is better',
                                                    'lower is better'),
                                    between='\n'), fontsize=9)
            axis.set_yticks(places, [label for label, _ in table.rows],
                            fontsize=8)
            axis.tick_params(axis='x', labelsize=8)
            axis.locator_params(axis='x', nbins=5)
            axis.grid(axis='both', alpha=0.3)
            axis.set_ylim(rows - 0.5, -0.5)
        for axis in list(axes.flat)[len(table.columns):]:
            axis.set_visible(False)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2,
                      fontsize=9)
        figure.suptitle(table.title, fontsize=11)
        save_figure(figure, path)


def _heading(column: Column, arrows=('↑', '↓'), between: str = ' ') -> str:
    if column.higher_is_better is None:
        return column.title
    return column.title + between + arrows[not column.higher_is_better]


def _difference(cell: Cell, result: Result) -> Optional[float]:
    if cell.published is None or result.mean is None:
        return None
    return result.mean - cell.published


def _text(cell: Cell, column: Column, result: Result, bold: str = '') -> str:
    digits = column.digits
    if not cell.sources:
        return '' if cell.published is None else f'{cell.published:.{digits}f}'
    if result.mean is None:
        measured = result.missing or 'not run'
    else:
        measured = f'{result.mean:.{digits}f}'
        if result.std is not None:
            measured += f' ± {result.std:.{digits}f}'
        measured = f'{bold}{measured}{bold}'
        if result.missing:
            measured += f' (n = {result.count}; others {result.missing})'
    if cell.published is None:
        return measured
    text = f'{cell.published:.{digits}f} / {measured}'
    difference = _difference(cell, result)
    if difference is not None:
        text += f' ({difference:+.{digits}f})'
    return text


def _escape(text: str) -> str:
    return text.replace('->', '→').translate(_LATEX)


_LATEX = str.maketrans({
    **{symbol: f'\\{symbol}' for symbol in '&%_#${}'},
    '\\': r'\textbackslash{}', '^': r'\^{}', '~': r'\textasciitilde{}',
    '<': r'\textless{}', '>': r'\textgreater{}', '±': r'$\pm$',
    '→': r'$\rightarrow$'})
