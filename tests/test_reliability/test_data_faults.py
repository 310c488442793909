"""Data that go bad in the course of a run end it in one message that says
which and what to do; the checkpoints stay good."""
import os
import re
import time

import cv2
import faulty_data
import numpy as np
import pytest

import forked
import tiny
from faults import weights

EMPTY = "open({!r}, 'w').close()".format
IMAGE, MAP = 'scenes/images/3.png', 'scenes/annotations/3.png'
PIXEL = ('import cv2, numpy; cv2.imwrite({!r}, numpy.ones((1, 1, 3), "u1")); '
         'cv2.imwrite({!r}, numpy.ones((1, 1), "u1"))').format(IMAGE, MAP)
LABEL = ('import cv2, numpy; '
         f'cv2.imwrite({MAP!r}, numpy.full((32, 32), 7, "u1"))')
SIZE = ('import cv2, numpy; cv2.imwrite({!r}, numpy.ones((48, 40, 3), "u1"'
        ')); cv2.imwrite({!r}, numpy.ones((48, 40), "u1"))').format(IMAGE, MAP)
FAULTS = dict(  # what happens, what the message says
    vanished_image=(f'os.remove({IMAGE!r})', [IMAGE, 'is not there']),
    empty_image=(EMPTY(IMAGE), [IMAGE, 'is empty']),
    cut_image=(f'os.truncate({IMAGE!r}, 1200)', [IMAGE, 'decoded']),
    empty_map=(EMPTY(MAP), [MAP, 'is empty']),
    cut_map=(f'os.truncate({MAP!r}, 60)', [MAP, 'decoded']),
    one_pixel=(PIXEL, [IMAGE]),
    # the preprocessor pads to 32 x 32 pixels and cannot cut
    other_size=(SIZE, [IMAGE, '48x40', 'RandomCrop']),
    label=(LABEL, [MAP, 'the label 7', 'the classes 0 to 2', 'num_classes']),
    map_size=(f'import cv2, numpy; cv2.imwrite({MAP!r}, '
              'numpy.zeros((32, 30), "u1"))', [MAP, '1x32x30', IMAGE]),
    map_channels=(f'import cv2, numpy; cv2.imwrite({MAP!r}, '
                  'numpy.zeros((32, 32, 3), "u1"))', [MAP, 'one channel']),
    folder=("os.rename('scenes', 'moved')", ["the folder 'scenes'"]),
    work_dir=("import shutil; shutil.rmtree('run')",
              ['cannot be written', 'work dir', '--resume']),
    killed_worker=('os.kill(workers[0], signal.SIGKILL)',
                   ['data worker (process', 'num_workers', '--resume']),
    stopped_worker=('os.kill(workers[0], signal.SIGSTOP)',
                    ['within 2 s', 'is stopped', 'train_dataloader.timeout']))


def message_of(result):
    assert result.returncode == 1, result.stdout[-3000:]
    assert 'Traceback' not in result.stdout, result.stdout[-3000:]
    _, message = re.split('\n(?=(?:Data|Training)Error: )', result.stdout)
    return message


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', FAULTS)
def test_in_training(tmp_path, name, workers):
    if 'worker' in name and not workers:
        pytest.skip('no worker')
    place = tiny.workplace(tmp_path)
    action, words = FAULTS[name]
    begin = time.monotonic()
    result = forked.run(
        faulty_data.__file__, tiny.SEG_CONFIG, '--work-dir', 'run',
        '--cfg-options', 'train_cfg.max_iters=40',
        'train_cfg.val_interval=100', 'model.task_loss_weight=1',
        f'train_dataloader.num_workers={workers}',
        'train_dataloader.timeout=2', cwd=place, check=False, AT='4',
        ACTION=action)
    message = message_of(result)
    for word in words:
        assert word in message
    assert time.monotonic() - begin < 100
    if name != 'work_dir':
        with open(os.path.join(place, 'run', 'last_checkpoint')) as file:
            weights(os.path.join(place, file.read()))


def test_in_calibration(tmp_path):
    place = tiny.workplace(tmp_path)
    cv2.imwrite(str(tmp_path / IMAGE), np.ones((48, 40, 3), np.uint8))
    cv2.imwrite(str(tmp_path / MAP), np.ones((48, 40), np.uint8))
    message = message_of(forked.run(
        'train.py', tiny.SEG_CONFIG, '--work-dir', 'run', '--cfg-options',
        'model.target_norm=standardise', cwd=place, check=False))
    assert message.startswith('DataError: train_dataloader')
    assert IMAGE in message and '48x40' in message


@pytest.mark.parametrize('name', ['empty_map', 'label', 'map_size',
                                  'map_channels'])
def test_in_validation_and_tests(tmp_path, name):
    """A metric would pass a label over that is out of range."""
    place = tiny.workplace(tmp_path)
    action, words = FAULTS[name]
    result = forked.run(
        faulty_data.__file__, tiny.SEG_CONFIG, '--work-dir', 'run',
        '--cfg-options', 'model.task_loss_weight=0', 'train_cfg.max_iters=2',
        cwd=place, check=False, AT='2', ACTION=action)
    message = message_of(result)
    assert message.startswith('DataError: val_dataloader')
    for word in words:
        assert word in message
    result = forked.run('test.py', tiny.SEG_CONFIG, 'run/iter_2.pth',
                        '--work-dir', 'test', cwd=place, check=False)
    assert 'DataError: test_dataloader' in message_of(result)
