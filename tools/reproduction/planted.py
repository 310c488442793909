"""The planted-artifact benchmark: does a method undo known artifacts?"""
from typing import Dict, List, Sequence, Tuple

from reproduction.plan import WORK_DIR, Cell, Column, Job, Source, Table
from reproduction.profiles import Profile, Task
from reproduction.tables import ABLATIONS, Planner

PAIR = 'vitl_to_vits'
TASKS = (
    (Column('CLS probe %'), Task('linear_eval/cls_digits.py',
                                 'accuracy/top1')),
    (Column('mean-patch probe %'), Task('linear_eval/cls_mean_digits.py',
                                        'accuracy/top1')),
    (Column('mIoU %'), Task('linear_eval/seg_digits.py', 'mIoU')),
    (Column('depth RMSE m', higher_is_better=False, digits=3),
     Task('linear_eval/depth_digits.py', 'rmse')),
)
OWN = Column('teacher\'s own mIoU %')

# Settings of mmsinger.PlantedArtifacts, where they differ from those of
# configs/_base_/teachers/digits_planted.py
CASES: Dict[str, Tuple[str, Dict[str, object]]] = {
    'clean': ('clean', dict(share=0.)),
    'direction': ('3 %, one direction', {}),
    'null': ('3 %, one null direction', dict(direction='null')),
    'subspace': ('8 %, 8 dimensions', dict(
        share=0.08, norm=(5., 10.), dims=8)),
    'moderate': ('8 %, moderate norms', dict(share=0.08, norm=(2., 3.))),
}
# The recipe, and what is changed in it
METHODS: Dict[str, Tuple[str, str, Tuple[str, ...]]] = {
    'fitnet': ('FitNet', 'fitnet', ()),
    'vitkd': ('ViTKD', 'vitkd', ()),
    'singer': ('SiNGER', 'singer', ()),
    'gated': ('SiNGER, gated (ours)', 'singer',
              ('model.gate.mad=8.0', 'model.cap=True')),
    'clip_quantile': ('FitNet, norms clipped at quantile 0.95', 'fitnet',
                      ('model.targets.clip.type=mmsinger.ClipNorms',
                       'model.targets.clip.quantile=0.95')),
    'clip_mad': ('FitNet, norms clipped at 6 MAD', 'fitnet',
                 ('model.targets.clip.type=mmsinger.ClipNorms',
                  'model.targets.clip.mad=6.0')),
    'mask_mad': ('FitNet, tokens above 6 MAD left out', 'fitnet',
                 ('model.targets.mask.type=mmsinger.MaskTokens',
                  'model.targets.mask.mad=6.0')),
    'mask_oracle': ('FitNet, planted tokens left out (oracle)', 'fitnet',
                    ('model.targets.mask.type=mmsinger.MaskTokens',
                     'model.targets.mask.oracle=True',
                     'model.teacher.feature_cache=0')),
    'random_start': ('SiNGER, random init', 'singer',
                     ('model.adapter.init=random', )),
    **{f'only_{key}': (f'SiNGER, {title}', 'singer', ABLATIONS[key][1])
       for key, title in (('random', 'random init, no other loss'),
                          ('nullspace', 'nullspace init, no other loss'),
                          ('outlier', 'without L_info'),
                          ('info', 'without L_outlier'))},
}
CORE = (('clean', ('fitnet', 'singer')), ('direction', ('fitnet', 'singer')))
WHOLE = (
    ('clean', ('fitnet', 'vitkd', 'singer', 'gated')),
    ('direction', tuple(METHODS)),
    ('null', ('fitnet', 'singer')),
    ('subspace', ('fitnet', 'vitkd', 'singer', 'gated', 'clip_quantile',
                  'mask_mad')),
    ('moderate', ('fitnet', 'vitkd', 'singer', 'gated', 'clip_quantile')),
)

MOST_OWN_LOSS = 1.  # points that planting may cost the teacher itself
LEAST_LOSS = 4.  # points that it must cost FitNet
LEAST_RECOVERY = 0.6
MOST_CLEAN_LOSS = 2.


def planted_core(profile: Profile, seeds: Sequence[int], quick: bool = False
                 ) -> Table:
    """FitNet and SiNGER on the clean teacher and on one planted."""
    return _planted('planted', CORE, profile, seeds, quick)


def planted_all(profile: Profile, seeds: Sequence[int], quick: bool = False
                ) -> Table:
    """All plantings, methods and ablations."""
    return _planted('planted_all', WHOLE, profile, seeds, quick)


