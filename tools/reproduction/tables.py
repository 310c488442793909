"""The tables of the paper as plans of jobs."""
import os
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from reproduction import published
from reproduction.plan import (WORK_DIR, Cell, Column, Job, Source, Table,
                               checkpoint, student)
from reproduction.profiles import Model, Profile, Task

PAIRS = {
    'vitl_to_vits': 'ViT-L -> S',
    'vitl_to_vitt': 'ViT-L -> T',
    'deit3l_to_deit3b': 'DeiT-III L -> B',
    'deit3s_to_deit3t': 'DeiT-III S -> T',
}
MODELS = {'vitl': 'ViT-L', 'vits': 'ViT-S', 'vitt': 'ViT-T',
          'deit3l': 'DeiT-III L', 'deit3b': 'DeiT-III B',
          'deit3s': 'DeiT-III S'}
METHODS = {'fitnet': 'FitNet', 'vitkd': 'ViTKD', 'singer': 'SiNGER'}

COLUMNS = {
    'IN': Column('IN top-1'),
    'ADE': Column('ADE mIoU'),
    'NYU': Column('NYU RMSE', higher_is_better=False, digits=4),
    'iNat': Column('iNat top-1'),
    'DS': Column('DS top-1'),
    'FG': Column('FG top-1'),
}

_NO_LOSS = dict(outlier='model.loss_outlier.loss_weight=0',
                info='model.loss_info.loss_weight=0')
ABLATIONS = {
    'random': ('random init', ('model.adapter.init=random',
                               _NO_LOSS['outlier'], _NO_LOSS['info'])),
    'nullspace': ('nullspace init', (_NO_LOSS['outlier'], _NO_LOSS['info'])),
    'outlier': ('+ L_outlier', (_NO_LOSS['info'], )),
    'info': ('+ L_info', (_NO_LOSS['outlier'], )),
    'all': ('all', ()),
}


