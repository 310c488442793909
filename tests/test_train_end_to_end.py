"""Runs through the command line tools, from data on disk to a student that
loads without mmsinger."""
import glob
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch

import forked
import tiny
from mmsinger.engine.prepare import load_config
from mmsinger.engine.optim import CPUAmpOptimWrapper
from mmsinger.errors import ConfigError

CONFIGS = os.path.join(tiny.TESTS, 'configs')
# Statistics, dropout and drop path have to survive an interruption too.
LONG = [
    '--cfg-options', 'train_cfg.max_iters=24', 'train_cfg.val_interval=12',
    'param_scheduler.0.end=24', 'default_hooks.checkpoint.interval=4',
    'model.target_norm=standardise',
    "model.targets=dict(outliers=dict(type='mmsinger.RemoveOutlierSubspace', "
    'mad=0.5, inside=True))',
    'model.student.backbone.drop_path_rate=0.2',
    'model.student.backbone.drop_rate=0.1',
]

# Loads the student where mmsinger cannot be imported, and evaluates it.
PLAIN = '''
import json, os, sys, torch
sys.modules['mmsinger'] = None
folder, config, checkpoint = sys.argv[1:]
import importlib.util
spec = importlib.util.find_spec('torchvision')
place = list(spec.submodule_search_locations)[0]
for name in os.listdir(place):  # beside a CPU torch these do not load
    if name.startswith('_C') and name.endswith(('.so', '.pyd')):
        try:
            torch.ops.load_library(os.path.join(place, name))
        except OSError:
            pass
if not hasattr(torch.ops.torchvision, 'nms'):
    library = torch.library.Library('torchvision', 'DEF')
    for name in ('nms', 'qnms'):
        library.define(name + '(Tensor dets, Tensor scores, '
                       'float iou_threshold) -> Tensor')
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(config)
assert 'mmsinger' not in cfg.pretty_text
cfg.work_dir = folder
cfg.resume = False
runner = Runner.from_cfg(cfg)
content = torch.load(checkpoint, weights_only=True)
result = runner.model.load_state_dict(content['state_dict'], strict=True)
metrics = runner.test()
assert not any(name.split('.')[0] == 'mmsinger' and module is not None
               for name, module in sys.modules.items())
with open(os.path.join(folder, 'metrics.json'), 'w') as file:
    json.dump(metrics, file, default=float)
'''


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def metric(folder):
    """What tools/test.py wrote."""
    file, = glob.glob(os.path.join(folder, '2*', '2*.json'))
    with open(file) as content:
        return json.loads(content.read())['mIoU']


@pytest.fixture(scope='module')
def long_run(place):
    """An uninterrupted run, through a real command line."""
    result = tiny.run_tool('train.py', tiny.SEG_CONFIG, '--work-dir', 'long',
                           *LONG, cwd=place)
    return os.path.join(place, 'long'), result.stdout


def test_files_of_a_run(long_run):
    folder, _ = long_run
    names = set(os.listdir(folder))
    assert {'iter_24.pth', 'iter_24_student.pth', 'iter_20_student.pth',
            'tiny_seg.py', 'tiny_seg_student.py', 'last_checkpoint'} <= names
    # Its own runs do not write over these
    assert load_config(os.path.join(
        folder, 'tiny_seg_student.py')).work_dir == 'long_student'
    best = [n for n in names if n.startswith('best_mIoU_iter_')]
    assert len(best) == 2
    assert {n.replace('_student', '') for n in best} == \
        {n for n in best if 'student' not in n}
    # max_keep_ckpts=2: the students of removed checkpoints go with them
    steps = {n for n in names if n.startswith('iter_')}
    assert steps == {f'iter_{i}{s}.pth' for i in (20, 24)
                     for s in ('', '_student')}


def test_the_log_begins_with_what_matters(long_run):
    _, output = long_run
    assert 'Parameters by learning rate and weight decay:' in output
    for noise in ('paramwise_options', 'Could not import OneDL',
                  'MultiScaleDeformableAttention', 'The draw is False',
                  'FileClient'):
        assert noise not in output


def test_what_a_training_checkpoint_holds(long_run):
    folder, _ = long_run
    content = torch.load(os.path.join(folder, 'iter_24.pth'),
                         weights_only=False)
    parts = {key.split('.')[0] for key in content['state_dict']}
    assert parts == {'student', 'projectors', 'adapters', 'target_norms',
                     'subspaces'}
    assert not any('teacher' in key for key in content['state_dict'])
    assert content['optimizer']['state']
    student = weights(os.path.join(folder, 'iter_24_student.pth'))
    for key, value in student.items():
        assert torch.equal(value, content['state_dict'][f'student.{key}'])


