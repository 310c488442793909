"""Run planned jobs through Snakemake: skip the finished, resume the
interrupted, survive the failed."""
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from reproduction.job import TOOLS, locked
from reproduction.workspace import Record, Workspace, fingerprint

from mmsinger.errors import ConfigError

# Tools that run in one process only
SINGLE = ('measure.py', 'explained_variance.py')


@dataclass
class Resources:
    """What jobs run on.

    Attributes:
        jobs (int): How many at once.
        gpus (tuple[str, ...]): Identifiers; empty: the CPU, or slurm's.
        gpus_per_job (int): How many GPUs one job gets. Defaults to 0, the
            CPU.
        slurm (list[str], optional): Snakemake's resources of a job, such as
            ``'slurm_partition=gpu'``; jobs then run through slurm. Defaults
            to None.
    """
    jobs: int
    gpus: Tuple[str, ...] = ()
    gpus_per_job: int = 0
    slurm: Optional[List[str]] = None

    @property
    def share(self) -> int:
        """How many jobs may be on a GPU at the same time."""
        return math.ceil(self.jobs * self.gpus_per_job / len(self.gpus)) \
            if self.gpus else 1

    def options(self) -> List[str]:
        """Snakemake's options for them."""
        if self.slurm is not None:
            return ['--executor', 'slurm', '--jobs', str(self.jobs),
                    '--latency-wait', '60', '--default-resources',
                    f'mem_mb={64000 * self.gpus_per_job}',
                    f'cpus_per_task={8 * self.gpus_per_job}', *self.slurm]
        options = ['--cores', str(self.jobs)]
        if self.gpus:
            options += ['--resources', f'gpu={len(self.gpus) * self.share}']
        return options

    def environment(self) -> Dict[str, str]:
        """Variables to set: threads are shared between jobs."""
        if self.slurm is not None:
            return {}
        threads = len(os.sched_getaffinity(0)) // self.jobs
        return dict(OMP_NUM_THREADS=str(max(1, threads)))


def run_jobs(workspace: Workspace, resources: Resources) -> Dict[str, Record]:
    """Run what is not finished yet.

    A failed job does not stop the others, only those that need it.

    Args:
        workspace (Workspace): The jobs, and where they run.
        resources (Resources): On what.

    Returns:
        dict[str, Record]: Of each job; one that could not run, since
        another failed, is ``'failed'`` too.

    Raises:
        ConfigError: If Snakemake is missing, or the folder cannot be written
            or is in use.
    """
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(workspace.root, exist_ok=True)
            lock = stack.enter_context(locked(
                os.path.join(workspace.root, '.lock')))
        except BlockingIOError:
            raise ConfigError(
                f'{workspace.root!r} is in use by another tools/reproduce.py. '
                'Wait for it, or choose another --root.') from None
        except OSError as error:
            raise ConfigError(
                f'--root {workspace.root!r} is no folder that can be written: '
                f'{error.strerror}. Choose another.') from error
        states = workspace.states()
        todo = [name for name, state in states.items() if state != 'finished']
        print(f'{len(states)} jobs: {len(states) - len(todo)} are finished, '
              f'{len(todo)} to run', flush=True)
        code = _run(workspace, resources, todo, lock) if todo else 0
    # Figures of before, where jobs could not start
    stale = [name for name, state in workspace.states().items()
             if state == 'outdated'] if code else []
    records: Dict[str, Record] = {}
    for name, job in workspace.jobs.items():
        record = workspace.record(name)
        broken = [n for n in job.needs if records[n].status == 'failed']
        if broken or record is None or record.status == 'running' or \
                name in stale and not record.error:
            record = Record('failed', job.config, job.seed, error=(
                f'not run: {broken[0]} failed' if broken else
                'it did not run to its end; see what Snakemake said'))
        records[name] = record
    if code and all(r.status == 'finished' for r in records.values()):
        raise RuntimeError(f'Snakemake ended with exit code {code}; what it '
                           'said is above.')
    return records


def _run(workspace: Workspace, resources: Resources, todo: Sequence[str],
         lock: int) -> int:
    """Have Snakemake run jobs; its exit code."""
    needed = ['snakemake', 'snakemake_executor_plugin_slurm']
    for package in needed[:1 + (resources.slurm is not None)]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'{package.replace("_", "-")} is not installed, which runs '
                "the jobs: pip install 'mmsinger[reproduce]' "
                '([slurm] for --slurm), with Python 3.11 or newer.')
    path = os.path.abspath(os.path.join(workspace.root, 'plan.json'))
    contents: Dict[str, str] = {}
    with open(path, 'w') as file:
        json.dump(dict(
            root=workspace.root, directory=os.getcwd(), gpus=resources.gpus,
            share=resources.share, slurm=resources.slurm is not None,
            jobs={name: dict(
                job=asdict(job), fingerprint=fingerprint(job, contents),
                waits_for=[n for n in job.needs if n in todo],
                metrics=workspace.metrics.get(name, []),
                gpus=min(1, resources.gpus_per_job) if job.tool in SINGLE
                else resources.gpus_per_job)
                for name, job in workspace.jobs.items() if name in todo}),
            file, indent=1)
    pythonpath = filter(None, (TOOLS, os.environ.get('PYTHONPATH')))
    process = subprocess.Popen(
        [sys.executable, '-m', 'snakemake', '--snakefile',
         os.path.join(TOOLS, 'reproduction', 'Snakefile'), '--directory',
         workspace.root, '--forceall', '--keep-going', '--nolock',
         '--rerun-incomplete', '--scheduler', 'greedy', '--quiet', 'rules',
         'host', 'reason', *resources.options()],
        start_new_session=True, stdin=subprocess.DEVNULL, pass_fds=(lock, ),
        env={**os.environ, **resources.environment(),
             'PYTHONPATH': os.pathsep.join(pythonpath)})
    try:
        return process.wait()
    except BaseException:
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError,
                                     subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(30)
        raise
