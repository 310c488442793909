"""Which method is best on which teacher, each tuned by the same search.

Two tables: ``search`` looks for each method's learning rates on scenes that
neither distil nor test; ``evidence`` trains with those that were found, seed
by seed, and compares by pairs on the test scenes.
"""
import json
import os
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from reproduction.plan import (WORK_DIR, Cell, Column, Job, Source, Table,
                               checkpoint)
from reproduction.profiles import Profile, Task
from reproduction.report import Result
from reproduction.tables import Planner

PAIR = 'vitl_to_vits'
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MULTIPLIERS = (0.003, 0.03, 0.3, 1.)
ADAPTERS = 'optim_wrapper.paramwise_cfg.custom_keys.adapters'
#: The chosen rates, written by ``search`` into its own folder
TUNED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tuned.json')

SCORE = Column('CLS probe %')
TUNING = Task('linear_eval/cls_digits_tuning.py', 'accuracy/top1')
TASKS = (
    (SCORE, Task('linear_eval/cls_digits.py', 'accuracy/top1')),
    (Column('mean-patch probe %'), Task('linear_eval/cls_mean_digits.py',
                                        'accuracy/top1')),
    (Column('mIoU %'), Task('linear_eval/seg_digits.py', 'mIoU')),
)
OWN = Column('teacher\'s own mIoU %')

# Settings of mmsinger.PlantedArtifacts, where they differ from those of
# configs/_base_/teachers/digits_planted.py
CASES: Dict[str, Tuple[str, Dict[str, object]]] = {
    'clean': ('clean', dict(share=0.)),
    'direction': ('3 %, one direction', {}),
    'subspace': ('30 %, 8 dimensions', dict(
        share=0.3, norm=(6., 10.), dims=8)),
    'content': ('30 %, 8 dimensions, on content', dict(
        share=0.3, norm=(6., 10.), dims=8, on='content')),
}


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        title (str): What it is called.
        recipe (str): ``'fitnet'``, ``'robust'`` or ``'singer'``, of
            configs/digits.
        options (tuple[str]): What is changed in the recipe.
        settled (bool): The adapters are trained before the student, by
            L_outlier and L_info alone, and then stay. Defaults to False.
    """
    title: str
    recipe: str
    options: Tuple[str, ...] = ()
    settled: bool = False

    @property
    def multipliers(self) -> Tuple[Optional[float], ...]:
        """What to try for the adapters' learning rate; None: none that is
        tied to the student's."""
        return MULTIPLIERS if self.recipe == 'singer' and not self.settled \
            else (None, )


def _step(kind: str, **settings: object) -> Tuple[str, ...]:
    name = 'model.targets.step'
    return (f'{name}.type=mmsinger.{kind}', *(
        f'{name}.{key}={value}' for key, value in settings.items()))


METHODS: Dict[str, Method] = {
    'fitnet': Method('FitNet', 'fitnet'),
    'mask': Method('FitNet, tokens above 6 MAD left out', 'fitnet',
                   _step('MaskTokens', mad=6.0)),
    'smooth_l1': Method('FitNet, smooth L1 distance', 'fitnet', (
        'model.loss_kd.type=mmsinger.FeatureSmoothL1Loss', )),
    'targets': Method(
        'FitNet, outlier subspace removed from targets alone', 'fitnet',
        _step('RemoveOutlierSubspace', mad=6.0)),
    'robust': Method('Robust preset', 'robust'),
    'singer': Method('SiNGER', 'singer'),
    'removing': Method('SiNGER, gain -1', 'singer',
                       ('model.adapter.gain=-1', )),
    'settled': Method('SiNGER, adapters trained first, then frozen', 'singer',
                      settled=True),
    'settled_gated': Method(
        'SiNGER, gated, adapters trained first, then frozen', 'singer',
        ('model.gate.mad=6.0', ), settled=True),
    'detached': Method('SiNGER, adapters without L_KD', 'singer',
                       ('model.kd_gradient=False', )),
    'gated': Method('SiNGER, gated and capped, adapters without L_KD',
                    'singer', ('model.gate.mad=6.0', 'model.cap=True',
                               'model.kd_gradient=False')),
}
SIMPLE = ('mask', 'smooth_l1', 'targets')
DEMO = (('subspace', ('fitnet', 'singer', 'robust')), )
QUICK = (('clean', ('fitnet', 'singer')),  # the preset is FitNet there
         ('subspace', ('fitnet', 'singer', 'robust')))