def test_training_moves_everything(place, long_run):
    folder, output = long_run
    first = weights(os.path.join(folder, 'iter_20.pth'))
    last = weights(os.path.join(folder, 'iter_24.pth'))
    for part in ('student.backbone.layers.0', 'student.decode_head.conv_seg',
                 'projectors.1', 'projectors.3', 'adapters.1', 'adapters.3'):
        moved = [not torch.equal(first[k], last[k]) for k in last
                 if k.startswith(part)]
        assert moved and any(moved), part
    losses = [float(line.split(' loss: ')[1].split()[0])
              for line in output.splitlines() if ' loss: ' in line]
    assert losses[-1] < losses[0]


@pytest.fixture(scope='module')
def plain_metrics(place, long_run):
    """Of the student in a process that has no mmsinger."""
    folder, _ = long_run
    out = os.path.join(place, 'plain')
    os.makedirs(out)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    result = subprocess.run(
        [sys.executable, '-c', PLAIN, out,
         os.path.join(folder, 'tiny_seg_student.py'),
         os.path.join(folder, 'iter_24_student.pth')],
        cwd=place, env=dict(env, OMP_NUM_THREADS='1'), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-4000:]
    with open(os.path.join(out, 'metrics.json')) as file:
        return json.load(file)


@pytest.mark.parametrize('config, checkpoint', [
    (tiny.SEG_CONFIG, 'iter_24.pth'),
    (tiny.SEG_CONFIG, 'iter_24_student.pth'),
    ('long/tiny_seg_student.py', 'iter_24_student.pth'),
], ids=['recipe-training', 'recipe-student', 'plain-student'])
def test_student_scores_the_same_everywhere(place, long_run, plain_metrics,
                                            tmp_path, config, checkpoint):
    options = LONG if config is tiny.SEG_CONFIG else []
    forked.run('test.py', config, os.path.join('long', checkpoint),
               '--work-dir', str(tmp_path), *options, cwd=place)
    assert 0 < metric(tmp_path) == pytest.approx(plain_metrics['mIoU'])


def test_a_checkpoint_of_another_model_is_refused(place, long_run):
    result = forked.run(
        'test.py', tiny.SEG_CONFIG, 'long/iter_24_student.pth', '--work-dir',
        'other', '--cfg-options', 'model.student.backbone.embed_dims=32',
        'model.student.neck.in_channels=[32,32]', cwd=place, check=False)
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout
    assert 'backbone.cls_token' in result.stdout


def test_predictions_are_written(place, long_run):
    forked.run('test.py', tiny.SEG_CONFIG, 'long/iter_24.pth', '--work-dir',
               'written', '--out', 'predictions.pkl', *LONG, cwd=place)
    with open(os.path.join(place, 'predictions.pkl'), 'rb') as file:
        assert len(pickle.load(file)) == 8
    forked.run('test.py', tiny.SEG_CONFIG, 'long/iter_24.pth', '--work-dir',
               'written', '--out', 'maps', *LONG, cwd=place)
    assert len(os.listdir(os.path.join(place, 'maps'))) == 8


def test_testing_leaves_the_records_of_the_run(place, long_run):
    folder, _ = long_run

    def records():
        content = {}
        for name in os.listdir(folder):
            if os.path.isfile(os.path.join(folder, name)):
                with open(os.path.join(folder, name), 'rb') as file:
                    content[name] = file.read()
        return content

    before = records()
    forked.run('test.py', tiny.SEG_CONFIG, 'long/iter_24_student.pth',
               '--work-dir', 'long', *LONG, cwd=place)
    assert records() == before


@pytest.mark.parametrize('args, words', [
    (['--cfg-options', 'test_dataloader=None', 'test_evaluator=None',
      'test_cfg=None'], 'tools/linear_eval.py'),
    (['--cfg-options', 'test_cfg=None'], 'no test_cfg'),
    (['--cfg-options', 'test_evaluator=[]'], 'no test_evaluator'),
    (['--show-dir', 'painted', '--cfg-options', 'visualizer=None'],
     '--show-dir'),
    (['--out', 'maps', '--cfg-options',
      "test_evaluator=dict(_delete_=True, type='mmpretrain.Accuracy')"],
     'ends with .pkl'),
    (['--out', 'gone/predictions.pkl'], 'no folder')])
