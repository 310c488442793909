"""Checkpoints of other versions and of other stacks: resumed, loaded from,
exported, and with the same outputs. tests/keep_run.py made them."""
import os
import shutil

import numpy as np
import pytest
import torch

import forked
import keep_run
import tiny

KEPT = os.path.join(tiny.TESTS, 'data', 'run_0.1.0')


def pytest_generate_tests(metafunc):
    if 'kept' in metafunc.fixturenames:
        folders = [KEPT, *metafunc.config.getoption('--kept-run')]
        metafunc.parametrize('kept', folders, scope='module', ids=[
            os.path.basename(os.path.normpath(f)) for f in folders])


@pytest.fixture(scope='module')
def place(kept, tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    keep_run.workplace(folder)
    for name in keep_run.FILES:
        shutil.copy(os.path.join(kept, name), folder)
    return folder


@pytest.fixture(scope='module')
def expected(kept):
    return np.load(os.path.join(kept, 'outputs.npz'))


def check_outputs(path, expected, tolerance):
    np.testing.assert_allclose(
        keep_run.outputs(str(path)), expected, rtol=0,
        atol=tolerance * np.abs(expected).max())


def state_dict(path):
    return torch.load(path, weights_only=True)['state_dict']


def test_outputs_of_the_student(place, expected):
    check_outputs(place / 'epoch_2_student.pth', expected['epoch_2'], 1e-5)


def test_resume(place, expected):
    """The third epoch, as it was where the run went through."""
    result = forked.run(
        'train.py', keep_run.CONFIG, '--work-dir', 'resumed', '--resume',
        'epoch_2.pth', cwd=place)
    assert 'Epoch(train) [3][2/2]' in result.stdout
    assert 'Epoch(train) [2]' not in result.stdout
    check_outputs(place / 'resumed' / 'epoch_3_student.pth',
                  expected['epoch_3'], 1e-4)


@pytest.mark.parametrize('name', keep_run.FILES)
def test_load_from(place, expected, name):
    """A step of no length keeps the weights; the student's file has no
    adapters, which start anew."""
    forked.run('train.py', keep_run.CONFIG, '--work-dir', 'loaded',
               '--cfg-options', f'load_from={name}', 'train_cfg.max_epochs=1',
               'optim_wrapper.optimizer.lr=0.',
               'optim_wrapper.optimizer.weight_decay=0.', cwd=place)
    check_outputs(place / 'loaded' / 'epoch_1_student.pth',
                  expected['epoch_2'], 1e-5)
    shutil.rmtree(place / 'loaded')


def test_export(place):
    forked.run('export_student.py', 'epoch_2.pth', '--config',
               keep_run.CONFIG, '--out', 'exported.pth', cwd=place)
    exported = state_dict(place / 'exported.pth')
    kept = state_dict(place / 'epoch_2_student.pth')
    assert exported.keys() == kept.keys()
    assert all(torch.equal(exported[key], kept[key]) for key in kept)


def test_linear_evaluation(place):
    root = place / 'data' / 'digit_scenes'
    (root / 'meta').mkdir(parents=True)
    for folder, name in (('training', 'train'), ('validation', 'val')):
        shutil.copytree(place / 'images', root / 'images' / folder)
        (root / 'meta' / f'{name}.txt').write_text(''.join(
            f'{animal}/{i}.png {label}\n'
            for label, animal in enumerate(('cat', 'dog')) for i in range(4)))
    result = forked.run(
        'linear_eval.py',
        os.path.join(tiny.ROOT, 'configs', 'linear_eval', 'cls_digits.py'),
        keep_run.CONFIG, 'epoch_2_student.pth', '--work-dir', 'linear',
        '--cfg-options', 'train_cfg.max_iters=5', 'train_cfg.val_interval=5',
        'train_dataloader.batch_size=4', cwd=place)
    assert 'accuracy/top1: ' in result.stdout
