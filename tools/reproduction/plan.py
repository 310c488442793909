"""What a table consists of: jobs to run, and cells that read their results."""
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, Optional, Tuple, Union

from mmsinger.errors import ConfigError


@dataclass(frozen=True)
class Checkpoint:
    """Stands in a job's arguments for the last checkpoint of another job.

    Attributes:
        job (str): The job's name.
        student (bool): The student-only file instead. Defaults to False.
        key (str): Put in front of the path, such as
            ``'model.teacher.checkpoint='``. Defaults to nothing.
    """
    job: str
    student: bool = False
    key: str = ''


@dataclass(frozen=True)
class InWorkDir:
    """Stands in a job's arguments for a path in its own work dir.

    Attributes:
        path (str): Below the work dir; empty: the work dir itself.
    """
    path: str = ''


Argument = Union[str, Checkpoint, InWorkDir]


@dataclass(frozen=True)
class Job:
    """One command, with a work dir of its own.

    Attributes:
        name (str): Unique; also the work dir below the root.
        tool (str): Script in tools/, such as ``'train.py'``.
        args (tuple[str | Checkpoint | InWorkDir]): Its arguments.
        config (str): The config that it is about.
        seed (int): Its seed.
        options (tuple[str | Checkpoint]): Of ``--cfg-options``. Defaults to
            none.
    """
    name: str
    tool: str
    args: Tuple[Argument, ...]
    config: str
    seed: int
    options: Tuple[Argument, ...] = ()

    @property
    def needs(self) -> List[str]:
        """Names of the jobs that have to be finished before."""
        return sorted({a.job for a in self.args + self.options
                       if isinstance(a, Checkpoint)})


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
        jobs (dict[str, Job]): All jobs by name, in a good order.
        conclude (Callable, optional): From the mean and std of each cell,
            ``{(row, column): Result}``, to lines of Markdown below the table.
    """
    name: str
    title: str
    caption: str
    columns: List[Column]
    rows: List[Tuple[str, List[Cell]]] = field(default_factory=list)
    jobs: Dict[str, Job] = field(default_factory=dict)
    conclude: Optional[Callable[[dict], List[str]]] = None

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


def ordered(jobs: Dict[str, Job]) -> List[Job]:
    """Jobs so that each comes after those it needs.

    Args:
        jobs (dict[str, Job]): By name.

    Returns:
        list[Job]: In order.

    Raises:
        ConfigError: If a job needs one that is not there, or itself.
    """
    done: Dict[str, Job] = {}

    def visit(name: str, path: Tuple[str, ...]) -> None:
        if name in path:
            raise ConfigError(f'jobs need each other: {path + (name, )}')
        if name not in jobs:
            raise ConfigError(f'{path[-1]} needs {name}, which is not '
                              'planned.')
        if name not in done:
            for needed in jobs[name].needs:
                visit(needed, path + (name, ))
            done[name] = jobs[name]

    for name in jobs:
        visit(name, ())
    return list(done.values())
