"""Run planned jobs: skip the finished, resume the interrupted, survive the
failed."""
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from mmengine.config import Config
from reproduction import warm
from reproduction.plan import Checkpoint, InWorkDir, Job, ordered

from mmsinger.errors import ConfigError
from mmsinger.paths import tools

RECORD = 'job.json'
OUTPUT = 'output.txt'
SINGLE = ('measure.py', )  # tools that run in one process only


@dataclass
class Record:
    """What is known of a job, kept in its work dir.

    Attributes:
        status (str): ``'running'``, ``'finished'`` or ``'failed'``. A job
            that is no longer running, but says so, was interrupted.
        fingerprint (str): Of its command, its config and the jobs it needs.
        command (str): As run, from the repository's root.
        config (str): The config file.
        seed (int): The seed.
        commit (str): Of the repository; ``+`` after it: with changes.
        log (str): The log file of the run.
        seconds (float): How long it took.
        metrics (dict[str, float]): The last value of each, by name.
        error (str): The last error of a failed job.
        stamp (str): Another one for each time that it was started.
        needs (dict[str, str]): Stamps of the jobs whose results it took.
    """
    status: str
    fingerprint: str
    command: str
    config: str
    seed: int
    commit: str
    log: str = ''
    seconds: float = 0.
    metrics: Dict[str, float] = field(default_factory=dict)
    error: str = ''
    stamp: str = ''
    needs: Dict[str, str] = field(default_factory=dict)


