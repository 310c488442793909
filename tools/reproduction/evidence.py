"""Which method is best on which teacher, each tuned by the same search.

Two tables: ``search`` looks for each method's learning rates on images that
neither distil nor test; ``evidence`` trains with those that were found, seed
by seed, and compares by pairs on the test images: scenes of digits, or
photographs, by profile. ``longtail_search`` and ``longtail`` do the same where
a few digits are seldom seen.
"""
import json
import os
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, stdev
from typing import Any, Dict, List, Optional, Sequence, Tuple

from reproduction.plan import (WORK_DIR, Cell, Column, Job, Source, Table,
                               checkpoint)
from reproduction.profiles import Profile, Task
from reproduction.report import Result
from reproduction.tables import Planner

ADAPTERS = 'optim_wrapper.paramwise_cfg.custom_keys.adapters'
#: The chosen rates, written by ``search`` into its own folder
TUNED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tuned.json')

# What a column shows: the mean of these
Tasks = Sequence[Tuple[Column, Tuple[Task, ...]]]

SCORE = Column('CLS probe %')
MEAN = Column('mean-patch probe %')
TIMED = Column(f'{SCORE.title}, in FitNet\'s time')
OWN = Column('teacher\'s own mIoU %')


@dataclass(frozen=True)
class Case:
    """A teacher, and images.

    Attributes:
        title (str): What it is called.
        planted (dict): Settings of ``mmsinger.PlantedArtifacts`` that differ
            from those of the recipe's teacher.
        scenes (str, optional): List of the scenes that distil and that train
            the probe. Defaults to None: those of the recipes.
        pair (str): Of the recipes. Defaults to the digits'.
        clean (bool): Nothing is planted, so that others are compared with
            it. Defaults to False.
    """
    title: str
    planted: Dict[str, object] = field(default_factory=dict)
    scenes: Optional[str] = None
    pair: str = 'vitl_to_vits'
    clean: bool = False


CASES = {
    'clean': Case('clean', dict(share=0.), clean=True),
    'direction': Case('3 %, one direction'),
    'subspace': Case('30 %, 8 dimensions', dict(
        share=0.3, norm='[6.0,10.0]', dims=8)),
    'content': Case('30 %, 8 dimensions, on content', dict(
        share=0.3, norm='[6.0,10.0]', dims=8, on='content')),
    **{f'imbalance{ratio}': Case(
        f'imbalance {ratio}', dict(share=0.),
        f'meta/train_imbalance{ratio}.txt') for ratio in (10, 50, 100)},
    'photos': Case('clean', pair='dinov2s_to_vit', clean=True),
    'photos_planted': Case('30 %, 8 dimensions',
                           pair='dinov2s-planted_to_vit'),
}


@dataclass(frozen=True)
class Setting:
    """What is searched beside the student's learning rate.

    Attributes:
        key (str): In the recipe.
        title (str): What it is called, before its value.
        values (tuple[float]): What is tried.
        open (bool): There are other values beyond these. Defaults to True.
    """
    key: str
    title: str
    values: Tuple[float, ...]
    open: bool = True


MULTIPLIER = Setting(f'{ADAPTERS}.lr_mult', 'adapters x',
                     (0.003, 0.03, 0.3, 1.))
