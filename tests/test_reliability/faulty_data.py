"""tools/train.py with something that happens in the course of a run.

``AT=N`` and ``ACTION=CODE``: Python code that is executed before the N-th
step is taken; ``signal``, ``os`` and ``workers``, the process ids of the data
workers, are there.
"""
import multiprocessing
import os
import runpy
import signal  # noqa: F401  (for the code)
import sys

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.optim import OptimWrapper

TOOLS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))), 'tools')
update, count = OptimWrapper.update_params, 0


def update_params(self, *args, **kwargs):
    global count
    count += 1
    if count == int(os.environ['AT']):
        workers = [child.pid for child in multiprocessing.active_children()]
        exec(os.environ['ACTION'], globals(), dict(workers=workers))
    update(self, *args, **kwargs)


if __name__ == '__main__':
    OptimWrapper.update_params = update_params
    sys.argv[0] = os.path.join(TOOLS, 'train.py')
    runpy.run_path(sys.argv[0], run_name='__main__')