def _planted(name: str, plan: Sequence[Tuple[str, Sequence[str]]],
             profile: Profile, seeds: Sequence[int], quick: bool) -> Table:
    table = Table(
        name, 'Planted artifacts',
        'A trained teacher on the built-in digit scenes, into whose tokens '
        'artifacts are planted after block 1; students of '
        f'configs/digits/*_{PAIR}.py; linear evaluation on scenes of digits '
        'that neither has seen. Mean ± std over seeds.',
        [column for column, _ in TASKS] + [OWN])
    planner = Planner(table, profile, seeds, quick)
    for case, methods in plan:
        table.add_row(row('teacher', case), [
            *(_cell(planner, [0], task, lambda seed, case=case, task=task:
                    _teacher_probe(planner, case, task))
              for _, task in TASKS),
            Cell(((Source(_own(planner, case), 'mIoU'), ), ))])
        for method in methods:
            table.add_row(row(method, case), [
                *(_cell(planner, seeds, task,
                        lambda seed, method=method, case=case, task=task:
                        planner.evaluate_student(
                            _distil(planner, method, case, seed), task, seed))
                  for _, task in TASKS), Cell(())])
    table.conclude = lambda results: conclude(results, [c for c, _ in plan])
    return table


def row(method: str, case: str) -> str:
    """Label of a row."""
    title = 'teacher' if method == 'teacher' else METHODS[method][0]
    return f'{CASES[case][0]}: {title}'


def _cell(planner: Planner, seeds, task: Task, job) -> Cell:
    return Cell(tuple((Source(job(seed), task.metric), ) for seed in seeds))


def _options(case: str, key: str) -> Tuple[str, ...]:
    return tuple(
        f'{key}.{name}={_plain(value)}'
        for name, value in CASES[case][1].items())


def _plain(value) -> str:
    return '[' + ','.join(map(str, value)) + ']' \
        if isinstance(value, tuple) else str(value)


def _distil(planner: Planner, method: str, case: str, seed: int) -> str:
    _, recipe, options = METHODS[method]
    # Named so that the other tables' jobs are shared
    name = [case] * (case != 'direction') + [method] * (method != recipe)
    return planner.distil(
        planner.profile.recipe, seed, recipe, PAIR, '-'.join(name),
        _options(case, 'model.teacher.backbone') + options)


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


def conclude(results: dict, cases: Sequence[str]) -> List[str]:
    """What the benchmark says, bar by bar.

    Args:
        results (dict): ``{(row, column): Result}``.
        cases (Sequence[str]): The plantings, ``'clean'`` among them.

    Returns:
        list[str]: Lines of Markdown.
    """
    column = TASKS[0][0].title
    lines = [f'## Against the bars, by {column}', '']

    def of(method: str, case: str):
        return results[row(method, case), column]

    clean = of('fitnet', 'clean')
    for case in cases:
        if case == 'clean':
            continue
        fitnet, singer = of('fitnet', case), of('singer', case)
        owns = [results[row('teacher', c), OWN.title]
                for c in ('clean', case)]
        if any(r.missing for r in (*owns, clean, fitnet, singer)):
            lines.append(f'- {CASES[case][0]}: incomplete, not all runs are '
                         'finished.')
            continue
        own = [result.mean for result in owns]
        own_loss, loss = own[0] - own[1], clean.mean - fitnet.mean
        lines.append(
            f'- {CASES[case][0]}: planting costs the teacher itself '
            f'{own_loss:.2f} points ({_met(own_loss <= MOST_OWN_LOSS)}: at '
            f'most {MOST_OWN_LOSS:g}) and FitNet {loss:.1f} '
            f'({_met(loss >= LEAST_LOSS)}: at least {LEAST_LOSS:g}).')
        wins = _wins(singer.values, fitnet.values)
        lines.append(
            f'  SiNGER is above FitNet in {wins} of {len(fitnet.values)} '
            f'seeds ({_met(wins == len(fitnet.values))}: in all).')
        if loss < LEAST_LOSS:
            lines.append('  Inconclusive: too little was lost for a share '
                         'that is recovered to mean much.')
        else:
            recovered = (singer.mean - fitnet.mean) / loss
            lines.append(
                f'  SiNGER recovers {100 * recovered:.0f} % of the loss '
                f'({_met(recovered >= LEAST_RECOVERY)}: at least '
                f'{100 * LEAST_RECOVERY:.0f} %).')
    singer = of('singer', 'clean')
    if singer.missing or clean.missing:
        lines.append('- Clean teacher: incomplete, not all runs are '
                     'finished.')
    else:
        gain = singer.mean - clean.mean
        lines.append(
            f'- Clean teacher: SiNGER {gain:+.1f} points against FitNet '
            f'({_met(gain >= -MOST_CLEAN_LOSS)}: at least '
            f'{-MOST_CLEAN_LOSS:g}).')
    return lines


def _met(met: bool) -> str:
    return 'met' if met else '**not met**'


def _wins(first, second) -> int:
    return sum(a > b for a, b in zip(first, second))