WHOLE = tuple((case, tuple(METHODS)) for case in CASES)

LEAST_LOSS = 3.  # points below which a planting decides nothing
LEAST_RECOVERY = 0.8
LEAST_RECOVERY_OF_A_SEED = 0.6
MOST_LOSS = 1.  # points against FitNet, clean; against the best simple filter


def search(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Learning rates of every method in every case, seed 0."""
    table = Table(
        'search', 'Search of learning rates',
        f'{SCORE.title} on training scenes that are neither distilled from '
        'nor probed with; seed 0. In each row the rate of the student; the '
        'rows of a method differ in the multiplier of the adapters\' rate.',
        [Column(f'{rate:g}') for rate in RATES])
    planner = Planner(table, profile, [0], quick)
    for case, methods in WHOLE:
        for method in methods:
            for multiplier in METHODS[method].multipliers:
                table.add_row(row(method, case, multiplier), [
                    Cell(((Source(planner.evaluate_student(_distil(
                        planner, method, case, 0, rate, multiplier),
                        TUNING, 0), TUNING.metric), ), ))
                    for rate in RATES])
    table.conclude = _say_chosen
    table.data = chosen
    return table


def chosen(results: Dict[Tuple[str, str], Result]) -> Dict[str, Any]:
    """The best rates of each method in each case.

    Args:
        results (dict): ``{(row, column): Result}`` of ``search``.

    Returns:
        dict: ``{'case/method': dict(rate, multiplier, score, edge)}``, where
        ``edge`` tells that the best is at the edge of what was tried, or
        that not all of it was; empty of methods without a result.
    """
    found = {}
    for case, methods in WHOLE:
        for method in methods:
            multipliers = METHODS[method].multipliers
            scores = {
                (i, j): results[row(method, case, multiplier),
                                f'{rate:g}'].mean
                for i, multiplier in enumerate(multipliers)
                for j, rate in enumerate(RATES)}
            known = {place: score for place, score in scores.items()
                     if score is not None}
            if not known:
                continue
            i, j = max(known, key=known.get)
            neighbours = [(i, j - 1), (i, j + 1)] + (
                [(i - 1, j), (i + 1, j)] if len(multipliers) > 1 else [])
            found[f'{case}/{method}'] = dict(
                rate=RATES[j], multiplier=multipliers[i], score=known[i, j],
                edge=any(place not in known for place in neighbours))
    return found


def _say_chosen(results: Dict[Tuple[str, str], Result]) -> List[str]:
    lines = ['| | rate | of adapters | |', '|---|---|---|---|']
    for key, best in chosen(results).items():
        case, method = key.split('/')
        lines.append(
            f'| {row(method, case)} | {best["rate"]:g} | '
            f'{best["multiplier"] or "-"} | '
            + ('**at the edge of what was tried**' if best['edge'] else '')
            + ' |')
    return ['## Chosen', '', *lines]


def evidence(profile: Profile, seeds: Sequence[int], quick: bool = False
             ) -> Table:
    """All cases and methods, tuned."""
    return _compare('evidence', WHOLE, TASKS, profile, seeds, quick)


def evidence_quick(profile: Profile, seeds: Sequence[int],
                   quick: bool = False) -> Table:
    """The clean teacher and one planting, three methods."""
    return _compare('evidence_quick', QUICK, TASKS[:1], profile, seeds,
                    quick, own=False)


def demo(profile: Profile, seeds: Sequence[int], quick: bool = False
         ) -> Table:
    """A teacher with artifacts, and students with and without it."""
    table = _compare('demo', DEMO, TASKS[:2], profile, seeds, quick,
                     own=False)
    table.title = 'Students of a teacher with artifacts'
    table.caption = (
        'A trained teacher on the built-in digit scenes, into whose tokens '
        'artifacts are planted after block 1; linear evaluation on scenes of '
        'digits that neither it nor a student has seen; rates by `search`.')
    table.rows = [(label.split(': ')[1], cells)
                  for label, cells in table.rows]
    planner = Planner(table, profile, seeds, quick)
    table.add_row('No teacher: labels of 3000 scenes alone', _cells(
        planner, TASKS[:2],
        lambda task, seed: planner.evaluate_model('vits_cls', task, seed)))
    table.conclude = None
    return table


def _cells(planner: Planner, tasks: Sequence[Tuple[Column, Task]],
           evaluate: Callable[[Task, int], str]) -> List[Cell]:
    """One cell for each task, over all seeds."""
    by_column = {column.title: (task, ) for column, task in tasks}
    return planner.cells(list(by_column), None, evaluate, by_column)


def _compare(name: str, plan: Sequence[Tuple[str, Sequence[str]]],
             tasks: Sequence[Tuple[Column, Task]], profile: Profile,
             seeds: Sequence[int], quick: bool, own: bool = True) -> Table:
    with open(TUNED) as file:
        tuned = json.load(file)
    table = Table(
        name, 'Tuned methods on clean and planted teachers',
        'A trained teacher on the built-in digit scenes, into whose tokens '
        'artifacts are planted after block 1; students of '
        f'configs/digits/*_{PAIR}.py; linear evaluation on scenes of digits '
        'that neither has seen. Mean ± std over seeds. Rates by `search`; a * '
        'marks those at the edge of what was tried.',
        [column for column, _ in tasks] + [OWN] * own)
    planner = Planner(table, profile, seeds, quick)
    shown: List[Tuple[str, str]] = []
    for case, methods in plan:
        table.add_row(row('teacher', case), [
            *(Cell(((Source(_teacher_probe(planner, case, task),
                            task.metric), ), )) for _, task in tasks),
            *([Cell(((Source(_own(planner, case), 'mIoU'), ), ))]
              if own else [])])
        for method in methods:
            best = tuned.get(f'{case}/{method}')
            if best is None:  # the search has not come to it
                continue
            shown.append((case, method))
            students = {seed: _distil(planner, method, case, seed,
                                      best['rate'], best['multiplier'])
                        for seed in seeds}
            table.add_row(row(method, case) + ' *' * best['edge'], [
                *_cells(planner, tasks,
                        lambda task, seed: planner.evaluate_student(
                            students[seed], task, seed)),
                *[Cell(())] * own])
    table.conclude = lambda results: conclude(
        {(label.removesuffix(' *'), column): result
         for (label, column), result in results.items()}, shown)
    return table


def row(method: str, case: str, multiplier: Optional[float] = None) -> str:
    """Label of a row."""
    title = METHODS[method].title if method in METHODS else method
    return f'{CASES[case][0]}: {title}' + (
        '' if multiplier is None else f', adapters x {multiplier:g}')


def _options(case: str, key: str) -> Tuple[str, ...]:
    return tuple(
        f'{key}.{name}={_plain(value)}'
        for name, value in CASES[case][1].items())


def _plain(value: object) -> str:
    return '[' + ','.join(map(str, value)) + ']' \
        if isinstance(value, tuple) else str(value)


def _distil(planner: Planner, method: str, case: str, seed: int, rate: float,
            multiplier: Optional[float]) -> str:
    chosen_method = METHODS[method]

    def distil(name: str, rate: float, *options: str) -> str:
        return planner.distil(
            planner.profile.recipe, seed, chosen_method.recipe, PAIR,
            f'{case}-{method}-{name}',
            (f'optim_wrapper.optimizer.lr={rate:g}', *options,
             *_options(case, 'model.teacher.backbone'),
             *chosen_method.options))

    name, options = f'{rate:g}', []
    if chosen_method.settled:
        adapters = distil('adapters', 3e-3, f'{ADAPTERS}.lr_mult=1',
                          'model.loss_kd.loss_weight=0',
                          'train_cfg.max_iters=300',
                          'param_scheduler.1.end=300')
        options = [f'{ADAPTERS}.lr_mult=0',
                   f'load_from={checkpoint(adapters)}']
    elif multiplier is not None:
        options = [f'{ADAPTERS}.lr_mult={multiplier:g}']
        name += f'-x{multiplier:g}'
    return distil(name, rate, *options)


def _teacher_probe(planner: Planner, case: str, task: Task) -> str:
    """Linear evaluation of the teacher itself."""
    source = planner.profile.path(planner.profile.recipe, method='fitnet',
                                  pair=PAIR)
    options = _options(case, 'model.teacher.backbone')
    return planner.evaluate(
        f'teacher-{case}', source,
        ('--teacher', *(('--source-options', *options) if options else ())),
        task, 0)


def _own(planner: Planner, case: str) -> str:
    """The teacher's own predictions, with the head that it was trained
    with."""
    config = planner.profile.path('digits/planted_teacher.py')
    return planner.table.add_job(Job(
        f'teacher-{case}/own', 'test.py',
        (config, 'mmsinger://digits_teacher.pth', '--work-dir', WORK_DIR),
        config, 0, _options(case, 'model.backbone')))


# -- what it says -------------------------------------------------------------


def interval(values: Sequence[float]) -> Tuple[float, float]:
    """Mean and half width of its 95 % interval, by Student's t.

    Args:
        values (Sequence[float]): Independent measurements, at least two.

    Returns:
        tuple[float, float]: Both.
    """
    from scipy.stats import t
    return mean(values), t.ppf(0.975, len(values) - 1) * stdev(
        values) / len(values)**0.5


def conclude(results: Dict[Tuple[str, str], Result],
             shown: Sequence[Tuple[str, str]]) -> List[str]:
    """Paired differences, and what they say against the bars.

    Args:
        results (dict): ``{(row, column): Result}`` of ``evidence``.
        shown (Sequence[tuple[str, str]]): Case and method of each row.

    Returns:
        list[str]: Lines of Markdown.
    """
    def of(method: str, case: str) -> Optional[Result]:
        result = results.get((row(method, case), SCORE.title))
        return None if result is None or result.missing else result

    lines = [f'## Against FitNet, by {SCORE.title}, seed by seed', '',
             '| | difference, 95 % interval | recovered | bars |',
             '|---|---|---|---|']
    clean = of('fitnet', 'clean')
    for case, method in shown:
        ours, fitnet = of(method, case), of('fitnet', case)
        if method == 'fitnet' or ours is None or fitnet is None:
            continue
        differences = [a - b for a, b in zip(ours.values, fitnet.values)]
        text = f'{mean(differences):+.1f}'
        if len(differences) > 1:
            text += f' ± {interval(differences)[1]:.1f}'
        recovered, bars = '', []
        if case == 'clean':
            bars.append(_met('clean', mean(differences) >= -MOST_LOSS))
        elif clean is not None:
            lost = clean.mean - fitnet.mean
            if lost < LEAST_LOSS:
                recovered = f'undecided: FitNet loses {lost:.1f}'
            else:
                shares = [(a - b) / (c - b) if c > b else 1. for a, b, c in
                          zip(ours.values, fitnet.values, clean.values)]
                share = (ours.mean - fitnet.mean) / lost
                recovered = f'{100 * share:.0f} % of {lost:.1f}'
                bars.append(_met('recovery', share >= LEAST_RECOVERY and min(
                    shares) >= LEAST_RECOVERY_OF_A_SEED))
        simple = [of(name, case) for name in SIMPLE if name != method]
        best = max((r.mean for r in simple if r is not None), default=None)
        if best is not None:
            bars.append(_met('simple', ours.mean >= best - MOST_LOSS))
        lines.append(f'| {row(method, case)} | {text} | {recovered} | '
                     f'{", ".join(bars)} |')
    return lines + [
        '', f'Bars: *clean*, at most {MOST_LOSS:g} point below FitNet; '
        f'*recovery*, at least {100 * LEAST_RECOVERY:.0f} % of what the '
        'planting costs FitNet, and '
        f'{100 * LEAST_RECOVERY_OF_A_SEED:.0f} % in each seed; *simple*, at '
        f'most {MOST_LOSS:g} point below the best of the simple cures. A '
        f'planting that costs FitNet less than {LEAST_LOSS:g} points decides '
        'nothing.']


def _met(bar: str, met: bool) -> str:
    return f'{bar} met' if met else f'**{bar} not met**'