class Planner:
    """Adds the jobs behind a table's cells.

    Args:
        table (Table): Where jobs go.
        profile (Profile): Recipes, models and data.
        seeds (Sequence[int]): One run each.
        quick (bool): A few steps of everything, to see that it runs.
    """

    def __init__(self, table: Table, profile: Profile, seeds: Sequence[int],
                 quick: bool) -> None:
        self.table, self.profile = table, profile
        self.seeds, self.quick = list(seeds), quick

    def cells(self, columns: Sequence[str],
              values: Optional[Sequence[Optional[float]]],
              evaluate: Callable[[Task, int], str],
              tasks: Optional[Dict[str, Tuple[Task, ...]]] = None
              ) -> List[Cell]:
        """One cell for each column of linear evaluation, by the profile's
        tasks unless others are given."""
        tasks = tasks or self.profile.tasks
        return [
            Cell(tuple(
                tuple(Source(evaluate(task, seed), task.metric)
                      for task in tasks[column])
                for seed in self.seeds), value)
            for column, value in zip(columns, values or [None] * len(columns))
        ]

    def measured(self, job: Callable[[int], str], metrics: Iterable[str],
                 values: Optional[Sequence[float]]) -> List[Cell]:
        """One cell for each metric of a job."""
        metrics = list(metrics)
        return [
            Cell(tuple((Source(job(seed), metric), ) for seed in self.seeds),
                 value)
            for metric, value in zip(metrics, values or [None] * len(metrics))
        ]

    def distil(self, recipe: str, seed: int, method: str, pair: str,
               name: str = '', options: Sequence[str] = ()) -> str:
        """Distil a student; returns the job's name."""
        config = self.profile.path(recipe, method=method, pair=pair)
        extra = [*options]
        needed = self.profile.teacher_needs.get(pair)
        if needed:
            extra.append('model.teacher.checkpoint='
                         + checkpoint(self.train(needed, seed)))
        stem = os.path.splitext(os.path.basename(config))[0]
        return self._training(
            f'{stem}{"-" + name if name else ""}/seed{seed}/distil', config,
            seed, extra)

    def ablation(self, key: str, seed: int) -> str:
        """Distil one of :data:`ABLATIONS`; returns the job's name."""
        return self.distil(
            self.profile.ablation, seed, 'singer', self.profile.ablation_pair,
            '' if key == 'all' else f'only_{key}', ABLATIONS[key][1])

    def train(self, model: str, seed: int) -> str:
        """Train a model on labels; returns the job's name."""
        config = self.profile.path(self.profile.models[model].config)
        return self._training(f'{model}/seed{seed}/train', config, seed)

    def _training(self, name: str, config: str, seed: int,
                  options: Sequence[str] = ()) -> str:
        quick = self.profile.quick if self.quick else ()
        return self.table.add_job(Job(
            name, 'train.py',
            (config, '--work-dir', WORK_DIR, '--resume'), config, seed,
            (f'randomness.seed={seed}', *options, *quick)))

    def evaluate_student(self, distilled: str, task: Task, seed: int) -> str:
        """Linear evaluation of a distilled student; returns the job's name.

        Args:
            distilled (str): The job that distils it.
            task (Task): The evaluation.
            seed (int): Its seed.
        """
        job = self.table.jobs[distilled]
        return self.evaluate(os.path.dirname(distilled), job.config,
                             (student(distilled), ), task,
                             seed)

    def evaluate_model(self, key: str, task: Task, seed: int) -> str:
        """Linear evaluation of a model as it is; returns the job's name."""
        model: Model = self.profile.models[key]
        weights: Tuple[str, ...] = ('--teacher', )
        if model.trained:
            weights = (checkpoint(self.train(key, seed)), )
        return self.evaluate(f'{key}/seed{seed}',
                             self.profile.path(model.config), weights, task,
                             seed)

    def evaluate(self, folder: str, source: str,
                 weights: Tuple[str, ...], task: Task, seed: int) -> str:
        """Linear evaluation; returns the job's name.

        Args:
            folder (str): In which the job's work dir is.
            source (str): Config of the model.
            weights (tuple): Arguments that say which weights.
            task (Task): The evaluation.
            seed (int): Its seed.
        """
        config = self.profile.path(task.config)
        name = os.path.splitext(os.path.basename(config))[0]
        quick = self.profile.quick_task if self.quick else ()
        if task.target is not None:
            return self.table.add_job(Job(
                f'{folder}/{name}-{task.metric}', 'explained_variance.py',
                (config, source, *weights, self.profile.path(task.target),
                 '--out', f'{WORK_DIR}/metrics.json'), config, seed,
                (*task.options, *quick)))
        args: List[str] = [config, source, *weights, '--work-dir',
                                WORK_DIR, '--seed', str(seed)]
        if task.head is not None:
            head = Task(task.head, task.metric)
            args += ['--head', checkpoint(self.evaluate(
                folder, source, weights, head, seed))]
        else:
            args.append('--resume')
        return self.table.add_job(Job(
            f'{folder}/{name}', 'linear_eval.py', tuple(args), config, seed,
            (*task.options, *quick)))

    def measure(self, distilled: str, *metrics: str) -> str:
        """Tables 3 to 8 on a distilled pair; returns the job's name."""
        job = self.table.jobs[distilled]
        images = 8 if self.quick else self.profile.images
        return self.table.add_job(Job(
            f'{os.path.dirname(distilled)}/measure_{"_".join(metrics)}',
            'measure.py',
            (job.config, checkpoint(distilled), '--out',
             f'{WORK_DIR}/metrics.json', '--images', str(images), '--seed',
             str(job.seed), '--metrics', *metrics), job.config, job.seed,
            job.options))

    def of_singer(self, metric: str) -> Callable[[int], str]:
        """From a seed to the job that measures ViT-L and ViT-S."""
        return lambda seed: self.measure(self.distil(
            self.profile.recipe, seed, 'singer', 'vitl_to_vits'), metric)


