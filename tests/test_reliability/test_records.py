"""A run is finished when its last metric is there, and only the run itself
writes into its records."""
import glob
import hashlib
import json
import os

import faulty_data
import pytest
from reproduction import job
from reproduction.plan import WORK_DIR, Job
from reproduction.workspace import Workspace, fingerprint

import forked
import tiny

KILL = dict(ACTION='os.kill(os.getpid(), signal.SIGKILL)', POINT='evaluate')


@pytest.fixture(scope='module')
def run(place):
    """A training that was not interrupted; its folder."""
    forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'run', cwd=place)
    return os.path.join(place, 'run')


def scores(folder):
    """The mIoU of each validation that was logged, by iteration."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, '*', 'vis_data',
                                              'scalars.json'))):
        with open(path) as file:
            for line in map(json.loads, file):
                if 'mIoU' in line:
                    found[line['step']] = line['mIoU']
    return found


def test_a_training_killed_in_its_last_validation(place, run):
    work_dir = os.path.join(place, 'killed')
    result = forked.run(
        faulty_data.__file__, tiny.SEG_CONFIG, '--work-dir', 'killed',
        cwd=place, check=False, AT='2', **KILL)
    assert result.returncode == -9
    assert list(scores(work_dir)) == [3]
    forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'killed',
               '--resume', cwd=place)
    assert scores(work_dir) == scores(run) and list(scores(run)) == [3, 6]
    # One more time changes nothing
    forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'killed',
               '--resume', cwd=place)
    assert scores(work_dir) == scores(run)


def test_a_linear_evaluation_killed_in_its_last_validation(place, run):
    # Its data in the task's layout
    task = os.path.join(place, 'task.py')
    base = os.path.join(tiny.ROOT, 'configs', 'linear_eval', 'seg_digits.py')
    with open(task, 'w') as file:
        file.write(
            f'_base_ = [{base!r}]\n'
            f"dataset = dict(_delete_=True, type='BaseSegDataset', data_root="
            "'scenes', img_suffix='.png', data_prefix=dict(img_path='images',"
            " seg_map_path='annotations'), metainfo=dict(classes=('a', 'b', "
            "'c'), palette=[[0] * 3] * 3), pipeline=[dict(type="
            "'LoadImageFromFile'), dict(type='LoadAnnotations'), "
            "dict(type='PackSegInputs')])\n"
            'train_dataloader = dict(batch_size=4, num_workers=0, '
            'persistent_workers=False, dataset=dataset)\n'
            'val_dataloader = test_dataloader = dict(num_workers=0, '
            'persistent_workers=False, dataset=dataset)\n'
            'model = dict(decode_head=dict(num_classes=3))\n'
            'train_cfg = dict(max_iters=4, val_interval=2)\n')
    args = [task, tiny.SEG_CONFIG, 'run/iter_6_student.pth', '--work-dir',
            'linear', '--resume']
    result = forked.run(faulty_data.__file__, *args, cwd=place, check=False,
                        TOOL='linear_eval.py', AT='2', **KILL)
    assert result.returncode == -9, result.stdout[-3000:]
    assert ' on task: ' not in result.stdout
    result = forked.run('linear_eval.py', *args, cwd=place)
    last = scores(os.path.join(place, 'linear'))[4]
    assert f'mIoU {last:.4f}' in result.stdout.split(' on task: ')[1]


def test_a_job_killed_in_its_last_validation(place, run, monkeypatch):
    monkeypatch.chdir(place)
    planned = Job('a', faulty_data.__file__, (
        tiny.SEG_CONFIG, '--work-dir', WORK_DIR, '--resume'),
        tiny.SEG_CONFIG, 0)
    workspace = Workspace('root', dict(a=planned), dict(a=['mIoU']))
    plan = dict(root='root', gpus=[], share=1, slurm=False, jobs=dict(a=dict(
        job=vars(planned), fingerprint=fingerprint(planned),
        metrics=['mIoU'], gpus=1)))
    for name, value in dict(KILL, AT='2', PYTHONPATH=tiny.ROOT).items():
        monkeypatch.setenv(name, value)
    assert 'exit code -9' in job.run(plan, 'a')
    assert workspace.record('a').status == 'failed'
    monkeypatch.setenv('AT', '0')
    assert job.run(plan, 'a') == ''
    record = workspace.record('a')
    assert record.status == 'finished'
    assert record.metrics['mIoU'] == scores(run)[6]


def test_tests_and_pictures_leave_the_records_alone(place, run):
    def records():
        return {path: hashlib.sha256(open(path, 'rb').read()).digest()
                for path in glob.glob(os.path.join(run, '**'),
                                      recursive=True) if os.path.isfile(path)}

    before = records()
    forked.run('test.py', tiny.SEG_CONFIG, 'run/iter_6.pth', '--work-dir',
               'run', cwd=place)
    forked.run('plot.py', 'curves', 'run', '--out', 'curves.svg', cwd=place)
    forked.run('plot.py', 'norms', 'run/tiny_seg.py', 'run/iter_6.pth',
               'scenes/images/0.png', '--out', 'norms.svg', cwd=place)
    after = records()
    # A test has a folder of its own, as each call has
    assert {path: after.get(path) for path in before} == before
    new = {os.path.relpath(path, run).split(os.sep)[0]
           for path in set(after) - set(before)}
    assert len(new) == 1 and all(name.startswith('2') for name in new)
