"""Commands in processes of their own; Python scripts start warm.

A tool spends most of a small run on imports. Scripts run in forks of a server
that has done these already and does nothing else. What was started ends with
the process that started it, however that ends.
"""
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from multiprocessing.process import BaseProcess
from typing import Dict, List, Optional, Sequence

LIBRARIES = [
    'mmsinger',  # before torchvision: see mmsinger.compat
    'mmengine.runner', 'mmseg.models', 'mmseg.datasets', 'mmseg.engine',
    'mmseg.evaluation', 'mmseg.visualization', 'mmpretrain.models',
    'mmpretrain.datasets', 'mmpretrain.engine', 'mmpretrain.evaluation',
    'mmpretrain.visualization', 'mmsinger.models', 'mmsinger.datasets',
    'mmsinger.engine.hooks', 'mmsinger.linear_eval', 'mmsinger.export',
    'matplotlib.pyplot', 'yapf.yapflib.yapf_api'
]


def start(command: Sequence[str], output: str, is_script: bool,
          environment: Optional[Dict[str, str]] = None,
          folder: Optional[str] = None) -> BaseProcess:
    """Start a command.

    Args:
        command (Sequence[str]): Program and arguments.
        output (str): The file that takes its output and errors.
        is_script (bool): The program is a Python script for a warm process.
            One that uses a GPU must not be: the libraries look for GPUs when
            they are imported, and CUDA does not work in forks then.
        environment (dict[str, str], optional): Variables to set. Defaults to
            None, none.
        folder (str, optional): Working directory. Defaults to None, this
            process's.

    Returns:
        BaseProcess: With ``exitcode``, leader of a process group.
    """
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(LIBRARIES)
    process = server.Process(
        target=_run, args=(list(command), os.path.abspath(output), is_script,
                           dict(environment or {}), folder or os.getcwd()))
    process.start()
    return process


def kill(process: BaseProcess, patience: float = 10) -> None:
    """End a process and what it started, after some seconds by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has ended, or has only just begun
            process.terminate()
        process.join(patience)


def _run(command: List[str], output: str, is_script: bool,
         environment: Dict[str, str], folder: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (
        open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
    code = _script(command) if is_script else subprocess.call(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if 0 <= code < 256 else 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGTERM)


def _script(argv: List[str]) -> int:
    """Run a script as if from the command line; its exit code."""
    import torch
    from yapf.yapflib import yapf_api
    if 'OMP_NUM_THREADS' in os.environ:
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    # The dumped config in one line a key is good enough: formatting it takes
    # longer than a small evaluation
    yapf_api.FormatCode = lambda text, **_: (text, True)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    try:
        runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else \
            int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
