"""tools/train.py with a fault at a chosen moment.

``FAULT=KIND:N`` is the fault at the N-th step of writing or removing a file
of the work dir: ``kill`` (SIGKILL), ``term`` (SIGTERM) or ``full`` (the disk
is full from then on). ``STEPS=FILE`` gets a line for each step.
"""
import errno
import os
import runpy
import signal
import sys

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import mmengine.hooks.checkpoint_hook as checkpoint_hook
from mmengine.fileio import LocalBackend

TOOLS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))), 'tools')
WORK_DIR = os.path.abspath(sys.argv[sys.argv.index('--work-dir') + 1])
KIND, _, NUMBER = os.environ.get('FAULT', 'none:0').partition(':')
count = 0


def step(what, path, writes=True):
    """One more step; the fault, if it is its turn."""
    global count
    if isinstance(path, int):
        path = os.readlink(f'/proc/self/fd/{path}')
    path = os.path.abspath(str(path))
    if not path.startswith(WORK_DIR) or not path.endswith((
            '.pth', '.tmp', 'last_checkpoint')):
        return
    count += 1
    if os.environ.get('STEPS'):
        with open(os.environ['STEPS'], 'a') as file:
            file.write(f'{what} {os.path.basename(path)}\n')
    if KIND == 'full' and count >= int(NUMBER) and writes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if count == int(NUMBER) and KIND in ('kill', 'term'):
        os.kill(os.getpid(), signal.SIGKILL if KIND == 'kill'
                else signal.SIGTERM)


def watch(name, writes):
    call = getattr(os, name)

    def watched(path, *args, **kwargs):
        step(f'before {name}', path, writes)
        call(path, *args, **kwargs)
        step(f'after {name}', args[0] if name == 'replace' else path, False)

    setattr(os, name, watched)


def put(self, content, path):
    """Of mmengine, in two halves."""
    with open(path, 'wb') as file:
        step('begin', path)
        file.write(content[:len(content) // 2])
        file.flush()
        step('half of', path)
        file.write(content[len(content) // 2:])
    step('end', path, False)


def open_pointer(path, *args, **kwargs):
    file = open(path, *args, **kwargs)
    step('emptied', path)
    return file


for function, writing in (('replace', True), ('fsync', True),
                          ('unlink', False), ('remove', False)):
    watch(function, writing)
LocalBackend.put = put
checkpoint_hook.open = open_pointer
sys.argv[0] = os.path.join(TOOLS, 'train.py')
runpy.run_path(sys.argv[0], run_name='__main__')
