"""Command line tools in forks of a process that has imported their libraries.

A tool spends most of a small run on imports. What was started ends with the
process that started it, however that ends.
"""
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback

import tiny

LIBRARIES = [
    'mmsinger',  # before torchvision: see mmsinger.compat
    'mmengine.runner', 'mmseg.models', 'mmseg.datasets', 'mmseg.engine',
    'mmseg.evaluation', 'mmseg.visualization', 'mmpretrain.models',
    'mmpretrain.datasets', 'mmpretrain.engine', 'mmpretrain.evaluation',
    'mmpretrain.visualization', 'mmsinger.models', 'mmsinger.datasets',
    'mmsinger.engine.hooks', 'mmsinger.linear_eval', 'mmsinger.export',
    'matplotlib.pyplot', 'yapf.yapflib.yapf_api'
]


class Run:
    """A tool that runs; its output goes to a file."""

    def __init__(self, tool, args, cwd, env):
        self.output_file = os.path.join(
            cwd, f'output_{time.monotonic_ns()}.txt')
        server = multiprocessing.get_context('forkserver')
        server.set_forkserver_preload(LIBRARIES)
        self.process = server.Process(target=_run, args=(
            [os.path.join(tiny.ROOT, 'tools', tool), *map(str, args)],
            self.output_file, dict(OMP_NUM_THREADS='1', **env), str(cwd)))
        self.process.start()

    @property
    def output(self):
        with contextlib.suppress(FileNotFoundError):
            with open(self.output_file) as file:
                return file.read()
        return ''

    def finish(self, check=True, timeout=300):
        self.process.join(timeout)
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        result = subprocess.CompletedProcess(
            self.process, self.process.exitcode, stdout=self.output)
        if check:
            assert result.returncode == 0, result.stdout[-6000:]
        return result


def start(tool, *args, cwd, **env):
    """Start a tool in a folder; see :class:`Run`."""
    return Run(tool, args, cwd, env)


def run(tool, *args, cwd, check=True, **env):
    """Run a tool to its end, as ``tiny.run_tool`` does."""
    return start(tool, *args, cwd=cwd, **env).finish(check)


def _run(argv, output, environment, folder):
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (
        open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
    code = _script(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if 0 <= code < 256 else 1)


def _end_with_parent():
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGTERM)


def _script(argv):
    """Run a script as if from the command line; its exit code."""
    import torch
    from yapf.yapflib import yapf_api
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