# Without it, or with 0, it is FitNet
STRENGTH = Setting('model.targets.step.strength', 'strength', (0.5, 1.),
                   open=False)


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        title (str): What it is called.
        recipe (str): ``'fitnet'``, ``'robust'`` or ``'singer'``, of
            the profile.
        options (tuple[str]): What is changed in the recipe.
        setting (Setting, optional): What is searched beside the student's
            learning rate. Defaults to None.
        settled (bool): The adapters are trained before the student, by
            L_outlier and L_info alone, and then stay. Defaults to False.
        seconds (float, optional): Of 1000 steps on the digits on one core,
            the teacher's tokens cached, as in docs/evidence.md. Defaults to
            None: not measured.
    """
    title: str
    recipe: str
    options: Tuple[str, ...] = ()
    setting: Optional[Setting] = None
    settled: bool = False
    seconds: Optional[float] = None

    def steps_in_time(self, steps: int) -> Optional[int]:
        """How many steps it makes while FitNet makes so many."""
        return None if self.seconds is None else round(
            steps * METHODS['fitnet'].seconds / self.seconds)

    @property
    def values(self) -> Tuple[Optional[float], ...]:
        """What to try for the setting; None where there is none."""
        return (None, ) if self.setting is None else self.setting.values


def _step(kind: str, **settings: object) -> Tuple[str, ...]:
    name = 'model.targets.step'
    return (f'{name}.type=mmsinger.{kind}', *(
        f'{name}.{key}={value}' for key, value in settings.items()))


_ENTROPY = _step('WeighByEntropy', tokens='patches',
                 head='decode_head.conv_seg', num_classes=11)
METHODS: Dict[str, Method] = {
    'fitnet': Method('FitNet', 'fitnet', seconds=96.),
    'mask': Method('FitNet, tokens above 6 MAD left out', 'fitnet',
                   _step('MaskTokens', mad=6.0)),
    'smooth_l1': Method('FitNet, smooth L1 distance', 'fitnet', (
        'model.loss_kd.type=mmsinger.FeatureSmoothL1Loss', )),
    'targets': Method(
        'FitNet, outlier subspace removed from targets alone', 'fitnet',
        _step('RemoveOutlierSubspace', mad=6.0)),
    'robust': Method('Robust preset', 'robust', seconds=96.),
    'entropy': Method('FitNet, weighed by the teacher\'s entropy', 'fitnet',
                      _ENTROPY, STRENGTH),
    'singer': Method('SiNGER', 'singer', setting=MULTIPLIER, seconds=143.),
    # The distiller's own refinement comes before the steps in `targets`
    'singer_entropy': Method(
        'SiNGER, weighed by the teacher\'s entropy', 'fitnet',
        (*_ENTROPY, 'model.targets.step.strength=0.5',
         'model.targets.refine.type=mmsinger.Refine',
         'model.over_layers=mean'), MULTIPLIER),
    'removing': Method('SiNGER, gain -1', 'singer',
                       ('model.adapter.gain=-1', ), MULTIPLIER),
    'settled': Method('SiNGER, adapters trained first, then frozen', 'singer',
                      settled=True),
    'settled_gated': Method(
        'SiNGER, gated, adapters trained first, then frozen', 'singer',
        ('model.gate.mad=6.0', ), settled=True),
    'detached': Method('SiNGER, adapters without L_KD', 'singer',
                       ('model.kd_gradient=False', ), MULTIPLIER),
    'gated': Method('SiNGER, gated and capped, adapters without L_KD',
                    'singer', ('model.gate.mad=6.0', 'model.cap=True',
                               'model.kd_gradient=False'), MULTIPLIER),
}
SIMPLE = ('mask', 'smooth_l1', 'targets')
WEIGHED = ('entropy', 'singer_entropy')
Plan = Sequence[Tuple[str, Sequence[str]]]  # methods by case


@dataclass(frozen=True)
class Study:
    """What is compared, and how.

    Attributes:
        title (str): Of the comparison.
        data (str): For its caption.
        plan (Sequence): Methods by case.
        tuning (Task): The search's score.
        tasks (Tasks): The comparison's columns, :data:`SCORE` first.
        rates (tuple[float]): Learning rates that are tried.
        steps (int): Of the recipes, with ``options``.
        options (tuple[str]): What is changed in all recipes. Defaults to
            none.
        whole (bool): With columns for equal time and for what the teacher's
            own head says. Defaults to False.
        search (str): The table that finds the rates. Defaults to
            ``'search'``.
    """
    title: str
    data: str
    plan: Plan
    tuning: Task
    tasks: Tasks
    rates: Tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    steps: int = 1000  # of configs/_base_/schedules/adamw_digits_distil.py
    options: Tuple[str, ...] = ()
    whole: bool = False
    search: str = 'search'


WHOLE = Study(
    'Tuned methods on clean and planted teachers',
    'A trained teacher on the built-in digit scenes, into whose tokens '
    'artifacts are planted after block 1; students of '
    'configs/digits/*_vitl_to_vits.py; linear evaluation on scenes of digits '
    'that neither has seen.',
    tuple((case, tuple(name for name in METHODS if name not in WEIGHED))
          for case in ('clean', 'direction', 'subspace', 'content')),
    Task('linear_eval/cls_digits_tuning.py', 'accuracy/top1'),
    ((SCORE, (Task('linear_eval/cls_digits.py', 'accuracy/top1'), )),
     (MEAN, (Task('linear_eval/cls_mean_digits.py', 'accuracy/top1'), )),
     (Column('mIoU %'), (Task('linear_eval/seg_digits.py', 'mIoU'), ))),
    whole=True)
QUICK = replace(
    WHOLE, tasks=WHOLE.tasks[:1], whole=False,
    plan=(('clean', ('fitnet', 'singer')),  # the preset is FitNet there
          ('subspace', ('fitnet', 'singer', 'robust'))))
DEMO = replace(
    WHOLE, title='Students of a teacher with artifacts',
    tasks=WHOLE.tasks[:2], whole=False,
    plan=(('subspace', ('fitnet', 'singer', 'robust')), ))
LONGTAIL = replace(
    WHOLE, title='Tuned methods on long-tailed scenes', whole=False,
    search='longtail_search',
    data='Distilled from the clean teacher, and probed, on scenes in which '
    'digit 0 is so many times (the imbalance) as frequent as digit 9; '
    'accuracy and recall on balanced scenes.',
    plan=tuple((case, ('fitnet', 'singer', *WEIGHED)) for case in CASES
               if CASES[case].scenes),
    tasks=(
        (SCORE, (Task('linear_eval/cls_digits_longtail.py',
                      'accuracy/top1'), )),
        *((Column(f'{name} %'), tuple(
            Task('linear_eval/cls_digits_longtail.py',
                 f'single-label/recall_classwise/{digit}')
            for digit in digits))
          for name, digits in (('head (0 to 2)', range(3)),
                               ('medium (3 to 6)', range(3, 7)),
                               ('tail (7 to 9)', range(7, 10))))))
_CLASSES = ('model.head.num_classes=189', )
PHOTOS = Study(
    'Tuned methods on DINOv2-S/14 and photographs',
    'Students of configs/photos/*_to_vit.py, 2000 steps of 64 crops; the '
    'class is the picture that a crop was cut from, tests are on a part of '
    'each picture that nothing else has seen.',
    tuple((case, ('fitnet', *SIMPLE, 'singer', 'robust'))
          for case in ('photos', 'photos_planted')),
    Task('linear_eval/cls_photos_tuning.py', 'accuracy/top1',
         options=_CLASSES),
    ((SCORE, (Task('linear_eval/cls_photos.py', 'accuracy/top1',
                   options=_CLASSES), )),
     (MEAN, (Task('linear_eval/cls_mean_photos.py', 'accuracy/top1',
                  options=_CLASSES), )),
     (Column('20-NN %'), (Task('linear_eval/knn_photos.py', 'accuracy/top1',
                               options=('model.num_classes=189', )), )),
     (Column('explained variance %'), (Task(
         'linear_eval/cls_mean_photos.py', 'explained_variance',
         target='_base_/teachers/dinov2_s14_84px.py'), ))),
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), steps=2000,
    options=('train_dataloader.batch_size=64',
             'model.teacher.feature_cache=8000', 'train_cfg.max_iters=2000',
             'param_scheduler.0.end=100', 'param_scheduler.1.begin=100',
             'param_scheduler.1.end=2000'))

LEAST_LOSS = 3.  # points below which a planting decides nothing
LEAST_RECOVERY = 0.8
LEAST_RECOVERY_OF_A_SEED = 0.6
MOST_LOSS = 1.  # points against FitNet, clean; against the best simple filter


def search(study: Study, profile: Profile, seeds: Sequence[int],
           quick: bool = False) -> Table:
    """Learning rates of every method with every teacher, seed 0."""
    table = Planner(
        profile, [0], quick, study.search, 'Search of learning rates',
        f'{SCORE.title} on images of the training data that are neither '
        'distilled from nor probed with; seed 0. In each row the rate of the '
        'student; the rows of a method differ in what else is searched.',
        [Column(f'{rate:g}') for rate in study.rates])
    for case, methods in study.plan:
        for method in methods:
            for value in METHODS[method].values:
                table.add_row(row(method, case, value), [
                    cell for rate in study.rates for cell in table.cells(
                        [(_of_case(study.tuning, case), )],
                        lambda task, seed: table.evaluate_student(_distil(
                            table, study, method, case, seed, rate, value,
                            study.steps), task, seed))])
    table.conclude = lambda results: _say_chosen(chosen(results, study))
    table.data = lambda results: chosen(results, study)
    return table


def chosen(results: Dict[Tuple[str, str], Result], study: Study
           ) -> Dict[str, Any]:
    """The best rates of each method in each case.

    Args:
        results (dict): ``{(row, column): Result}`` of a search.
        study (Study): What was searched.

    Returns:
        dict: ``{'case/method': dict(rate, setting, score, edge)}``, where
        ``edge`` tells that the best is at the edge of what was tried, or
        that not all of it was; empty of methods without a result.
    """
    found = {}
    for case, methods in study.plan:
        for method in methods:
            setting, values = METHODS[method].setting, METHODS[method].values
            scores = {
                (i, j): results[row(method, case, value), f'{rate:g}'].mean
                for i, value in enumerate(values)
                for j, rate in enumerate(study.rates)}
            known = {place: score for place, score in scores.items()
                     if score is not None}
            if not known:
                continue
            i, j = max(known, key=known.get)
            neighbours = [(i, j - 1), (i, j + 1)]
            if setting is not None:
                neighbours += [
                    (k, j) for k in (i - 1, i + 1)
                    if setting.open or 0 <= k < len(values)]
            found[f'{case}/{method}'] = dict(
                rate=study.rates[j], setting=values[i], score=known[i, j],
                edge=any(place not in known for place in neighbours))
    return found


def _say_chosen(found: Dict[str, Any]) -> List[str]:
    lines = ['| | rate | |', '|---|---|---|']
    for key, best in found.items():
        case, method = key.split('/')
        lines.append(
            f'| {row(method, case, best["setting"])} | {best["rate"]:g} | '
            + ('**at the edge of what was tried**' if best['edge'] else '')
            + ' |')
    return ['## Chosen', '', *lines]


def demo(profile: Profile, seeds: Sequence[int], quick: bool = False
         ) -> Table:
    """A teacher with artifacts, and students with and without it."""
    table = compare('demo', DEMO, profile, seeds, quick)
    table.rows = [(label.split(': ')[1], cells)
                  for label, cells in table.rows]
    table.add_row('No teacher: labels of 3000 scenes alone', table.cells(
        [tasks for _, tasks in DEMO.tasks],
        lambda task, seed: table.evaluate_model('vits_cls', task, seed)))
    table.conclude = None
    return table


def compare(name: str, study: Study, profile: Profile, seeds: Sequence[int],
            quick: bool = False) -> Planner:
    """Methods with the rates that were found for them."""
    with open(TUNED) as file:
        tuned = json.load(file)
    table = Planner(
        profile, seeds, quick, name, study.title,
        f'{study.data} Mean ± std over seeds. Rates by `{study.search}`; a * '
        'marks those at the edge of what was tried.',
        [column for column, _ in study.tasks] + [TIMED, OWN] * study.whole)
    shown: List[Tuple[str, str]] = []
    for case, methods in study.plan:
        tasks = [tuple(_of_case(task, case) for task in members)
                 for _, members in study.tasks]
        table.add_row(row('teacher', case), [
            *(Cell(()) if any(task.target for task in members) else
              Cell((tuple(Source(_teacher_probe(table, case, task),
                                 task.metric) for task in members), ))
              for members in tasks),
            *([Cell(()), Cell(((Source(_own(table, case), 'mIoU'), ), ))]
              if study.whole else [])])
        for method in methods:
            best = tuned.get(f'{case}/{method}')
            if best is None:  # the search has not come to it
                continue
            shown.append((case, method))

            def cells(tasks: Sequence[Tuple[Task, ...]], steps: int
                      ) -> List[Cell]:
                return table.cells(tasks, lambda task, seed:
                                   table.evaluate_student(_distil(
                                       table, study, method, case, seed,
                                       best['rate'], best['setting'], steps),
                                       task, seed))

            shown_cells = cells(tasks, study.steps)
            if study.whole:
                steps = METHODS[method].steps_in_time(study.steps)
                shown_cells += cells(tasks[:1], steps) if steps else [
                    Cell(())]
                shown_cells.append(Cell(()))  # the teacher's own
            table.add_row(row(method, case) + ' *' * best['edge'],
                          shown_cells)
    table.conclude = lambda results: conclude(
        {(label.removesuffix(' *'), column): result
         for (label, column), result in results.items()}, shown)
    return table


TABLES = {  # by profile
    'digits': dict(
        search=partial(search, WHOLE),
        evidence=partial(compare, 'evidence', WHOLE),
        evidence_quick=partial(compare, 'evidence_quick', QUICK),
        longtail_search=partial(search, LONGTAIL),
        longtail=partial(compare, 'longtail', LONGTAIL), demo=demo),
    'photos': dict(search=partial(search, PHOTOS),
                   evidence=partial(compare, 'evidence', PHOTOS))}


def row(method: str, case: str, value: Optional[float] = None) -> str:
    """Label of a row; with the value of the method's setting, if given."""
    label = METHODS[method].title if method in METHODS else method
    setting = None if value is None else METHODS[method].setting
    return f'{CASES[case].title}: {label}' + (
        '' if setting is None else f', {setting.title} {value:g}')


