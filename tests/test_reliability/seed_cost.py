"""What random numbers of its own cost a sample, beside loading it.

    python tests/test_reliability/seed_cost.py [CONFIG ...]

prints how long the training pipeline of each config takes for a sample, and
the ratios with what the seeds add, in a data worker and in the main process.
"""
import os
import random
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tools')]

import mmsinger  # noqa: E402, F401  (before torchvision)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from mmsinger.engine import samples  # noqa: E402
from mmsinger.engine.prepare import load_config  # noqa: E402
from step_cost import ImageLoading  # noqa: E402

CONFIGS = ['configs/singer_vitl_to_vits_in1k.py',
           'configs/singer_deit3s_to_deit3t_in1k.py']


class Numbers(Dataset):
    """A number of each generator, which makes it compute the next 600."""

    def __len__(self):
        return 1 << 30

    def __getitem__(self, index):
        return random.random(), np.random.rand(), torch.rand(())


def seconds(call, count):
    times = []
    for number in range(count):
        draw = samples.Draw(number)
        draw.seed = number << 40
        begin = time.perf_counter()
        call(draw)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(configs):
    torch.set_num_threads(1)
    plain = seconds(Numbers().__getitem__, 3000)
    guarded = samples.guard_samples(Numbers(), 'it')
    alone = seconds(guarded.__getitem__, 3000) - plain
    samples.get_worker_info = lambda: True
    worker = seconds(guarded.__getitem__, 3000) - plain
    print(f'{worker * 1e6:.0f} us a sample in a worker, {alone * 1e6:.0f} us '
          'in the main process')
    for path in configs:
        cfg = load_config(os.path.join(ROOT, path))
        init_default_scope(cfg.default_scope)
        with ImageLoading(cfg.train_dataloader.dataset.pipeline, 224) as files:
            whole = seconds(lambda _: files.load(1), 300)
        print(f'{path}: {whole * 1e3:.1f} ms a sample, x '
              f'{1 + worker / whole:.3f} and x {1 + alone / whole:.3f}')


if __name__ == '__main__':
    main(sys.argv[1:] or CONFIGS)
