"""What a run may go on from, and what it takes over."""
import errno
import json
import os
import re
import shutil
import stat

import numpy as np
import pytest
import torch

import forked
import tiny
from mmsinger.errors import ConfigError
from mmsinger.export import export_student
from mmsinger.files import (LOCK, atomic_write, lock_folder, unlock_folder,
                            write_json)

ADAPTERS = 'optim_wrapper.paramwise_cfg.custom_keys.adapters.lr_mult'


@pytest.fixture(scope='module')
def run(place):
    """A finished run of 6 iterations; its folder."""
    train(place, 'run')
    return os.path.join(place, 'run')


def train(place, work_dir, *options, args=(), check=True):
    extra = ['--cfg-options', *options] if options else []
    return forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', work_dir,
                      *args, *extra, cwd=place, check=check)


def message_of(result):
    assert result.returncode == 1, result.stdout[-3000:]
    assert 'Traceback' not in result.stdout, result.stdout[-3000:]
    assert result.stdout.count('ConfigError: ') == 1
    return result.stdout[result.stdout.index('ConfigError: '):]


def learning_rates(path):
    """Now and at first, of each parameter by name."""
    content = torch.load(path, weights_only=False)
    return {content['optimizer_names'][i]: (group['lr'], group['initial_lr'])
            for group in content['optimizer']['param_groups']
            for i in group['params']}


# -- damaged files ------------------------------------------------------------


@pytest.fixture(params=['--resume', 'load_from'])
def start_from(request, place):
    """Start from a file, one way or the other."""
    def start(path, *options):
        if request.param == '--resume':
            return train(place, 'other', *options, args=('--resume', path),
                         check=False)
        return train(place, 'other', f'load_from={path}', *options,
                     check=False)
    return start


