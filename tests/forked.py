"""Command line tools in a fork of a warm process, see
:mod:`reproduction.warm`."""
import contextlib
import os
import subprocess
import time

from reproduction import warm

import tiny


class Run:
    """A tool that runs; its output goes to a file."""

    def __init__(self, tool, args, cwd, env):
        self.output_file = os.path.join(
            cwd, f'output_{time.monotonic_ns()}.txt')
        self.process = warm.start(
            [os.path.join(tiny.ROOT, 'tools', tool), *map(str, args)],
            self.output_file, True, dict(OMP_NUM_THREADS='1', **env),
            str(cwd))

    @property
    def output(self):
        with contextlib.suppress(FileNotFoundError):
            with open(self.output_file) as file:
                return file.read()
        return ''

    def finish(self, check=True, timeout=300):
        self.process.join(timeout)
        if self.process.is_alive():
            warm.kill(self.process, 1)
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
