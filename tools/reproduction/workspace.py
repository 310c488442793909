"""The folder in which planned jobs run, and what is known of them there."""
import contextlib
import glob
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import Dict, List, Optional

from reproduction.plan import Job

RECORD = 'job.json'
FINISHED = 'finished'  # names the run; Snakemake waits for it


@dataclass
class Record:
    """What is known of a job, kept in its work dir.

    Attributes:
        status (str): ``'running'``, ``'finished'`` or ``'failed'``. A job
            that is no longer running, but says so, was interrupted.
        config (str): The config file.
        seed (int): The seed.
        command (str): As run, from the repository's root.
        commit (str): Of the repository; ``+`` after it: with changes.
        log (str): The log file of the run.
        seconds (float): How long it took.
        metrics (dict[str, float]): The last value of each, by name.
        error (str): The last error of a failed job.
        made_of (str): Stands for the command, the configs and the runs whose
            results it took.
    """
    status: str
    config: str
    seed: int
    command: str = ''
    commit: str = ''
    log: str = ''
    seconds: float = 0.
    metrics: Dict[str, float] = field(default_factory=dict)
    error: str = ''
    made_of: str = ''


class Workspace:
    """The folder that holds the work dirs of all jobs.

    Args:
        root (str): The folder.
        jobs (dict[str, Job]): By name, each after those that it needs.
        metrics (dict[str, list[str]], optional): Names of the metrics that
            a job must have logged to count as finished. Defaults to None.
    """

    def __init__(self, root: str, jobs: Dict[str, Job],
                 metrics: Optional[Dict[str, List[str]]] = None) -> None:
        self.root, self.jobs, self.metrics = root, jobs, metrics or {}

    def work_dir(self, name: str) -> str:
        """The work dir of a job."""
        return os.path.join(self.root, name)

    def record(self, name: str) -> Optional[Record]:
        """What is known of a job; None if it never ran."""
        try:
            with open(os.path.join(self.work_dir(name), RECORD)) as file:
                return Record(**json.load(file))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, name: str, record: Record) -> None:
        """Write a record: whole or not at all."""
        path = os.path.join(self.work_dir(name), RECORD)
        with open(path + '.tmp', 'w') as file:
            json.dump(asdict(record), file, indent=2)
        os.replace(path + '.tmp', path)

    def states(self) -> Dict[str, str]:
        """State of each job, by name.

        Returns:
            dict[str, str]: ``'finished'``, ``'failed'``, ``'interrupted'``,
            ``'outdated'`` (its command, its config or what it took from other
            jobs changed since, or it lacks a metric) or ``'new'``.
        """
        found: Dict[str, str] = {}
        contents: Dict[str, str] = {}
        for name, job in self.jobs.items():
            record = self.record(name)
            if record is None:
                found[name] = 'new'
            elif any(found[needed] != 'finished' for needed in job.needs) \
                    or record.made_of != self.made_of(
                        job, fingerprint(job, contents)) \
                    or record.status == 'finished' and \
                    self.lacking(name, record):
                found[name] = 'outdated'
            else:
                found[name] = record.status.replace('running', 'interrupted')
        return found

    def made_of(self, job: Job, command: str) -> str:
        """Stands for a job's command, given by its :func:`fingerprint`, and
        the runs whose results it takes."""
        parts = [command]
        for needed in job.needs:
            with contextlib.suppress(FileNotFoundError), \
                    open(os.path.join(self.work_dir(needed), FINISHED)) as run:
                parts.append(run.read())
        return _digest(*parts)

    def lacking(self, name: str, record: Record) -> List[str]:
        """Metrics that a job must have and its record lacks."""
        return [metric for metric in self.metrics.get(name, ())
                if metric not in record.metrics]

    def arguments(self, name: str) -> List[str]:
        """A job's arguments, with paths filled in."""
        return self.jobs[name].arguments(self.work_dir(name),
                                         self._checkpoint)

    def _checkpoint(self, name: str, student: bool) -> str:
        work_dir = self.work_dir(name)
        suffix = '_student.pth' if student else '.pth'
        try:
            with open(os.path.join(work_dir, 'last_checkpoint')) as file:
                last = os.path.basename(file.read().strip())
        except FileNotFoundError:  # a plan: the job is still to run
            last = 'LAST.pth'
        return os.path.join(work_dir, last.replace('.pth', suffix))


def fingerprint(job: Job, contents: Optional[Dict[str, str]] = None) -> str:
    """Changes with a job's command and what is in its configs, not with
    where these are; ``contents`` keeps what was read for the next one."""
    contents = {} if contents is None else contents
    configs = dict.fromkeys([job.config, *(
        arg for arg in job.args if arg.endswith('.py'))])
    args = [os.path.basename(arg) if arg in configs else arg
            for arg in job.args]
    for path in configs:
        if path not in contents:
            contents[path] = _config_content(path)
    return _digest(job.tool, *args, '--', *job.options,
                   *map(contents.get, configs))


def read_metrics(work_dir: str) -> Dict[str, float]:
    """The last value of each number in the logs of a work dir.

    Args:
        work_dir (str): Of a run through mmengine's runner, or one with a
            ``metrics.json``.

    Returns:
        dict[str, float]: By name; nested ones joined by ``/``.
    """
    metrics: Dict[str, float] = {}
    # The names are times, so that they sort
    for path in sorted(
            path for pattern in ('vis_data/scalars.json', '[0-9]*.json')
            for path in glob.glob(os.path.join(
                glob.escape(work_dir), '*', pattern))):
        with open(path) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    metrics.update(flat(json.loads(line)))
    with contextlib.suppress(FileNotFoundError), \
            open(os.path.join(work_dir, 'metrics.json')) as file:
        metrics.update(flat(json.load(file)))
    return metrics


def flat(values: dict, prefix: str = '') -> Dict[str, float]:
    """Numbers of nested dictionaries and lists, keys and places joined by
    ``/``."""
    found = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found.update(flat(value, f'{prefix}{key}/'))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f'{prefix}{key}'] = float(value)
    return found


def last_error(output: str, code: int) -> str:
    """The line of a job's output file that says best why it failed, and its
    exit code."""
    with open(output, errors='replace') as file:
        lines = [re.sub(r'^\[rank\d+\]: ', '', line.strip())
                 for line in file if line.strip()]
    errors = [line for line in lines if re.match(
        r'[\w.]*(Error|Exception|Interrupt)(: |$)', line)
        and 'ChildFailedError' not in line]  # of torchrun: says nothing
    said = (errors or lines or ['it wrote nothing'])[-1]
    return f'{said[:300]} (exit code {code})'


def _config_content(path: str) -> str:
    """All settings of a config with its bases; the path alone if it cannot
    be read, which its tool will say better."""
    from mmengine.config import Config  # jobs start faster without
    try:
        return json.dumps(Config.fromfile(path).to_dict(), sort_keys=True,
                          default=repr)
    except Exception:
        return path


def _digest(*parts: str) -> str:
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]
