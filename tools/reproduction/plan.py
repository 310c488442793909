"""What a table consists of: jobs to run, and cells that read their results."""
import re
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, Optional, Tuple

WORK_DIR = '{work_dir}'  # in a job's arguments: its own work dir
_CHECKPOINT = re.compile(r'\{(checkpoint|student):(.+?)\}')


def checkpoint(job: str) -> str:
    """In a job's arguments: the last checkpoint of another job."""
    return f'{{checkpoint:{job}}}'


def student(job: str) -> str:
    """In a job's arguments: another job's last student-only checkpoint."""
    return f'{{student:{job}}}'


@dataclass(frozen=True)
class Job:
    """One command, with a work dir of its own.

    Attributes:
        name (str): Unique; also the work dir below the root.
        tool (str): Script in tools/, such as ``'train.py'``.
        args (tuple[str]): Its arguments, in which :data:`WORK_DIR`,
            :func:`checkpoint` and :func:`student` stand for paths.
        config (str): The config that it is about.
        seed (int): Its seed.
        options (tuple[str]): Of ``--cfg-options``. Defaults to none.
    """
    name: str
    tool: str
    args: Tuple[str, ...]
    config: str
    seed: int
    options: Tuple[str, ...] = ()

    @property
    def needs(self) -> List[str]:
        """Names of the jobs that have to be finished before."""
        return sorted({job for argument in (*self.args, *self.options)
                       for _, job in _CHECKPOINT.findall(argument)})

    def arguments(self, work_dir: str, path: Callable[[str, bool], str]
                  ) -> List[str]:
        """Arguments of the command, with paths filled in.

        Args:
            work_dir (str): The job's work dir.
            path (Callable): From a job's name, and whether the student alone
                is meant, to the path of its last checkpoint.

        Returns:
            list[str]: The arguments.
        """
        options = ('--cfg-options', *self.options) if self.options else ()
        return [_CHECKPOINT.sub(
            lambda match: path(match[2], match[1] == 'student'),
            argument.replace(WORK_DIR, work_dir))
            for argument in (*self.args, *options)]


@dataclass(frozen=True)
class Source:
    """Where a figure is read.

    Attributes:
        job (str): The job's name.
        metric (str): Name among the job's metrics.
        scale (float): Factor. Defaults to 1.
    """
    job: str
    metric: str
    scale: float = 1.


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    Attributes:
        sources (tuple[tuple[Source, ...], ...]): For each seed the members
            that are averaged (the data sets of a group).
        published (float, optional): The paper's.
    """
    sources: Tuple[Tuple[Source, ...], ...]
    published: Optional[float] = None

    @property
    def all_sources(self) -> List[Source]:
        """All seeds' results, in order."""
        return [source for members in self.sources for source in members]


@dataclass(frozen=True)
class Column:
    """Heading of a column, and which way is better (None: neither)."""
    title: str
    higher_is_better: Optional[bool] = True
    digits: int = 2


@dataclass
class Table:
    """A table of the paper, or of ours.

    Attributes:
        name (str): ``'table1'``, …
        title (str): What it shows.
        caption (str): The data and settings.
        columns (list[Column]): Of the figures.
        rows (list[tuple[str, list[Cell]]]): Label and cells.
        jobs (dict[str, Job]): All jobs by name, each after those it needs.
        conclude (Callable, optional): From the mean and std of each cell,
            ``{(row, column): Result}``, to lines of Markdown below the table.
        data (Callable, optional): From the same to what is written beside the
            report as JSON.
    """
    name: str
    title: str
    caption: str
    columns: List[Column]
    rows: List[Tuple[str, List[Cell]]] = field(default_factory=list)
    jobs: Dict[str, Job] = field(default_factory=dict)
    conclude: Optional[Callable[[dict], List[str]]] = None
    data: Optional[Callable[[dict], dict]] = None

    def add_job(self, job: Job) -> str:
        """Add a job unless it is there already; returns its name."""
        known = self.jobs.setdefault(job.name, job)
        if known != job:
            raise ValueError(f'two different jobs are called {job.name!r}')
        return job.name

    def add_row(self, label: str, cells: Iterable[Cell]) -> None:
        """Add a row; there is one cell for each column."""
        cells = list(cells)
        if len(cells) != len(self.columns):
            raise ValueError(f'{label}: {len(cells)} cells for '
                             f'{len(self.columns)} columns')
        self.rows.append((label, cells))


def all_jobs(tables: Iterable[Table]) -> Dict[str, Job]:
    """The jobs of several tables by name; those that they share, once."""
    together = Table('', '', '', [])
    for table in tables:
        for job in table.jobs.values():
            together.add_job(job)
    return together.jobs


def wanted_metrics(tables: Iterable[Table]) -> Dict[str, List[str]]:
    """What the cells of tables read: names of metrics by job."""
    wanted: Dict[str, Dict[str, None]] = {}
    for table in tables:
        for _, cells in table.rows:
            for source in (s for cell in cells for s in cell.all_sources):
                wanted.setdefault(source.job, {})[source.metric] = None
    return {job: list(metrics) for job, metrics in wanted.items()}
