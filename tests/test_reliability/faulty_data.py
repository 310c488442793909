"""A tool with something that happens in the course of a run.

``AT=N`` and ``ACTION=CODE``: Python code that is executed before the N-th
step of the optimizer, or with ``POINT=evaluate`` before the N-th validation's
metrics are computed. ``signal``, ``os`` and ``workers``, the process ids of
the data workers, are there. ``TOOL`` defaults to train.py.
"""
import functools
import multiprocessing
import os
import runpy
import signal  # noqa: F401  (for the code)
import sys

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper

TOOLS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))), 'tools')
POINTS = dict(update=(OptimWrapper, 'update_params'),
              evaluate=(Evaluator, 'evaluate'))


def act_within(owner, name):
    call, count = getattr(owner, name), 0

    @functools.wraps(call)
    def acting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == int(os.environ.get('AT', 0)):
            workers = [child.pid
                       for child in multiprocessing.active_children()]
            exec(os.environ['ACTION'], globals(), dict(workers=workers))
        return call(*args, **kwargs)

    setattr(owner, name, acting)


if __name__ == '__main__':
    act_within(*POINTS[os.environ.get('POINT', 'update')])
    sys.argv[0] = os.path.join(TOOLS, os.environ.get('TOOL', 'train.py'))
    runpy.run_path(sys.argv[0], run_name='__main__')
