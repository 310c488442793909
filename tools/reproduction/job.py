"""Run one planned job; what the rule of the Snakefile calls.

    python -m reproduction.job PLAN.json NAME
"""
import contextlib
import fcntl
import glob
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Iterator, List, Sequence

from reproduction.plan import Job
from reproduction.workspace import (FINISHED, Record, Workspace, last_error,
                                    read_metrics)

TOOLS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUTPUT = 'output.txt'


def run(plan: dict, name: str) -> str:
    """Run a job and keep its record.

    Args:
        plan (dict): As :mod:`reproduction.flow` writes it.
        name (str): The job's name.

    Returns:
        str: Why it failed; empty if it did not.
    """
    planned = plan['jobs'][name]
    job = Job(**planned['job'])
    workspace = Workspace(plan['root'], {name: job},
                          {name: planned['metrics']})
    work_dir = workspace.work_dir(name)
    made_of = workspace.made_of(job, planned['fingerprint'])
    before = workspace.record(name)
    os.makedirs(work_dir, exist_ok=True)
    if os.listdir(work_dir) and (
            before is None or before.status == 'finished'
            or before.made_of != made_of):
        set_aside(work_dir)
        os.makedirs(work_dir)
    with reserved(plan['gpus'], planned['gpus'], plan['share']) as gpus:
        command = command_of(os.path.join(TOOLS, job.tool),
                             workspace.arguments(name), planned['gpus'])
        output = os.path.join(work_dir, OUTPUT)
        record = Record('running', job.config, job.seed, shlex.join(command),
                        commit(), output, made_of=made_of)
        workspace.save(name, record)
        _say(f'start  {name}')
        begin = time.monotonic()
        with open(output, 'wb') as log:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ if plan['slurm'] else {
                    **os.environ, 'CUDA_VISIBLE_DEVICES': ','.join(gpus)}
            ).returncode
    record.seconds = round(time.monotonic() - begin, 1)
    record.log = max(glob.glob(os.path.join(
        glob.escape(work_dir), '*', '*.log')),
                     key=os.path.getmtime, default=output)
    record.metrics = read_metrics(work_dir)
    lacks = workspace.lacking(name, record)
    if code:
        record.error = last_error(output, code)
    elif lacks:  # nor can it go on: the next time it starts anew
        record.error = f'its results lack {", ".join(lacks)}'
        record.made_of = ''
    else:
        with open(os.path.join(work_dir, FINISHED), 'w') as file:
            file.write(uuid.uuid4().hex)  # another one for each run
    record.status = 'failed' if record.error else 'finished'
    workspace.save(name, record)
    _say(f'{record.status} {name} ({record.seconds:.0f} s)'
         + (f': {record.error}' if record.error else ''))
    return record.error


def _say(line: str) -> None:
    """Print a line at once: other jobs print, too, and unbuffered print()
    writes the line and its end apart."""
    print(f'{line}\n', end='', flush=True)


@contextlib.contextmanager
def locked(path: str) -> Iterator[int]:
    """Hold a file's lock.

    Args:
        path (str): The file; made if it is not there.

    Yields:
        int: Its descriptor. A process that inherits it holds the lock too.

    Raises:
        BlockingIOError: If another process holds it.
    """
    with open(path, 'a') as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file.fileno()


@contextlib.contextmanager
def reserved(gpus: Sequence[str], count: int, share: int
             ) -> Iterator[List[str]]:
    """Keep GPUs to oneself, also against other calls of the tool.

    Args:
        gpus (Sequence[str]): Those to choose from; empty: the CPU.
        count (int): How many.
        share (int): How many jobs may be on a GPU.

    Yields:
        list[str]: The chosen ones, waited for if need be.
    """
    while True:
        with contextlib.ExitStack() as stack:
            mine: List[str] = []
            for place in range(share):
                for gpu in gpus:
                    if gpu in mine or len(mine) == count:
                        continue
                    with contextlib.suppress(BlockingIOError):
                        stack.enter_context(locked(os.path.join(
                            tempfile.gettempdir(),
                            f'mmsinger_gpu_{os.getuid()}_{gpu}_{place}')))
                        mine.append(gpu)
            if len(mine) == count or not gpus:
                yield mine
                return
        time.sleep(1)


def command_of(script: str, arguments: Sequence[str], gpus: int
               ) -> List[str]:
    """What starts a job: under torchrun if it gets several GPUs."""
    if gpus > 1:
        return [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={gpus}', script, *arguments,
                '--launcher', 'pytorch']
    return [sys.executable, script, *arguments]


def set_aside(work_dir: str) -> None:
    """Rename a work dir to the first free ``….oldN``."""
    number = 1
    while os.path.exists(f'{work_dir}.old{number}'):
        number += 1
    os.rename(work_dir, f'{work_dir}.old{number}')


def commit() -> str:
    """The repository's commit, ``+`` after it with changes; empty if there
    is none."""
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--exclude=*', '--abbrev=10',
             '--dirty=+'], cwd=TOOLS, text=True, capture_output=True
        ).stdout.strip()
    except OSError:  # no git
        return ''


if __name__ == '__main__':
    try:
        with open(sys.argv[1]) as plan_file:
            written = json.load(plan_file)
        os.chdir(written['directory'])
        sys.exit(bool(run(written, sys.argv[2])))
    except KeyboardInterrupt:
        sys.exit(1)