def test_what_cannot_be_tested_or_written(place, long_run, args, words):
    result = forked.run('test.py', tiny.SEG_CONFIG, 'long/iter_24.pth',
                        '--work-dir', 'other', *args, cwd=place, check=False)
    assert result.returncode == 1 and 'Traceback' not in result.stdout
    assert words in result.stdout


def test_killed_run_resumes_to_the_same_weights(place, long_run):
    """Bit by bit, with random flips, dropout and drop path on."""
    folder, _ = long_run
    run = forked.start('train.py', tiny.SEG_CONFIG, '--work-dir', 'killed',
                       *LONG, cwd=place)
    pointer = os.path.join(place, 'killed', 'last_checkpoint')
    deadline = time.monotonic() + 120
    while not os.path.exists(pointer) or 'iter_8' not in open(pointer).read():
        assert run.process.is_alive(), run.output[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.process.kill()
    result = run.finish(check=False)
    assert result.returncode == -9
    with open(pointer) as file:
        last = file.read()
    assert 'iter_24' not in last and os.path.isfile(last)

    moved = os.path.join(place, 'teacher.pth.away')
    os.rename(os.path.join(place, 'teacher.pth'), moved)
    without = forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'killed',
                         '--resume', *LONG, cwd=place, check=False)
    os.rename(moved, os.path.join(place, 'teacher.pth'))
    assert without.returncode == 1
    assert 'Traceback' not in without.stdout
    assert "teacher.checkpoint='teacher.pth'" in without.stdout

    resumed = forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'killed',
                         '--resume', *LONG, cwd=place)
    assert 'resumed epoch' in resumed.stdout
    assert 'Iter(train) [ 1/24]' not in resumed.stdout
    expected = weights(os.path.join(folder, 'iter_24.pth'))
    found = weights(os.path.join(place, 'killed', 'iter_24.pth'))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_amp_options_and_no_validation(place):
    """bf16 autocast, --auto-scale-lr, --cfg-options, --no-validate."""
    result = forked.run(
        'train.py', tiny.SEG_CONFIG, '--work-dir', 'amp', '--amp',
        '--auto-scale-lr', '--no-validate', '--cfg-options',
        'optim_wrapper.dtype=bfloat16', 'model.adapter.rank=2',
        'default_hooks.checkpoint.save_best=None', 'train_cfg.max_iters=2',
        cwd=place)
    content = torch.load(os.path.join(place, 'amp', 'iter_2.pth'),
                         weights_only=False)
    state = content['state_dict']
    assert state['adapters.1.down'].shape == (32, 2)
    assert state['adapters.1.down'].dtype == torch.float32
    assert 'Iter(val)' not in result.stdout
    assert 'bfloat16 on the CPU' in result.stdout
    cfg = load_config(os.path.join(place, 'amp', 'tiny_seg.py'))
    assert cfg.optim_wrapper.type == 'mmsinger.CPUAmpOptimWrapper'
    plain = load_config(os.path.join(place, 'amp', 'tiny_seg_student.py'))
    assert plain.optim_wrapper.type == 'AmpOptimWrapper'
    # batches of 4 where the recipe's rate is for 16
    assert 'Scaling the original LR by 0.25' in result.stdout


def test_cpu_amp_computes_in_bfloat16():
    linear = torch.nn.Linear(4, 4)
    wrapper = CPUAmpOptimWrapper(
        optimizer=torch.optim.SGD(linear.parameters(), lr=1.))
    with wrapper.optim_context(linear):
        output = linear(torch.randn(2, 4))
    assert output.dtype == torch.bfloat16
    wrapper.update_params(output.float().square().mean())
    assert linear.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype='float16' is not valid"):
        CPUAmpOptimWrapper(dtype='float16', optimizer=wrapper.optimizer)


@pytest.mark.parametrize('options, images', [
    ([], '4 x 1 processes x 1 accumulated'),
    (['optim_wrapper.accumulative_counts=2'], '4 x 1 processes x 2'),
    (['train_dataloader.batch_size=16'], None),
    (['train_dataloader.batch_size=8', 'optim_wrapper.accumulative_counts=2'],
     None)])
def test_a_step_of_another_size_is_noticed(place, tmp_path, options, images):
    result = forked.run(
        'train.py', tiny.SEG_CONFIG, '--work-dir', tmp_path, '--no-validate',
        '--cfg-options', 'default_hooks.checkpoint.save_best=None',
        'train_cfg.max_iters=1', *options, cwd=place)
    if images is None:
        assert 'the learning rate is made for' not in result.stdout
    else:
        assert f'train_dataloader.batch_size={images}' in result.stdout
        assert 'the learning rate is made for 16' in result.stdout