def _planted(case: str, key: str) -> Tuple[str, ...]:
    return tuple(f'{key}.{name}={value}'
                 for name, value in CASES[case].planted.items())


def _scenes(case: str) -> Tuple[str, ...]:
    scenes = CASES[case].scenes
    return () if scenes is None else (
        f'train_dataloader.dataset.ann_file={scenes}',
        'train_dataloader.dataset.indices=None')


def _of_case(task: Task, case: str) -> Task:
    """The evaluation with a case's scenes to train the probe."""
    return replace(task, options=(*task.options, *_scenes(case)))


def _distil(planner: Planner, study: Study, method: str, case: str, seed: int,
            rate: float, value: Optional[float], steps: int) -> str:
    chosen_method = METHODS[method]

    def distil(name: str, rate: float, *options: str) -> str:
        return planner.distil(
            planner.profile.recipe, seed, chosen_method.recipe,
            CASES[case].pair, f'{case}-{method}-{name}',
            (f'optim_wrapper.optimizer.lr={rate:g}', *study.options, *options,
             *_planted(case, 'model.teacher.backbone'), *_scenes(case),
             *chosen_method.options))

    name, options = f'{rate:g}', []
    if chosen_method.settled:
        adapters = distil('adapters', 3e-3, f'{ADAPTERS}.lr_mult=1',
                          'model.loss_kd.loss_weight=0',
                          'train_cfg.max_iters=300',
                          'param_scheduler.1.end=300')
        options = [f'{ADAPTERS}.lr_mult=0',
                   f'load_from={checkpoint(adapters)}']
    elif chosen_method.setting is not None:
        options = [f'{chosen_method.setting.key}={value:g}']
        name += f'-x{value:g}'
    if steps != study.steps:
        options += [f'train_cfg.max_iters={steps}',
                    f'param_scheduler.1.end={steps}']
        name += f'-{steps}steps'
    return distil(name, rate, *options)