def table1(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """All pairs and methods by linear evaluation."""
    columns = published.TABLE_1_COLUMNS
    table = Table('table1', 'Table 1: linear evaluation', profile.data,
                  [COLUMNS[c] for c in columns])
    plan = Planner(table, profile, seeds, quick)
    for key, title in MODELS.items():
        table.add_row(f'{title}, as it is', plan.cells(
            columns, published.TABLE_1_MODELS[key],
            lambda task, seed: plan.evaluate_model(key, task, seed)))
    for (pair, method), values in published.TABLE_1_DISTILLED.items():
        table.add_row(f'{PAIRS[pair]}, {METHODS[method]}', plan.cells(
            columns, values, lambda task, seed: plan.evaluate_student(
                plan.distil(profile.recipe, seed, method, pair), task, seed)))
    if not profile.patch_pairs:
        return table
    teacher = f'{MODELS["vitl"]} (patches)'
    table.caption += (
        f' Rows {teacher} are for students without a CLS token: by the mean '
        'patch token instead, and depth from patch tokens alone. Compare them '
        'with one another.')
    table.add_row(f'{teacher}, as it is', plan.cells(
        columns, None, lambda task, seed: plan.evaluate_model(
            'vitl', task, seed), profile.patch_tasks))
    for pair, label in profile.patch_pairs.items():
        for method in ('fitnet', 'singer'):
            row = f'{teacher} -> {label}, {METHODS[method]}'
            table.add_row(row, plan.cells(
                columns, None, lambda task, seed: plan.evaluate_student(
                    plan.distil(profile.recipe, seed, method, pair), task,
                    seed), profile.patch_tasks))
    return table


def table3(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """How much refinement turns the tokens."""
    table = Table(
        'table3', 'Table 3: cosine between teacher and refined tokens',
        'F against F_hat at the distilled layer, and both after the next '
        f'block. {profile.data}',
        [Column('cosine', higher_is_better=None, digits=4)])
    plan = Planner(table, profile, seeds, quick)
    layer = profile.layers[0]
    for label, metric, value in (
            (f'layer {layer}', 'refined', published.TABLE_3['refined']),
            (f'layer {layer + 1}', 'next_block', published.TABLE_3['next'])):
        table.add_row(label, plan.measured(
            plan.of_singer('cosine'), [f'cosine/{layer}/{metric}/mean'],
            [value]))
    return table


def table4(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Initialisation and losses, one at a time."""
    columns = ('IN', 'ADE', 'NYU')
    table = Table(
        'table4', 'Table 4: initialisation and losses',
        'The paper trains on a subset of ImageNet that it does not name; the '
        f'full profile takes a random tenth. {profile.data}',
        [COLUMNS[c] for c in columns])
    plan = Planner(table, profile, seeds, quick)
    for key, (title, _) in ABLATIONS.items():
        table.add_row(title, plan.cells(
            columns, published.TABLE_4[key],
            lambda task, seed: plan.evaluate_student(
                plan.ablation(key, seed), task, seed)))
    return table


def table5a(profile: Profile, seeds: Sequence[int], quick: bool = False
            ) -> Table:
    """Where the trained adapters lie."""
    table = Table(
        'table5a', 'Table 5a: energy of the trained adapters',
        'Share of Frobenius energy among the 25 % of left singular directions '
        'with the largest (E_prob) and smallest (E_safe) singular values; '
        f'random: trained from a random start. {profile.data}',
        [Column('E_prob', higher_is_better=False, digits=4),
         Column('E_safe', higher_is_better=True, digits=4)])
    plan = Planner(table, profile, seeds, quick)
    layers = dict(intermediate=profile.layers[0], last=profile.layers[1])
    starts = dict(random=('model.adapter.init=random', ), nullspace=())
    for (start, matrix, which), values in published.TABLE_5A.items():
        layer = layers[which]
        table.add_row(
            f'{matrix}-projection, layer {layer}, {start} start',
            plan.measured(
                lambda seed: plan.measure(plan.distil(
                    profile.ablation, seed, 'singer', profile.ablation_pair,
                    '' if start == 'nullspace' else 'random_start',
                    starts[start]), 'nullspace'),
                [f'nullspace/{layer}/{matrix}/{e}'
                 for e in ('e_prob', 'e_safe')], values))
    return table


def table5b(profile: Profile, seeds: Sequence[int], quick: bool = False
            ) -> Table:
    """What L_info does to the Gram matrices."""
    table = Table(
        'table5b', 'Table 5b: distance of Gram matrices, D_G',
        'Of the patch tokens at the last distilled layer, mean over images. '
        f'{profile.data}',
        [Column('teacher to refined', higher_is_better=False),
         Column('teacher to student', higher_is_better=False)])
    plan = Planner(table, profile, seeds, quick)
    layer = profile.layers[1]
    for key, title in (('outlier', 'L_outlier alone'),
                       ('all', '+ L_info')):
        table.add_row(title, plan.measured(
            lambda seed: plan.measure(plan.ablation(key, seed), 'gram'),
            [f'gram/{layer}/teacher_refined/mean',
             f'gram/{layer}/teacher_student/mean'],
            published.TABLE_5B[key]))
    return table


def table7(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Where in the teacher's blocks norms grow."""
    table = Table(
        'table7', 'Table 7: norm inflation in the teacher',
        f'Patch tokens of all blocks. {profile.data}',
        [Column(name, higher_is_better=None, digits=4)
         for name in ('mean', 'median', 'p95')])
    plan = Planner(table, profile, seeds, quick)
    for key, values in published.TABLE_7.items():
        table.add_row(key, plan.measured(
            plan.of_singer('inflation'),
            [f'inflation/all/{key.lower()}/{statistic}'
             for statistic in ('mean', 'median', 'p95')], values))
    return table


def table8(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Null directions of the FFN alone against those of the whole block."""
    table = Table(
        'table8', 'Table 8: output deviation under perturbation',
        'Output of the next block when its input moves along null directions '
        'of its linearised FFN, or of its full Jacobian. '
        f'{profile.data}',
        [Column('linearised FFN', higher_is_better=None, digits=4),
         Column('full Jacobian', higher_is_better=None, digits=4)])
    plan = Planner(table, profile, seeds, quick)
    layer = profile.layers[0]
    for key, values in published.TABLE_8.items():
        table.add_row(key, plan.measured(
            plan.of_singer('deviation'),
            [f'deviation/{layer}/{estimate}/{key}/mean'
             for estimate in ('ours', 'jacobian')], values))
    return table


def sweep(profile: Profile, seeds: Sequence[int], quick: bool = False
          ) -> Table:
    """Rank against quantile."""
    table = Table(
        'sweep', 'Rank and quantile',
        'NYU RMSE of the student. The paper shows this as a figure: the '
        f'optima are near its defaults, rank 16 and 0.95. {profile.data}',
        [Column(f'quantile {quantile}', higher_is_better=False, digits=4)
         for quantile in profile.quantiles])
    plan = Planner(table, profile, seeds, quick)
    for rank in profile.ranks:
        cells: List[Cell] = []
        for quantile in profile.quantiles:
            cells += plan.cells(('NYU', ), None, lambda task, seed:
                                plan.evaluate_student(plan.distil(
                                    profile.ablation, seed, 'singer',
                                    profile.ablation_pair,
                                    f'rank{rank}_quantile{quantile}',
                                    (f'model.adapter.rank={rank}',
                                     'model.loss_outlier.quantile='
                                     f'{quantile}')), task, seed))
        table.add_row(f'rank {rank}', cells)
    return table
