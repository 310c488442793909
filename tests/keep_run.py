"""Train tests/configs/tiny_cls.py and keep what a later version, or another
stack, has to read.

    python tests/keep_run.py FOLDER

tests/data/run_VERSION are such folders, made with that version of mmsinger;
tests/test_kept_runs.py reads them. A folder holds the checkpoint and the
student of the second of three epochs, and in outputs.npz the features of
:func:`images` by that student and by the one of the third epoch.
"""
import glob
import os
import shutil
import sys
import tempfile

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import cv2
import numpy as np
import torch
from mmengine.registry import init_default_scope

import tiny
from mmsinger.checkpoint import load_strict, read_weights
from mmsinger.engine.prepare import load_config
from mmsinger.export import student_config
from mmsinger.registry import MODELS

CONFIG = os.path.join(tiny.TESTS, 'configs', 'tiny_cls.py')
FILES = ('epoch_2.pth', 'epoch_2_student.pth')


def workplace(folder):
    """What the recipe needs: images and a teacher, everywhere the same ones.
    numpy never changes what a RandomState draws."""
    rng = np.random.RandomState(0)
    for name in ('cat', 'dog'):
        os.makedirs(os.path.join(folder, 'images', name))
        for i in range(4):
            cv2.imwrite(os.path.join(folder, 'images', name, f'{i}.png'),
                        rng.randint(0, 256, (32, 32, 3)).astype(np.uint8))
    teacher = MODELS.build(dict(load_config(CONFIG).model.teacher.backbone))
    weights = {
        key: torch.from_numpy(np.float32(
            0.1 * rng.randn(*value.shape) + (value.dim() == 1)))
        for key, value in sorted(teacher.state_dict().items())}
    torch.save({'backbone.' + key: value for key, value in weights.items()},
               os.path.join(folder, 'teacher.pth'))


def images():
    """Two of them, everywhere the same."""
    return torch.from_numpy(
        np.float32(np.random.RandomState(1).randn(2, 3, 32, 32)))


def outputs(checkpoint):
    """What a student's file makes of the images: class tokens (2, C)."""
    init_default_scope('mmpretrain')
    model = MODELS.build(student_config(load_config(CONFIG)).model)
    load_strict(model, read_weights(checkpoint), what=checkpoint, fix='')
    model.eval()
    with torch.no_grad():
        return model.backbone(images())[-1].numpy()


def main(target):
    os.makedirs(target, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        workplace(folder)
        tiny.run_tool('train.py', CONFIG, '--work-dir', 'run', cwd=folder)
        run = os.path.join(folder, 'run')
        for name in FILES:
            shutil.copy(os.path.join(run, name), target)
        np.savez(os.path.join(target, 'outputs.npz'), **{
            f'epoch_{i}': outputs(os.path.join(run, f'epoch_{i}_student.pth'))
            for i in (2, 3)})
    for path in sorted(glob.glob(os.path.join(target, '*'))):
        print(f'{path}: {os.path.getsize(path)} bytes')


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        sys.exit(__doc__)
    main(sys.argv[1])