def _teacher_probe(planner: Planner, case: str, task: Task) -> str:
    """Linear evaluation of the teacher itself."""
    source = planner.profile.path(planner.profile.recipe, method='fitnet',
                                  pair=CASES[case].pair)
    options = _planted(case, 'model.teacher.backbone')
    return planner.evaluate(
        f'teacher-{case}', source,
        ('--teacher', *(('--source-options', *options) if options else ())),
        task, 0)


def _own(planner: Planner, case: str) -> str:
    """The teacher's own predictions, with the head that it was trained
    with."""
    config = planner.profile.path('digits/planted_teacher.py')
    return planner.add_job(Job(
        f'teacher-{case}/own', 'test.py',
        (config, 'mmsinger://digits_teacher.pth', '--work-dir', WORK_DIR),
        config, 0, _planted(case, 'model.backbone')))


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

    rows = [('', 'difference, 95 % interval', 'recovered', 'bars'),
            ('---', ) * 4]
    judged, clean = False, next((of('fitnet', case) for case, _ in shown
                                 if CASES[case].clean), None)
    for case, method in shown:
        ours, fitnet = of(method, case), of('fitnet', case)
        if method == 'fitnet' or ours is None or fitnet is None:
            continue
        differences = [a - b for a, b in zip(ours.values, fitnet.values)]
        text = f'{mean(differences):+.1f}'
        if len(differences) > 1:
            text += f' ± {interval(differences)[1]:.1f}'
        recovered, bars = '', []
        if CASES[case].clean:
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
        rows.append((row(method, case), text, recovered, ', '.join(bars)))
        judged |= bool(recovered or bars)
    lines = [f'## Against FitNet, by {SCORE.title}, seed by seed', '',
             *(f'| {" | ".join(cells[:4 if judged else 2])} |'
               for cells in rows)]
    return lines if not judged else lines + [
        '', f'Bars: *clean*, at most {MOST_LOSS:g} point below FitNet; '
        f'*recovery*, at least {100 * LEAST_RECOVERY:.0f} % of what the '
        'planting costs FitNet, and '
        f'{100 * LEAST_RECOVERY_OF_A_SEED:.0f} % in each seed; *simple*, at '
        f'most {MOST_LOSS:g} point below the best of the simple cures. A '
        f'planting that costs FitNet less than {LEAST_LOSS:g} points decides '
        'nothing.']


def _met(bar: str, met: bool) -> str:
    return f'{bar} met' if met else f'**{bar} not met**'