class Workspace:
    """The folder that holds the work dirs of all jobs.

    Args:
        root (str): The folder.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._fingerprints: Dict[Tuple[str, str], str] = {}

    def work_dir(self, job: str) -> str:
        """The work dir of a job."""
        return os.path.join(self.root, job)

    def record(self, job: str) -> Optional[Record]:
        """What is known of a job; None if it never ran."""
        try:
            with open(os.path.join(self.work_dir(job), RECORD)) as file:
                return Record(**json.load(file))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, job: str, record: Record) -> None:
        """Write a record: whole or not at all."""
        path = os.path.join(self.work_dir(job), RECORD)
        with open(path + '.tmp', 'w') as file:
            json.dump(asdict(record), file, indent=2)
        os.replace(path + '.tmp', path)

    def fingerprint(self, job: Job, jobs: Dict[str, Job]) -> str:
        """Changes whenever the job's outcome might."""
        key = (job.name, job.config)
        if key not in self._fingerprints:
            configs = dict.fromkeys([job.config, *(
                arg for arg in job.args
                if isinstance(arg, str) and arg.endswith('.py'))])
            # Where the configs are does not matter, what is in them does
            args = [os.path.basename(arg) if arg in configs else arg
                    for arg in job.args]
            parts = [job.tool, repr(args), repr(job.options),
                     *map(_config_content, configs)]
            parts += [self.fingerprint(jobs[name], jobs)
                      for name in job.needs]
            self._fingerprints[key] = hashlib.sha256(
                '\n'.join(parts).encode()).hexdigest()[:16]
        return self._fingerprints[key]

    def state(self, job: Job, jobs: Dict[str, Job]) -> str:
        """``'finished'``, ``'failed'``, ``'interrupted'``, ``'outdated'``
        (its command, its config or what it took from other jobs changed
        since) or ``'new'``."""
        record = self.record(job.name)
        if record is None:
            return 'new'
        if record.fingerprint != self.fingerprint(job, jobs) or \
                record.needs != self.stamps(job.needs):
            return 'outdated'
        return 'interrupted' if record.status == 'running' \
            else record.status

    def stamps(self, names: Sequence[str]) -> Dict[str, str]:
        """Which runs of these jobs are there; ``''`` for none that is
        finished."""
        records = {name: self.record(name) for name in names}
        return {name: record.stamp
                if record is not None and record.status == 'finished' else ''
                for name, record in records.items()}

    def arguments(self, job: Job) -> List[str]:
        """A job's arguments, with paths filled in."""
        arguments = [*job.args]
        if job.options:
            arguments += ['--cfg-options', *job.options]
        work_dir = self.work_dir(job.name)
        return [
            a.key + self._checkpoint(a) if isinstance(a, Checkpoint) else
            os.path.join(work_dir, a.path).rstrip('/')
            if isinstance(a, InWorkDir) else a for a in arguments]

    def _checkpoint(self, wanted: Checkpoint) -> str:
        work_dir = self.work_dir(wanted.job)
        pointer = os.path.join(work_dir, 'last_checkpoint')
        if not os.path.exists(pointer):  # a plan: the job is still to run
            return os.path.join(work_dir, 'LAST_student.pth'
                                if wanted.student else 'LAST.pth')
        with open(pointer) as file:
            name = os.path.basename(file.read().strip())
        if wanted.student:
            name = name.replace('.pth', '_student.pth')
        return os.path.join(work_dir, name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Refuse a second process on the same folder."""
        try:
            os.makedirs(self.root, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'--root {self.root!r} is no folder that can be '
                              f'written: {error.strerror}. Choose another.'
                              ) from error
        with _locked(os.path.join(self.root, '.lock'),
                     f'{self.root!r} is in use by another '
                     'tools/reproduce.py. Wait for it, or choose another '
                     '--root.'):
            yield


@dataclass
class Resources:
    """What jobs run on.

    Attributes:
        jobs (int): How many at once.
        gpus (tuple[str, ...]): Identifiers; empty: the CPU.
        gpus_per_job (int): How many GPUs one job gets. Defaults to 1.
        srun (str, optional): Arguments of ``srun``, such as ``'-p gpu
            --gres=gpu:8 --ntasks=8'``; jobs then run through slurm, which
            deals out the GPUs. Defaults to None.
    """
    jobs: int
    gpus: Tuple[str, ...] = ()
    gpus_per_job: int = 1
    srun: Optional[str] = None

    def slots(self) -> List[Tuple[str, ...]]:
        """The GPUs of each job that can run at the same time."""
        if not self.gpus or self.srun is not None:
            return [()] * self.jobs
        groups = [self.gpus[i:i + self.gpus_per_job] for i in range(
            0, len(self.gpus) - self.gpus_per_job + 1, self.gpus_per_job)]
        if not groups:
            raise ConfigError(
                f'--gpus-per-job {self.gpus_per_job}: there are only '
                f'{len(self.gpus)} GPUs ({", ".join(self.gpus)}).')
        return [groups[i % len(groups)] for i in range(self.jobs)]

    @contextlib.contextmanager
    def reserve(self) -> Iterator[None]:
        """Keep other tools/reproduce.py off these GPUs."""
        with contextlib.ExitStack() as stack:
            for gpu in self.gpus if self.srun is None else ():
                stack.enter_context(_locked(
                    os.path.join(tempfile.gettempdir(),
                                 f'mmsinger_gpu_{os.getuid()}_{gpu}.lock'),
                    f'GPU {gpu} is in use by another tools/reproduce.py. '
                    'Name free ones with --gpus, or wait.'))
            yield


def run_jobs(jobs: Dict[str, Job], workspace: Workspace,
             resources: Resources, say=print) -> Dict[str, Record]:
    """Run what is not finished yet.

    A failed job does not stop the others, only those that need it.

    Args:
        jobs (dict[str, Job]): By name.
        workspace (Workspace): Where they run.
        resources (Resources): On what.
        say (Callable): Called with a line on each start and end.

    Returns:
        dict[str, Record]: Of each job; one that could not start, since
        another failed, is ``'failed'`` too.
    """
    waiting = {}
    records: Dict[str, Record] = {}
    for job in ordered(jobs):
        if workspace.state(job, jobs) == 'finished':
            records[job.name] = workspace.record(job.name)
        else:
            waiting[job.name] = job
    say(f'{len(jobs)} jobs: {len(records)} are finished, {len(waiting)} to '
        'run')
    free = resources.slots()
    running: Dict[str, _Running] = {}
    try:
        while waiting or running:
            for name, job in list(waiting.items()):
                broken = [n for n in job.needs if n in records
                          and records[n].status == 'failed']
                if broken:
                    del waiting[name]
                    records[name] = Record(
                        'failed', '', '', job.config, job.seed, '',
                        error=f'not run: {broken[0]} failed')
                elif free and all(n in records for n in job.needs):
                    del waiting[name]
                    running[name] = _Running(
                        job, jobs, workspace, resources, free.pop(0))
                    say(f'start  {name}')
            for name, process in list(running.items()):
                record = process.poll()
                if record is not None:
                    records[name] = record
                    free.append(running.pop(name).gpus)
                    say(_summary(len(records), len(jobs), name, record))
            if running:
                time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
    return records


def _summary(done: int, total: int, name: str, record: Record) -> str:
    return f'[{done}/{total}] {record.status} {name} ' \
        f'({record.seconds:.0f} s)' + (
            f': {record.error}' if record.status == 'failed' else '')


class _Running:
    """A job in a process of its own."""

    def __init__(self, job: Job, jobs: Dict[str, Job], workspace: Workspace,
                 resources: Resources, gpus: Tuple[str, ...]) -> None:
        self.job, self.workspace, self.gpus = job, workspace, gpus
        work_dir = workspace.work_dir(job.name)
        if workspace.state(job, jobs) == 'outdated':
            _set_aside(work_dir)
        os.makedirs(work_dir, exist_ok=True)
        arguments = workspace.arguments(job)
        script = os.path.join(tools(), job.tool)
        command = command_of(script, arguments, resources, gpus)
        self.record = Record(
            'running', workspace.fingerprint(job, jobs), shlex.join(command),
            job.config, job.seed, _commit(), stamp=uuid.uuid4().hex,
            needs=workspace.stamps(job.needs))
        workspace.save(job.name, self.record)
        self.output = os.path.join(work_dir, OUTPUT)
        self.begin = time.monotonic()
        is_script = command[1] == script and not gpus
        self.process = warm.start(
            command[1:] if is_script else command, self.output, is_script,
            _environment(resources, gpus))

    def poll(self) -> Optional[Record]:
        """The record once the job has ended."""
        if self.process.is_alive():
            return None
        self.process.join()
        work_dir = self.workspace.work_dir(self.job.name)
        record = self.record
        record.seconds = round(time.monotonic() - self.begin, 1)
        record.log = _newest(os.path.join(work_dir, '*', '*.log')) or \
            self.output
        if self.process.exitcode == 0:
            record.status = 'finished'
            record.metrics = read_metrics(work_dir)
        else:
            record.status = 'failed'
            record.error = _last_error(self.output, self.process.exitcode)
        self.workspace.save(self.job.name, record)
        return record

    def kill(self) -> None:
        """End the job and what it started."""
        warm.kill(self.process)


def command_of(script: str, arguments: Sequence[str], resources: Resources,
               gpus: Tuple[str, ...]) -> List[str]:
    """What starts a job.

    Args:
        script (str): The tool.
        arguments (Sequence[str]): Its arguments.
        resources (Resources): What it runs on.
        gpus (tuple[str, ...]): The job's own.

    Returns:
        list[str]: Program and arguments.
    """
    single = os.path.basename(script) in SINGLE
    if resources.srun is not None:
        # Of two --ntasks srun takes the last
        return ['srun', *shlex.split(resources.srun),
                *(['--ntasks=1'] if single else []),
                sys.executable, '-u', script, *arguments,
                *([] if single else ['--launcher', 'slurm'])]
    if len(gpus) > 1 and not single:
        return [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={len(gpus)}', script, *arguments,
                '--launcher', 'pytorch']
    return [sys.executable, script, *arguments]


def _environment(resources: Resources, gpus: Tuple[str, ...]
                 ) -> Dict[str, str]:
    if resources.srun is not None:
        return {}
    threads = max(1, len(os.sched_getaffinity(0)) // resources.jobs)
    return dict(CUDA_VISIBLE_DEVICES=','.join(gpus),
                OMP_NUM_THREADS=str(threads))


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
            glob.glob(os.path.join(work_dir, '*', 'vis_data', 'scalars.json'))
            + glob.glob(os.path.join(work_dir, '*', '[0-9]*.json'))):
        with open(path) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    metrics.update(_flat(json.loads(line)))
    path = os.path.join(work_dir, 'metrics.json')
    if os.path.exists(path):
        with open(path) as file:
            metrics.update(_flat(json.load(file)))
    return metrics


def _flat(values: dict, prefix: str = '') -> Dict[str, float]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f'{prefix}{key}/'))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f'{prefix}{key}'] = float(value)
    return found


def _last_error(output: str, code: Optional[int]) -> str:
    """The line of a job's output that says best why it failed."""
    try:
        with open(output, errors='replace') as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        lines = []
    lines = [re.sub(r'^\[rank\d+\]: ', '', line) for line in lines]
    errors = [line for line in lines if re.match(
        r'[\w.]*(Error|Exception|Interrupt)(: |$)', line)
        and 'ChildFailedError' not in line]  # of torchrun: says nothing
    said = (errors or lines or ['it wrote nothing'])[-1]
    return f'{said[:300]} (exit code {code})'


def _config_content(path: str) -> str:
    """All settings of a config with its bases; the path alone if it cannot
    be read, which its tool will say better."""
    try:
        return json.dumps(Config.fromfile(path).to_dict(), sort_keys=True,
                          default=repr)
    except Exception:
        return path


def _newest(pattern: str) -> str:
    return max(glob.glob(pattern), key=os.path.getmtime, default='')


def _set_aside(work_dir: str) -> None:
    number = 1
    while os.path.exists(f'{work_dir}.old{number}'):
        number += 1
    os.rename(work_dir, f'{work_dir}.old{number}')


def _commit() -> str:
    folder = os.path.dirname(os.path.abspath(tools()))

    def git(*args: str) -> str:
        return subprocess.run(['git', *args], cwd=folder, text=True,
                              capture_output=True).stdout.strip()

    try:
        commit = git('rev-parse', '--short=10', 'HEAD')
        changed = git('status', '--porcelain', '--untracked-files=no')
    except OSError:
        return ''
    return commit + ('+' if changed else '')


@contextlib.contextmanager
def _locked(path: str, problem: str) -> Iterator[None]:
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(problem) from None
        yield