def test_auto_scale_lr_needs_a_base_batch_size(place):
    result = forked.run(
        'train.py', tiny.SEG_CONFIG, '--work-dir', 'scale',
        '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None', cwd=place,
        check=False)
    assert result.returncode == 1
    assert 'auto_scale_lr' in result.stdout
    assert 'Traceback' not in result.stdout


def test_export_of_an_older_checkpoint(place, long_run):
    folder, _ = long_run
    old = os.path.join(place, 'old.pth')
    shutil.copy(os.path.join(folder, 'iter_24.pth'), old)
    student = weights(os.path.join(folder, 'iter_24_student.pth'))
    config = os.path.join('long', 'tiny_seg.py')
    result = forked.run('export_student.py', old, '--config', config,
                        cwd=place)
    path = os.path.join(place, 'old_student.pth')
    assert f'{path}: {len(student)} tensors' in result.stdout
    content = torch.load(path, weights_only=True)
    assert content['meta']['dataset_meta']['classes'] == ('a', 'b', 'c')
    assert content['state_dict'].keys() == student.keys()
    assert all(torch.equal(content['state_dict'][k], v)
               for k, v in student.items())

    refused = forked.run(
        'export_student.py', 'teacher.pth', '--out', 'no.pth', cwd=place,
        check=False)
    assert refused.returncode == 1 and 'Traceback' not in refused.stdout
    assert 'holds no student' in refused.stdout
    assert not os.path.exists(os.path.join(place, 'no.pth'))

    other = forked.run(
        'export_student.py', old, '--out', 'no.pth', '--config',
        os.path.join(CONFIGS, 'tiny_depth.py'), cwd=place, check=False)
    assert other.returncode == 1 and 'Traceback' not in other.stdout
    assert not os.path.exists(os.path.join(place, 'no.pth'))


def write_images(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    os.makedirs(folder)
    for i in range(count):
        cv2.imwrite(os.path.join(folder, f'{i}.png'),
                    rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))


def test_classification_run(tmp_path, place):
    """mmpretrain's scope, epochs, a student without a head."""
    shutil.copy(os.path.join(place, 'teacher.pth'), tmp_path)
    for name in ('cat', 'dog'):
        write_images(tmp_path / 'images' / name, 4)
    config = os.path.join(CONFIGS, 'tiny_cls.py')
    forked.run('train.py', config, '--work-dir', 'run', cwd=tmp_path)
    folder = tmp_path / 'run'
    final = weights(folder / 'epoch_3.pth')
    student = weights(folder / 'epoch_3_student.pth')
    assert {key.split('.')[0] for key in student} == {'backbone'}
    # the final norm gets no gradient without a head; it stays in the file
    assert torch.equal(student['backbone.ln1.weight'], torch.ones(16))

    # interrupted after the second epoch
    again = tmp_path / 'again'
    again.mkdir()
    shutil.copy(folder / 'epoch_2.pth', again)
    (again / 'last_checkpoint').write_text(str(again / 'epoch_2.pth'))
    forked.run('train.py', config, '--work-dir', 'again', '--resume',
               cwd=tmp_path)
    resumed = weights(again / 'epoch_3.pth')
    for key, value in final.items():
        assert torch.equal(resumed[key], value), key


def test_depth_run(tmp_path, place):
    """mmseg's NYUDataset, DepthEstimator and VPDDepthHead."""
    shutil.copy(os.path.join(place, 'teacher.pth'), tmp_path)
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        images = tmp_path / 'nyu' / 'images' / split
        depths = tmp_path / 'nyu' / 'annotations' / split
        images.mkdir(parents=True)
        depths.mkdir(parents=True)
        for i in range(4):
            cv2.imwrite(str(images / f'room_{i}.jpg'), rng.integers(
                0, 256, (32, 32, 3)).astype(np.uint8))
            cv2.imwrite(str(depths / f'room_{i}.png'), rng.integers(
                500, 9500, (32, 32)).astype(np.uint16))
    result = forked.run('train.py', os.path.join(CONFIGS, 'tiny_depth.py'),
                        '--work-dir', 'run', cwd=tmp_path)
    assert 'distill.loss_kd' in result.stdout
    assert 'rmse' in result.stdout
    student = weights(tmp_path / 'run' / 'iter_4_student.pth')
    assert {key.split('.')[0] for key in student} == \
        {'backbone', 'neck', 'decode_head'}
    best = glob.glob(str(tmp_path / 'run' / 'best_rmse_iter_*_student.pth'))
    assert len(best) == 1


