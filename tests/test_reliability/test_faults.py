"""Nothing is lost but the work since the last checkpoint.

A few of the faults of ``faults.py``, which goes through all of them.
"""
import os
import re
import signal

import faults
import pytest
import torch

import forked
import tiny
from mmsinger.files import LOCK

CLS = os.path.join(tiny.TESTS, 'configs', 'tiny_cls.py')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return faults.Faults(tiny.workplace(tmp_path_factory.mktemp('place')))


@pytest.mark.parametrize('kind, step', [
    ('kill', r'half of \.iter_4\.pth'),  # the only one is iter_3.pth
    ('kill', r'after replace iter_4\.pth'),
    ('kill', 'emptied last_checkpoint'),
    ('kill', r'before unlink iter_4\.pth'),
    ('kill', r'half of \.best_mIoU_iter_6\.pth'),
    ('kill', r'before unlink best_mIoU_iter_3_student\.pth'),
    ('full', r'half of \.iter_4\.pth'),
    ('full', r'before fsync \.best_mIoU_iter_6_student\.pth'),
    ('term', r'begin \.iter_4\.pth'),  # within an iteration
    ('term', r'begin \.best_mIoU_iter_3\.pth')])  # within a validation
def test_one_fault(run, kind, step):
    number = next(i for i, line in enumerate(run.steps, 1)
                  if re.match(step, line))
    assert run.inject(kind, number) == ''


@pytest.fixture(scope='module')
def epochs(tmp_path_factory):
    """A place in which tests/configs/tiny_cls.py runs."""
    place = tiny.workplace(tmp_path_factory.mktemp('epochs'))
    for kind in 'ab':
        folder = os.path.join(place, 'images', kind)
        os.makedirs(folder)
        for i in range(4):
            os.link(os.path.join(place, 'scenes', 'images', f'{i}.png'),
                    os.path.join(folder, f'{i}.png'))
    return place


OPTIONS = ['--cfg-options', 'train_dataloader.batch_size=2',
           'default_hooks.checkpoint.max_keep_ckpts=1',
           'model.student.backbone.drop_rate=0.1']
# Sends the signal in the course of an iteration
SIGNAL = '''
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's job: off
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # by nohup: off
import mmsinger
from mmengine.optim import OptimWrapper
update, count = OptimWrapper.update_params, 0
def signalled(self, *args, **kwargs):
    global count
    count += 1
    if count == int(os.environ['AT']):
        os.kill(os.getpid(), int(os.environ['SIGNAL']))
    update(self, *args, **kwargs)
OptimWrapper.update_params = signalled
import runpy
sys.argv[0] = os.path.join(%r, 'tools', 'train.py')
runpy.run_path(sys.argv[0], run_name='__main__')
''' % tiny.ROOT


def signalled(place, work_dir, number, at):
    script = os.path.join(place, 'signalled.py')
    with open(script, 'w') as file:
        file.write(SIGNAL)
    return forked.run(script, CLS, '--work-dir', work_dir, *OPTIONS,
                      cwd=place, check=False, SIGNAL=str(int(number)),
                      AT=str(at))


@pytest.mark.parametrize('at', [1, 4, 6, 7])  # of 3 epochs of 4 iterations
def test_sigterm_within_an_epoch(epochs, at):
    whole = os.path.join(epochs, 'whole')
    if not os.path.isdir(whole):
        forked.run('train.py', CLS, '--work-dir', 'whole', *OPTIONS,
                   cwd=epochs)
    folder = os.path.join(epochs, f'term_{at}')
    result = signalled(epochs, folder, signal.SIGTERM, at)
    assert result.returncode == 143, result.stdout[-3000:]
    assert 'Traceback' not in result.stdout
    name = f'epoch_{at // 4}.pth' if at % 4 == 0 else f'iter_{at}.pth'
    assert f'goes on from {os.path.join(folder, name)}' in result.stdout
    # Flips are the same with any number of data workers
    resumed = forked.run('train.py', CLS, '--work-dir', folder, '--resume',
                         *OPTIONS, f'train_dataloader.num_workers={at % 3}',
                         cwd=epochs)
    assert resumed.stdout.count('Epoch(train)') == 12 - at
    assert faults.names(folder) == faults.names(whole)
    first, second = (torch.load(os.path.join(one, 'epoch_3.pth'),
                                weights_only=False)
                     for one in (folder, whole))
    assert first['meta']['iter'] == second['meta']['iter'] == 12
    assert all(torch.equal(first['state_dict'][key], value)
               for key, value in second['state_dict'].items())


def test_a_terminal_that_is_closed(epochs):
    folder = os.path.join(epochs, 'closed')
    result = signalled(epochs, folder, signal.SIGHUP, 2)
    assert result.returncode == 129, result.stdout[-3000:]
    assert 'SIGHUP after iteration 2: ended. --resume goes on from ' + \
        os.path.join(folder, 'iter_2.pth') in result.stdout


def test_ctrl_c_is_one_line(epochs):
    result = signalled(epochs, 'interrupted', signal.SIGINT, 3)
    assert result.returncode == 130
    assert 'Traceback' not in result.stdout
    assert result.stdout.endswith('\nInterrupted.\n')
    assert 'in iteration 3. No checkpoint had been written.' in result.stdout
    assert faults.names(os.path.join(epochs, 'interrupted')) <= {
        'tiny_cls.py', 'tiny_cls_student.py', LOCK}


def test_a_best_checkpoint_that_was_cut_off(run):
    """By a power cut before this version, for instance."""
    train = ['train.py', tiny.SEG_CONFIG, '--work-dir', 'best',
             *faults.OPTIONS]
    forked.run(*train, 'train_cfg.max_iters=4', cwd=run.place)
    folder = os.path.join(run.place, 'best')
    best, = (os.path.join(folder, name) for name in os.listdir(folder)
             if re.fullmatch(r'best_mIoU_iter_\d+\.pth', name))
    with open(best, 'r+b') as file:
        file.truncate(1000)
    result = forked.run(*train, 'train_cfg.max_iters=6', '--resume',
                        cwd=run.place)
    assert f'{best!r} was cut off or damaged' in result.stdout
    names = [name for name in os.listdir(folder)
             if re.fullmatch(r'best_mIoU_iter_\d+\.pth', name)]
    for name in names:
        if os.path.join(folder, name) != best:
            faults.weights(os.path.join(folder, name))
    assert 'best_mIoU_iter_6.pth' in names
