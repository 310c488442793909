"""The tables of the paper as plans of jobs."""
import os
from itertools import zip_longest
from typing import Any, Callable, Iterable, List, Sequence, Tuple

from reproduction import published
from reproduction.plan import (WORK_DIR, Cell, Column, Job, Source, Table,
                               checkpoint, student)
from reproduction.profiles import Profile, Task

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


class Planner(Table):
    """A table that adds the jobs behind its cells.

    Args:
        profile (Profile): Recipes, models and data.
        seeds (Sequence[int]): One run each.
        quick (bool): A few steps of everything, to see that it runs.
        *shown: Name, title, caption and columns, see :class:`Table`.
    """

    def __init__(self, profile: Profile, seeds: Sequence[int], quick: bool,
                 *shown: Any) -> None:
        super().__init__(*shown)
        self.profile, self.seeds, self.quick = profile, list(seeds), quick

    def cells(self, tasks: Iterable[Tuple[Task, ...]],
              evaluate: Callable[[Task, int], str],
              values: Sequence[float] = ()) -> List[Cell]:
        """One cell for each column of linear evaluation, from the tasks whose
        mean it shows, the job of a task and seed, and what is published."""
        return [Cell(tuple(tuple(Source(evaluate(task, seed), task.metric)
                                 for task in members) for seed in self.seeds),
                     value) for members, value in zip_longest(tasks, values)]

    def measured(self, job: Callable[[int], str], metrics: Iterable[str],
                 values: Sequence[float]) -> List[Cell]:
        """One cell for each metric of a job."""
        return [
            Cell(tuple((Source(job(seed), metric), ) for seed in self.seeds),
                 value) for metric, value in zip(metrics, values)]

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
        return self.add_job(Job(
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
        job = self.jobs[distilled]
        return self.evaluate(os.path.dirname(distilled), job.config,
                             (student(distilled), ), task,
                             seed)

    def evaluate_model(self, key: str, task: Task, seed: int) -> str:
        """Linear evaluation of a model as it is; returns the job's name."""
        model = self.profile.models[key]
        weights = checkpoint(self.train(key, seed)) if model.trained \
            else '--teacher'
        return self.evaluate(f'{key}/seed{seed}',
                             self.profile.path(model.config), (weights, ),
                             task, seed)

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
            return self.add_job(Job(
                f'{folder}/{name}-{task.metric}', 'explained_variance.py',
                (config, source, *weights, self.profile.path(task.target),
                 '--out', f'{WORK_DIR}/metrics.json'), config, seed,
                (*task.options, *quick)))
        start: Tuple[str, ...] = ('--resume', )
        if task.head is not None:
            start = ('--head', checkpoint(self.evaluate(
                folder, source, weights, Task(task.head, task.metric), seed)))
        return self.add_job(Job(
            f'{folder}/{name}', 'linear_eval.py',
            (config, source, *weights, '--work-dir', WORK_DIR, '--seed',
             str(seed), *start), config, seed, (*task.options, *quick)))

    def measure(self, distilled: str, *metrics: str) -> str:
        """Tables 3 to 8 on a distilled pair; returns the job's name."""
        job = self.jobs[distilled]
        images = 8 if self.quick else self.profile.images
        return self.add_job(Job(
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
    plan = Planner(profile, seeds, quick, 'table1',
                   'Table 1: linear evaluation', profile.data,
                   [COLUMNS[c] for c in published.TABLE_1_COLUMNS])
    tasks = [profile.tasks[c] for c in published.TABLE_1_COLUMNS]

    def as_it_is(key: str) -> Callable[[Task, int], str]:
        return lambda task, seed: plan.evaluate_model(key, task, seed)

    def distilled(pair: str, method: str) -> Callable[[Task, int], str]:
        return lambda task, seed: plan.evaluate_student(plan.distil(
            profile.recipe, seed, method, pair), task, seed)

    for key, title in MODELS.items():
        plan.add_row(f'{title}, as it is', plan.cells(
            tasks, as_it_is(key), published.TABLE_1_MODELS[key]))
    for (pair, method), values in published.TABLE_1_DISTILLED.items():
        plan.add_row(f'{PAIRS[pair]}, {METHODS[method]}', plan.cells(
            tasks, distilled(pair, method), values))
    if not profile.patch_pairs:
        return plan
    tasks = [profile.patch_tasks[c] for c in published.TABLE_1_COLUMNS]
    teacher = f'{MODELS["vitl"]} (patches)'
    plan.caption += (
        f' Rows {teacher} are for students without a CLS token: by the mean '
        'patch token instead, and depth from patch tokens alone. Compare them '
        'with one another.')
    plan.add_row(f'{teacher}, as it is', plan.cells(tasks, as_it_is('vitl')))
    for pair, label in profile.patch_pairs.items():
        for method in ('fitnet', 'singer'):
            plan.add_row(f'{teacher} -> {label}, {METHODS[method]}',
                         plan.cells(tasks, distilled(pair, method)))
    return plan


def table3(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """How much refinement turns the tokens."""
    plan = Planner(
        profile, seeds, quick, 'table3',
        'Table 3: cosine between teacher and refined tokens',
        'F against F_hat at the distilled layer, and both after the next '
        f'block. {profile.data}',
        [Column('cosine', higher_is_better=None, digits=4)])
    layer = profile.layers[0]
    for after, metric, key in ((layer, 'refined', 'refined'),
                               (layer + 1, 'next_block', 'next')):
        plan.add_row(f'layer {after}', plan.measured(
            plan.of_singer('cosine'), [f'cosine/{layer}/{metric}/mean'],
            [published.TABLE_3[key]]))
    return plan


def table4(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Initialisation and losses, one at a time."""
    columns = ('IN', 'ADE', 'NYU')
    plan = Planner(
        profile, seeds, quick, 'table4', 'Table 4: initialisation and losses',
        'The paper trains on a subset of ImageNet that it does not name; the '
        f'full profile takes a random tenth. {profile.data}',
        [COLUMNS[c] for c in columns])
    for key, (title, _) in ABLATIONS.items():
        plan.add_row(title, plan.cells(
            [profile.tasks[c] for c in columns],
            lambda task, seed: plan.evaluate_student(
                plan.ablation(key, seed), task, seed),
            published.TABLE_4[key]))
    return plan


def table5a(profile: Profile, seeds: Sequence[int], quick: bool = False
            ) -> Table:
    """Where the trained adapters lie."""
    plan = Planner(
        profile, seeds, quick, 'table5a',
        'Table 5a: energy of the trained adapters',
        'Share of Frobenius energy among the 25 % of left singular directions '
        'with the largest (E_prob) and smallest (E_safe) singular values; '
        f'random: trained from a random start. {profile.data}',
        [Column('E_prob', higher_is_better=False, digits=4),
         Column('E_safe', higher_is_better=True, digits=4)])
    layers = dict(intermediate=profile.layers[0], last=profile.layers[1])
    starts = dict(random=('random_start', ('model.adapter.init=random', )),
                  nullspace=('', ()))
    for (start, matrix, which), values in published.TABLE_5A.items():
        layer = layers[which]
        plan.add_row(
            f'{matrix}-projection, layer {layer}, {start} start',
            plan.measured(
                lambda seed: plan.measure(plan.distil(
                    profile.ablation, seed, 'singer', profile.ablation_pair,
                    *starts[start]), 'nullspace'),
                [f'nullspace/{layer}/{matrix}/{e}'
                 for e in ('e_prob', 'e_safe')], values))
    return plan


def table5b(profile: Profile, seeds: Sequence[int], quick: bool = False
            ) -> Table:
    """What L_info does to the Gram matrices."""
    plan = Planner(
        profile, seeds, quick, 'table5b',
        'Table 5b: distance of Gram matrices, D_G',
        'Of the patch tokens at the last distilled layer, mean over images. '
        f'{profile.data}',
        [Column('teacher to refined', higher_is_better=False),
         Column('teacher to student', higher_is_better=False)])
    for key, title in (('outlier', 'L_outlier alone'), ('all', '+ L_info')):
        plan.add_row(title, plan.measured(
            lambda seed: plan.measure(plan.ablation(key, seed), 'gram'),
            [f'gram/{profile.layers[1]}/teacher_{other}/mean'
             for other in ('refined', 'student')], published.TABLE_5B[key]))
    return plan


def table7(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Where in the teacher's blocks norms grow."""
    statistics = ('mean', 'median', 'p95')
    plan = Planner(
        profile, seeds, quick, 'table7',
        'Table 7: norm inflation in the teacher',
        f'Patch tokens of all blocks. {profile.data}',
        [Column(s, higher_is_better=None, digits=4) for s in statistics])
    for key, values in published.TABLE_7.items():
        plan.add_row(key, plan.measured(
            plan.of_singer('inflation'),
            [f'inflation/all/{key.lower()}/{s}' for s in statistics], values))
    return plan


def table8(profile: Profile, seeds: Sequence[int], quick: bool = False
           ) -> Table:
    """Null directions of the FFN alone against those of the whole block."""
    plan = Planner(
        profile, seeds, quick, 'table8',
        'Table 8: output deviation under perturbation',
        'Output of the next block when its input moves along null directions '
        'of its linearised FFN, or of its full Jacobian. '
        f'{profile.data}',
        [Column('linearised FFN', higher_is_better=None, digits=4),
         Column('full Jacobian', higher_is_better=None, digits=4)])
    for key, values in published.TABLE_8.items():
        plan.add_row(key, plan.measured(
            plan.of_singer('deviation'),
            [f'deviation/{profile.layers[0]}/{estimate}/{key}/mean'
             for estimate in ('ours', 'jacobian')], values))
    return plan


def sweep(profile: Profile, seeds: Sequence[int], quick: bool = False
          ) -> Table:
    """Rank against quantile."""
    plan = Planner(
        profile, seeds, quick, 'sweep', 'Rank and quantile',
        'NYU RMSE of the student. The paper shows this as a figure: the '
        f'optima are near its defaults, rank 16 and 0.95. {profile.data}',
        [Column(f'quantile {quantile}', higher_is_better=False, digits=4)
         for quantile in profile.quantiles])
    for rank in profile.ranks:
        plan.add_row(f'rank {rank}', [
            cell for quantile in profile.quantiles for cell in plan.cells(
                [profile.tasks['NYU']],
                lambda task, seed: plan.evaluate_student(plan.distil(
                    profile.ablation, seed, 'singer', profile.ablation_pair,
                    f'rank{rank}_quantile{quantile}',
                    (f'model.adapter.rank={rank}',
                     f'model.loss_outlier.quantile={quantile}')),
                    task, seed))])
    return plan