@pytest.fixture
def srun(tmp_path, monkeypatch):
    """A stand-in for slurm's srun that prints what it is asked to do."""
    command = tmp_path / 'bin' / 'srun'
    command.parent.mkdir()
    command.write_text('#!/usr/bin/env bash\n'
                       'printf "%s\\n" "$@" "PYTHONPATH=$PYTHONPATH"\n')
    command.chmod(0o755)
    monkeypatch.setenv('PATH', f'{command.parent}:{os.environ["PATH"]}')
    monkeypatch.delenv('PYTHONPATH', raising=False)

    def run(*arguments, **environment):
        result = subprocess.run(
            ['bash', os.path.join(tiny.ROOT, 'tools', 'slurm_train.sh'),
             *arguments], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=dict(os.environ, **environment))
        return result.returncode, result.stdout.splitlines()

    return run


def test_slurm_train_script(srun):
    code, words = srun('gpus', 'a job', 'my config.py', '--resume', '--amp',
                       GPUS='16', PYTHON='py', SRUN_ARGS='-w node[1-2] -v')
    script = os.path.join(tiny.ROOT, 'tools', 'train.py')
    assert code == 0
    assert words == [
        '-p', 'gpus', '--job-name=a job', '--gres=gpu:8', '--ntasks=16',
        '--ntasks-per-node=8', '--cpus-per-task=8', '--kill-on-bad-exit=1',
        '-w', 'node[1-2]', '-v', 'py', '-u', script, 'my config.py',
        '--launcher', 'slurm', '--resume', '--amp',
        f'PYTHONPATH={os.path.join(tiny.ROOT, "tools")}/..']


def test_slurm_train_script_asks_for_no_more_gpus_than_it_uses(srun):
    _, words = srun('gpus', 'job', 'config.py', GPUS='4')
    assert {'--gres=gpu:4', '--ntasks=4', '--ntasks-per-node=4'} <= set(words)
    _, words = srun('gpus', 'job', 'config.py', GPUS='4', GPUS_PER_NODE='2')
    assert {'--gres=gpu:2', '--ntasks=4', '--ntasks-per-node=2'} <= set(words)


@pytest.mark.parametrize('script, arguments', [
    ('slurm_train.sh', ['gpus', 'job']), ('dist_train.sh', ['config.py'])])
def test_scripts_without_arguments_say_what_they_need(script, arguments):
    path = os.path.join(tiny.ROOT, 'tools', script)
    result = subprocess.run(['bash', path, *arguments], text=True,
                            capture_output=True)
    assert result.returncode == 2 and not result.stdout
    assert f'tools/{script} ' in result.stderr
    assert '[options of tools/train.py]' in result.stderr


@pytest.mark.parametrize('script, arguments, words', [
    ('slurm_train.sh', ['gpus', 'job', tiny.SEG_CONFIG], 'GPUS=two'),
    ('dist_train.sh', [tiny.SEG_CONFIG, 'two'], 'GPUS=two'),
    ('dist_train.sh', ['nowhere.py', '1'], 'CONFIG=nowhere.py')])
def test_scripts_refuse_what_no_job_can_use(script, arguments, words):
    result = subprocess.run(
        ['bash', os.path.join(tiny.ROOT, 'tools', script), *arguments],
        text=True, capture_output=True, env=dict(os.environ, GPUS='two'))
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_dist_train_script(place):
    """Two processes on the CPU; DDP with all parameters used."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    result = subprocess.run(
        ['bash', os.path.join(tiny.ROOT, 'tools', 'dist_train.sh'),
         tiny.SEG_CONFIG, '2', '--work-dir', 'dist', '--no-validate',
         '--cfg-options', 'train_cfg.max_iters=2',
         'default_hooks.checkpoint.save_best=None',
         # the head reads both levels of the neck: no parameter is unused
         'model.student.decode_head.input_transform=resize_concat',
         'model.student.decode_head.in_index=[0,1]',
         'model.student.decode_head.in_channels=[16,16]'],
        cwd=place, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=dict(
            os.environ, PYTHON=sys.executable, PORT=str(port),
            OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert result.returncode == 0, result.stdout[-4000:]
    assert 'Distributed training: True' in result.stdout
    found = weights(os.path.join(place, 'dist', 'iter_2.pth'))
    assert {key.split('.')[0] for key in found} == \
        {'student', 'projectors', 'adapters'}
    assert os.path.isfile(os.path.join(place, 'dist', 'iter_2_student.pth'))
