"""Training curves from the logs in work dirs."""
import glob
import json
import math
import os
from collections import defaultdict
from typing import Any, Dict, List, NamedTuple, Sequence

from mmsinger.errors import ConfigError, near_paths
from mmsinger.figures.style import add_caption, line_style, new_figure

LOG = 'scalars.json'
_NO_CURVES = {'step', 'iter', 'epoch', 'time', 'data_time', 'memory'}


class Curve(NamedTuple):
    """One logged value of a run.

    Attributes:
        steps (list[int]): Ascending.
        values (list[float]): At each.
        unit (str): What the steps count, ``'iteration'`` or ``'epoch'``.
    """
    steps: List[int]
    values: List[float]
    unit: str


def read_curves(work_dir: str) -> Dict[str, Curve]:
    """Read all that was logged in a work dir.

    Of runs that were resumed the later one counts where both have a value.

    Args:
        work_dir (str): What ``tools/train.py`` was given; or one of the
            folders in it that are named by a time.

    Returns:
        dict[str, Curve]: By the name in the log.

    Raises:
        ConfigError: If the folder is missing or holds no logs.
    """
    if not os.path.isdir(work_dir):
        raise ConfigError(f'work dir {work_dir!r}: no such folder (working '
                          f'directory {os.getcwd()}).'
                          f'{near_paths(work_dir)} Give what --work-dir '
                          'was in training.')
    logs = sorted(path for pattern in ('', '*') for path in glob.glob(
        os.path.join(glob.escape(work_dir), pattern, 'vis_data', LOG)))
    points: Dict[str, Dict[str, Dict[int, float]]] = dict(
        iteration=defaultdict(dict), epoch=defaultdict(dict))
    for log in logs:
        begun = set()
        for line in _lines(log):
            # Runs in epochs log them in training, and metrics by them
            unit = 'epoch' if 'iter' not in line and \
                'epoch' in points['iteration'] else 'iteration'
            if unit not in begun:  # resumed or anew: replaces what follows
                begun.add(unit)
                for values in points[unit].values():
                    for step in [s for s in values if s >= line['step']]:
                        del values[step]
            for key, value in line.items():
                if isinstance(value, (int, float)):
                    points[unit][key][line['step']] = value
    curves = {
        key: Curve(sorted(values), [values[s] for s in sorted(values)], unit)
        for unit, found in points.items() for key, values in found.items()
        if values and key not in _NO_CURVES}
    if not curves:
        raise ConfigError(
            f'work dir {work_dir!r} holds no logs: there is no '
            f'*/vis_data/{LOG} with values in it. They are written from the '
            "first logged iteration on, if vis_backends has "
            "dict(type='LocalVisBackend').")
    return curves


def _lines(path: str):
    with open(path, encoding='utf-8', errors='replace') as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off when a run was killed
                continue
            if isinstance(line, dict) and 'step' in line:
                yield line


def draw_curves(runs: Dict[str, Dict[str, Curve]], keys: Sequence[str]
                ) -> Any:
    """A panel a value, a line a run.

    Args:
        runs (dict[str, dict[str, Curve]]): What :func:`read_curves` gave, by
            the run's name.
        keys (Sequence[str]): What to draw.

    Returns:
        matplotlib.figure.Figure: The figure.
    """
    count = min(len(keys), 3)
    lines = math.ceil(len(keys) / count)
    from matplotlib.ticker import MaxNLocator
    figure = new_figure((max(4.5, 3.4 * count), 2.4 * lines + 0.9))
    axes = figure.subplots(lines, count, squeeze=False)
    handles: Dict[str, Any] = {}
    for axis, key in zip(axes.flat, keys):
        units = set()
        for number, (run, curves) in enumerate(runs.items()):
            if key not in curves:
                continue
            curve = curves[key]
            units.add(curve.unit)
            handles[run], = axis.plot(
                curve.steps, curve.values, linewidth=1.4, markersize=4,
                markevery=max(1, len(curve.steps) // 8), **line_style(number))
        axis.set_title(key, fontsize=9)
        axis.set_xlabel(' or '.join(sorted(units)), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(useOffset=False)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(keys):]:
        axis.set_visible(False)
    order = [run for run in runs if run in handles]
    figure.legend([handles[run] for run in order], order,
                  loc='outside upper center', fontsize=8, frameon=False,
                  ncols=min(4, len(order)))
    add_caption(figure, f'Logs of {", ".join(order)}, as they are, not '
                'smoothed any further. Lines go through all values; markers '
                'stand on some, to tell lines apart.')
    return figure
