"""Command line tools in a fork of a warm process.

A tool spends most of a tiny run on imports. :func:`start` runs the same
script, in a process of its own, forked from a server that has imported the
libraries already. Dumped configs are left unformatted: yapf takes longer than
training does.
"""
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import traceback
from unittest import mock

import tiny

LIBRARIES = [
    'mmsinger', 'mmengine.runner', 'mmseg.models', 'mmseg.datasets',
    'mmseg.engine', 'mmseg.evaluation', 'mmseg.visualization',
    'mmpretrain.models', 'mmpretrain.datasets', 'mmpretrain.engine',
    'mmpretrain.evaluation', 'mmpretrain.visualization', 'mmsinger.models',
    'mmsinger.engine.hooks', 'mmsinger.export', 'matplotlib.pyplot',
    'yapf.yapflib.yapf_api', 'setuptools',
]
_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(['forked'])

if os.environ.get('MMSINGER_FORKSERVER'):
    for _name in LIBRARIES:
        __import__(_name)


def _ensure_server():
    """Start the server once; it imports this module by its search path."""
    from multiprocessing import forkserver
    variables = dict(MMSINGER_FORKSERVER='1', OMP_NUM_THREADS='1',
                     PYTHONPATH=os.pathsep.join([tiny.TESTS, tiny.ROOT]))
    with mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()


def _main(tool, args, cwd, output, env):
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (
        open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
    os.chdir(cwd)
    os.environ.update(env)
    import torch
    from yapf.yapflib import yapf_api
    torch.set_num_threads(1)
    yapf_api.FormatCode = lambda text, **kwargs: (text, True)
    script = os.path.join(tiny.ROOT, 'tools', tool)
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(script))
    code = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


class Run:
    """A tool that runs; its output goes to a file."""

    def __init__(self, tool, args, cwd, env):
        _ensure_server()
        self.output_file = os.path.join(
            cwd, f'output_{time.monotonic_ns()}.txt')
        self.process = _server.Process(target=_main, args=(
            tool, [str(a) for a in args], str(cwd), self.output_file, env))
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
            self.process.kill()
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