@pytest.mark.parametrize('damage', ['cut', 'empty', 'flipped', 'text'])
def test_damaged_files(place, run, start_from, damage):
    path = os.path.join(place, 'damaged.pth')
    with open(os.path.join(run, 'iter_6.pth'), 'rb') as file:
        content = bytearray(file.read())
    if damage == 'flipped':
        content[len(content) // 2] ^= 0xff
    content = dict(cut=content[:-999], empty=b'', text=b'not a checkpoint',
                   flipped=content)[damage]
    with open(path, 'wb') as file:
        file.write(content)
    message = message_of(start_from('damaged.pth'))
    assert 'damaged.pth' in message and 'damaged' in message


def test_every_flipped_byte_is_found_or_harmless(run, tmp_path):
    from mmsinger.checkpoint import load_checkpoint
    from mmsinger.engine.resume import is_intact
    source = os.path.join(run, 'iter_6_student.pth')
    before = load_checkpoint(source)['state_dict']
    with open(source, 'rb') as file:
        content = bytearray(file.read())
    path, passed = str(tmp_path / 'flipped.pth'), 0
    for position in range(0, len(content), len(content) // 300):
        content[position] ^= 0xff
        with open(path, 'wb') as file:
            file.write(content)
        content[position] ^= 0xff
        if is_intact(path):  # padding
            passed += 1
            try:
                after = load_checkpoint(path)['state_dict']
            except ConfigError:
                continue
            assert all(torch.equal(after[key], value)
                       for key, value in before.items())
    assert passed < 100


# -- other files --------------------------------------------------------------


def test_checkpoints_under_other_names(place):
    """Those of out_dir and filename_tmpl are found like any others."""
    options = ('default_hooks.checkpoint.out_dir=elsewhere',
               'default_hooks.checkpoint.filename_tmpl=step_{}.pth')
    train(place, 'named', *options)
    folder = os.path.join(place, 'elsewhere', 'named')
    newest = max((name for name in os.listdir(folder)
                  if re.fullmatch(r'step_\d+\.pth', name)),
                 key=lambda name: int(name[5:-4]))
    os.unlink(os.path.join(place, 'named', 'last_checkpoint'))
    with open(os.path.join(folder, newest), 'r+b') as file:
        file.truncate(1000)
    result = train(place, 'named', *options, 'train_cfg.max_iters=8',
                   args=('--resume', ))
    assert 'was not written to its end, it is passed over' in result.stdout
    assert re.search(r'resumed epoch: \d+, iter: [1-9]', result.stdout)


def test_no_path(place):
    result = train(place, 'other', args=('--resume', ''), check=False)
    assert result.returncode == 2
    assert 'argument --resume: the value is empty' in result.stdout


def test_the_best_of_another_folder_stays(place, run):
    """A run that goes on elsewhere removes files of its own alone."""
    before = sorted(os.listdir(run))
    train(place, 'elsewhere', 'train_cfg.max_iters=9',
          args=('--resume', 'run/iter_6.pth'))
    assert sorted(os.listdir(run)) == before
    best = [name for name in os.listdir(os.path.join(place, 'elsewhere'))
            if re.fullmatch(r'best_mIoU_iter_\d+\.pth', name)]
    assert len(best) <= 1
    # Nor does one that was copied
    shutil.copytree(run, os.path.join(place, 'copied'))
    train(place, 'copied', 'train_cfg.max_iters=9', args=('--resume', ))
    assert sorted(os.listdir(run)) == before
    assert len([name for name in os.listdir(os.path.join(place, 'copied'))
                if re.fullmatch(r'best_mIoU_iter_\d+\.pth', name)]) == 1


def test_the_best_by_another_metric(place, run):
    """A lower aAcc is not compared with the mIoU that was best so far."""
    shutil.copytree(run, os.path.join(place, 'metric'))
    before = {name for name in os.listdir(run) if name.startswith('best')}
    train(place, 'metric', 'train_cfg.max_iters=9',
          'default_hooks.checkpoint.save_best=aAcc',
          'default_hooks.checkpoint.rule=less', args=('--resume', ))
    after = {name for name in os.listdir(os.path.join(place, 'metric'))
             if name.startswith('best')}
    assert before < after
    assert any(name.startswith('best_aAcc') for name in after)


@pytest.mark.parametrize('name, words', [
    ('iter_6_student.pth', 'it has no message_hub, optimizer'),
    ('best', 'it has no optimizer'),
    ('../teacher.pth', 'no meta, message_hub, optimizer')])
def test_weights_alone_are_not_resumed(place, run, name, words):
    if name == 'best':
        name, = (one for one in os.listdir(run) if one.startswith('best')
                 and 'student' not in one)
    message = message_of(train(
        place, 'other', args=('--resume', os.path.join('run', name)),
        check=False))
    assert words in message and 'load_from=' in message


def test_a_teacher_is_no_student(place, run):
    message = message_of(train(place, 'other', 'load_from=teacher.pth',
                               check=False))
    assert "load_from='teacher.pth' is not a checkpoint" in message


@pytest.mark.parametrize('options, words', [
    (['model.layers=[0,3]'], 'model.layers: [1, 3] then, [0, 3] now'),
    (['model.adapter.rank=8'], 'model.adapter.rank: 4 then, 8 now'),
    (['model.target_norm=standardise'],
     "model.target_norm: 'not set' then, 'standardise' now"),
    (['model.student.decode_head.num_classes=4'],
     'model.student.decode_head.num_classes: 3 then, 4 now')])
def test_checkpoints_of_other_models(run, start_from, options, words):
    message = message_of(start_from('run/iter_4.pth', *options))
    assert 'run/iter_4.pth' in message
    assert words in message
    assert 'Give the config' in message


@pytest.mark.parametrize('how', ['--resume', 'load_from'])
def test_checkpoints_of_another_method(place, run, how):
    config = os.path.join(place, 'fitnet.py')
    with open(config, 'w') as file:
        file.write(f"""\
_base_ = [{tiny.SEG_CONFIG!r}]
model = dict(
    _delete_=True, type='mmsinger.FitNetDistiller', layers=(1, 3),
    student={{{{_base_.model.student}}}}, teacher={{{{_base_.model.teacher}}}})
""")
    args = ['--resume', 'run/iter_4.pth'] if how == '--resume' else \
        ['--cfg-options', 'load_from=run/iter_4.pth']
    message = message_of(forked.run(
        'train.py', config, '--work-dir', 'other', *args, cwd=place,
        check=False))
    assert "model.type: 'mmsinger.SiNGERDistiller' then, " \
        "'mmsinger.FitNetDistiller' now" in message


def test_a_plain_student_may_start_a_distiller(place, run):
    result = train(place, 'started', 'load_from=run/iter_6_student.pth',
                   'train_cfg.max_iters=1', args=['--no-validate'])
    assert 'tensors of a plain checkpoint go to the student' in result.stdout
    result = train(place, 'again', 'load_from=run/iter_6_student.pth',
                   'model.student.decode_head.num_classes=4', check=False)
    assert 'decode_head.conv_seg.weight: (3, 16, 1, 1) in the file, ' \
        '(4, 16, 1, 1) in the model' in message_of(result)


def test_load_from_holds_until_there_is_something_to_resume(place, run):
    for step, source in ((1, 'run/iter_6.pth'), (2, 'late/iter_1.pth')):
        result = train(place, 'late', 'load_from=run/iter_6.pth',
                       f'train_cfg.max_iters={step}',
                       'default_hooks.checkpoint.interval=1',
                       args=['--no-validate', '--resume'])
        assert f'oad checkpoint from {source}' in result.stdout or \
            f'resumed from {source}' in result.stdout, result.stdout
    result = train(place, 'later', 'load_from=nowhere.pth',
                   args=['--resume'], check=False)
    assert "load_from='nowhere.pth'" in message_of(result)


# -- what may differ ----------------------------------------------------------


def test_what_only_the_start_reads_is_said(place, run):
    train(place, 'begun', 'model.adapter.init=random',
          'model.targets.subspace.type=mmsinger.RemoveOutlierSubspace',
          'model.task_loss_weight=0.5', 'train_cfg.max_iters=2')
    output = train(
        place, 'begun', 'model.adapter.init=nullspace',
        'model.targets.subspace.type=mmsinger.RemoveOutlierSubspace',
        'model.targets.subspace.mad=9', 'model.task_loss_weight=0.25',
        'train_cfg.max_iters=3', args=('--resume', )).stdout
    holds, no_effect = output.split('the values of now hold.')[1].split(
        'These have no effect any more')
    assert 'model.task_loss_weight: 0.5 then, 0.25 now' in holds
    assert "model.adapter.init: 'random' then, 'nullspace' now" in no_effect
    assert 'model.targets.subspace.mad: ' in no_effect
    assert 'mad' not in holds and 'init' not in holds


def copied(place, run, name):
    """A run that ended at iteration 4."""
    folder = os.path.join(place, name)
    os.makedirs(folder)
    shutil.copy(os.path.join(run, 'iter_4.pth'), folder)
    return folder


def test_nothing_is_said_where_nothing_differs(place, run):
    folder = copied(place, run, 'same')
    result = train(place, 'same', args=['--resume'])
    assert 'differs' not in result.stdout
    for part in ('state_dict', 'optimizer'):
        first, second = (torch.load(os.path.join(one, 'iter_6.pth'),
                                    weights_only=False)[part]
                         for one in (folder, run))
        assert str(first) == str(second)


@pytest.mark.parametrize('name, options', [
    ('slower', [f'{ADAPTERS}=0.01']),
    ('longer', ['train_cfg.max_iters=8', 'param_scheduler.0.end=8',
                'param_scheduler.0.T_max=8']),
    ('higher', ['optim_wrapper.optimizer.lr=0.01'])])
def test_rates_and_schedule_are_the_configs(place, run, name, options):
    """Advice of the collapse warning: slower adapters, then --resume."""
    folder = copied(place, run, name)
    result = train(place, name, *options, args=['--resume'])
    assert f'{options[0].split("=")[0]}: ' in result.stdout
    assert 'Learning rates, weight decay and schedule are' in result.stdout
    train(place, f'{name}_all', *options)
    last = max(one for one in os.listdir(folder)
               if one.startswith('iter_') and 'student' not in one)
    assert learning_rates(os.path.join(folder, last)) == \
        learning_rates(os.path.join(place, f'{name}_all', last)) != \
        learning_rates(os.path.join(run, 'iter_6.pth'))


def test_moments_stay_with_their_parameters(place, run):
    folder = copied(place, run, 'moments')
    content = torch.load(os.path.join(folder, 'iter_4.pth'),
                         weights_only=False)
    names = content['optimizer_names']
    # As of a constructor that goes through the parameters the other way
    content['optimizer_names'] = names[::-1]
    state = content['optimizer']['state']
    content['optimizer']['state'] = {
        len(names) - 1 - i: value for i, value in state.items()}
    torch.save(content, os.path.join(folder, 'iter_4.pth'))
    train(place, 'moments', args=['--resume'])
    first, second = (torch.load(os.path.join(one, 'iter_6.pth'),
                                weights_only=False)['state_dict']
                     for one in (folder, run))
    assert all(torch.equal(first[key], value)
               for key, value in second.items())


def test_another_optimizer_is_refused(place, run):
    message = message_of(train(
        place, 'other', 'optim_wrapper.optimizer.type=RAdam',
        args=['--resume', 'run/iter_4.pth'], check=False))
    assert "optim_wrapper.optimizer.type: 'AdamW' then, 'RAdam' now" in message


# -- work dirs ----------------------------------------------------------------


def test_a_second_run_is_refused(place):
    folder = os.path.join(place, 'taken')
    os.makedirs(folder)
    lock_folder(folder)
    lock_folder(folder)  # its own
    try:
        message = message_of(train(place, 'taken', check=False))
    finally:
        unlock_folder(folder)
    assert f'process {os.getpid()} on ' in message
    assert '--work-dir' in message
    assert os.listdir(folder) == []


def test_a_lock_left_behind_locks_nobody_out(place):
    folder = os.path.join(place, 'left')
    os.makedirs(folder)
    with open(os.path.join(folder, LOCK), 'w') as file:
        file.write('process 1 on elsewhere')
    lock_folder(folder)
    with open(os.path.join(folder, LOCK)) as file:
        assert str(os.getpid()) in file.read()
    unlock_folder(folder)
    assert os.listdir(folder) == []


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / 'precious').write_text('kept')
    (tmp_path / LOCK).symlink_to(tmp_path / 'precious')
    with pytest.raises(ConfigError, match='is a link'):
        lock_folder(str(tmp_path))
    assert (tmp_path / 'precious').read_text() == 'kept'


def test_the_lock_of_another_user(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text('process 1')

    def refuse(*_):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(os, 'open', refuse)
    with pytest.raises(ConfigError, match="another user's run.*--work-dir"):
        lock_folder(str(tmp_path))


def test_json_has_no_numbers_that_are_none(tmp_path):
    write_json(dict(a=[float('nan'), 1.5], b=np.float32(2)),
               str(tmp_path / 'x.json'))
    assert json.loads((tmp_path / 'x.json').read_text()) == dict(
        a=[None, 1.5], b=2.)


def test_a_file_behind_a_link_is_written_and_keeps_its_permissions(tmp_path):
    (tmp_path / 'file').write_text('old')
    (tmp_path / 'file').chmod(0o640)
    (tmp_path / 'link').symlink_to('file')
    with atomic_write(str(tmp_path / 'link')) as temporary:
        with open(temporary, 'w') as file:
            file.write('new')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'file').read_text() == 'new'
    assert (tmp_path / 'file').stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_permissions_that_others_get(tmp_path):
    (tmp_path / 'plain').touch()
    with atomic_write(str(tmp_path / 'file')):
        pass
    assert (tmp_path / 'file').stat().st_mode == \
        (tmp_path / 'plain').stat().st_mode


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    path = str(tmp_path / 'pipe')
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(path) as name, open(name, 'w') as file:
        file.write('new')
    assert os.read(reader, 10) == b'new'
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(path).st_mode)
    assert os.listdir(tmp_path) == ['pipe']


def test_a_student_does_not_overwrite_its_source(place, run):
    path = os.path.join(run, 'iter_6.pth')
    with pytest.raises(ConfigError, match='the checkpoint itself'):
        export_student(path, os.path.join(run, '..', 'run', 'iter_6.pth'))
