"""Two processes (gloo) on the tiny run: DistributedDataParallel and FSDP."""
import glob
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from mmengine.registry import init_default_scope
from torch import nn

import forked
from mmsinger.engine.prepare import load_config, prepare_training
from mmsinger.engine.hooks import diagnostics_hook
from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS
from tiny import ROOT, SEG_CONFIG, workplace

WORLD = 2
RUNS = dict(
    features_only={'model.task_loss_weight': 0,
                   'model.target_norm': 'standardise',
                   'model.targets': dict(outliers=dict(
                       type='mmsinger.RemoveOutlierSubspace', mad=0.5,
                       inside=True))},
    with_task_loss={
        'model.task_loss_weight': 1,
        # the head reads both levels of the neck, or DDP would rightly complain
        'model.student.decode_head.input_transform': 'resize_concat',
        'model.student.decode_head.in_index': [0, 1],
        'model.student.decode_head.in_channels': [16, 16]})


# The same images in the same order, whoever reads them
STEPS = 6
SAME = {
    'randomness': dict(seed=3),
    'param_scheduler': None,
    'train_dataloader.dataset.pipeline.2.prob': 0.,
    'train_cfg.max_iters': STEPS,
    'default_hooks.checkpoint.interval': 100,
}
LEARNT = dict(
    features_only={**SAME, **RUNS['features_only'],
                   'model.target_norm': None},
    # SyncBN needs a GPU; group norm knows no batch
    with_task_loss={**SAME, **RUNS['with_task_loss'],
                    'model.student.decode_head.norm_cfg': dict(
                        _delete_=True, type='GN', num_groups=4)})

FSDP = {**LEARNT['features_only'],
        'strategy': dict(type='mmsinger.FSDPStrategy'),
        'default_hooks.checkpoint.interval': 3,
        'custom_hooks': [dict(type='mmsinger.SiNGERAdapterHook'),
                         dict(type='mmsinger.DiagnosticsHook', interval=2)]}


def train(folder, name, options, launcher='none', batch_size=2,
          validate=False):
    """A short run; what this process has in the end."""
    from mmengine.hooks import Hook
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from mmsinger.engine.unwrap import full_parameters, unwrap

    class Recorder(Hook):
        priority = 'LOWEST'

        def __init__(self):
            self.start, self.paths, self.losses = None, [], []

        def before_train(self, runner):
            self.start = state(runner)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.paths += [
                sample.img_path for sample in data_batch['data_samples']]

        def after_train_iter(self, runner, batch_idx, data_batch=None,
                             outputs=None):
            self.losses.append({name: value.item()
                                for name, value in outputs.items()
                                if 'loss' in name})

    def state(runner):
        module = unwrap(runner.model)
        with full_parameters(runner.model):
            tensors = {name.replace('_fsdp_wrapped_module.', ''): value
                       for name, value in module.named_parameters()}
            for part in ('target_norms', 'subspaces'):
                tensors.update((f'{part}.{key}', value) for key, value in
                               getattr(module, part, nn.Module()
                                       ).named_buffers())
            return {key: value.detach().clone()
                    for key, value in tensors.items()}

    cfg = load_config(SEG_CONFIG, {
        'train_cfg.max_iters': 3, 'train_dataloader.batch_size': batch_size,
        'default_hooks.checkpoint.interval': 3,
        'default_hooks.checkpoint.save_best': None,
        'work_dir': os.path.join(folder, name), 'launcher': launcher,
        # other random numbers in each process: only broadcasts make them agree
        'randomness.diff_rank_seed': True, **options})
    cfg.experiment_name = cfg.visualizer.name = f'{name}_{uuid.uuid4().hex}'
    if not validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    prepare_training(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else \
        Runner.from_cfg(cfg)
    recorder = Recorder()
    runner.register_hook(recorder, recorder.priority)
    runner.train()
    return dict(
        start=recorder.start, end=state(runner), paths=recorder.paths,
        losses=recorder.losses, held=(
            held(runner.model), held(unwrap(runner.model).teacher)),
        find_unused=getattr(runner.model, 'find_unused_parameters', None),
        teacher=[name for name, _ in runner.model.named_parameters()
                 if 'teacher' in name],
        trained=[name for name, p in unwrap(runner.model).named_parameters()
                 if p.requires_grad])


def held(module):
    """Numbers in the parameters that this process holds."""
    return sum((p.to_local() if hasattr(p, 'to_local') else p).numel()
               for p in module.parameters())


def worker(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(WORLD), CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    os.chdir(folder)
    from yapf.yapflib import yapf_api

    import mmsinger  # noqa: F401
    from mmsinger.models import BaseDistiller
    yapf_api.FormatCode = lambda text, **_: (text, True)
    results = {}
    for name, options in LEARNT.items():  # alone, each at something else
        if rank == 0:
            results[f'whole_{name}'] = train(
                folder, f'whole_{name}', options, batch_size=4)
        else:
            results[f'accumulated_{name}'] = train(
                folder, f'accumulated_{name}', {
                    **options, 'optim_wrapper.accumulative_counts': 2,
                    'train_cfg.max_iters': 2 * STEPS})
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank,
        world_size=WORLD)
    for name, options in RUNS.items():
        results[name] = train(folder, name, options, 'pytorch')
    for name, options in LEARNT.items():
        results[f'shared_{name}'] = train(
            folder, f'shared_{name}', options, 'pytorch')
    results['shared_fsdp'] = train(
        folder, 'shared_fsdp', FSDP, 'pytorch', validate=True)
    results['shared_fsdp_resumed'] = train(folder, 'shared_fsdp_resumed', {
        **FSDP, 'strategy.shard_teacher': True, 'resume': True,
        'load_from': 'shared_fsdp/iter_3.pth'}, 'pytorch')
    results['fsdp_from_a_student'] = train(folder, 'fsdp_from_a_student', {
        **FSDP, 'load_from': 'shared_fsdp/iter_6_student.pth'}, 'pytorch')
    try:
        train(folder, 'fsdp_remembers', {
            **FSDP, 'strategy.shard_teacher': True,
            'model.teacher.feature_cache': 8}, 'pytorch')
        results['fsdp_remembers'] = ''
    except ConfigError as error:
        results['fsdp_remembers'] = str(error)

    BaseDistiller._freeze_unreached = lambda *_: None
    try:
        train(folder, 'unfrozen', RUNS['features_only'], 'pytorch')
        results['unfrozen'] = ''
    except RuntimeError as error:
        results['unfrozen'] = str(error)
    torch.save(results, f'rank_{rank}.pth')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip('torch without distributed')
    folder = workplace(tmp_path_factory.mktemp('distributed'))
    multiprocessing.get_context('forkserver').set_forkserver_preload(
        forked.LIBRARIES)
    torch.multiprocessing.start_processes(
        worker, (folder, ), nprocs=WORLD, start_method='forkserver')
    return folder, [torch.load(os.path.join(folder, f'rank_{rank}.pth'))
                    for rank in range(WORLD)]


@pytest.mark.parametrize('name', RUNS)
def test_processes_agree(outcome, name):
    _, ranks = outcome
    first, second = (results[name] for results in ranks)
    assert first['find_unused'] is False
    for moment in ('start', 'end'):
        assert first[moment].keys() == second[moment].keys()
        for key, value in first[moment].items():
            assert torch.isfinite(value).all(), key
            assert torch.equal(value, second[moment][key]), (moment, key)
    # … on different images
    assert len(first['paths']) == len(second['paths']) == 6
    assert not set(first['paths'][:4]) & set(second['paths'][:4])


@pytest.mark.parametrize('name', RUNS)
def test_everything_that_is_trained_moved(outcome, name):
    result = outcome[1][0][name]
    assert result['trained'] and not result['teacher']
    still = [key for key in result['trained']
             if torch.equal(result['start'][key], result['end'][key])]
    assert not still
    assert all(result['start'][f'adapters.{layer}.up'].abs().sum() > 0
               for layer in (1, 3))
    frozen = set(result['end']) - set(result['trained'])
    assert all(torch.equal(result['start'][key], result['end'][key])
               for key in frozen)
    assert any('decode_head' in key for key in frozen) == \
        (name != 'with_task_loss')


def test_parameters_without_gradient_would_be_refused(outcome):
    """What freezing them at task_loss_weight=0 is for."""
    for results in outcome[1]:
        assert 'no part in the losses' in results['unfrozen'] and \
            'find_unused_parameters=True' in results['unfrozen']


@pytest.mark.parametrize('name', RUNS)
def test_files_are_written_once(outcome, name):
    folder, ranks = outcome
    names = sorted(f for f in os.listdir(os.path.join(folder, name))
                   if f.endswith(('.pth', '.tmp', 'student.py')))
    assert names == ['iter_3.pth', 'iter_3_student.pth',
                     'tiny_seg_student.py']
    student = torch.load(os.path.join(folder, name, 'iter_3_student.pth'),
                         weights_only=False)['state_dict']
    for key, value in ranks[1][name]['end'].items():
        if key.startswith('student.'):
            assert torch.equal(student[key[len('student.'):]], value)


def steps_of(results, name):
    """The losses of each step as means over the images of all its parts, and
    these images."""
    parts = [ranks[name] for ranks in results if name in ranks]
    losses = [part['losses'] for part in parts]
    paths = [part['paths'] for part in parts]
    micro = len(losses[0]) // STEPS
    count = len(paths[0]) // STEPS
    curve = []
    for step in range(STEPS):
        pieces = [piece for rank in losses
                  for piece in rank[step * micro:(step + 1) * micro]]
        curve.append({key: sum(piece[key] for piece in pieces) / len(pieces)
                      for key in pieces[0]})
    images = [sorted(path for rank in paths
                     for path in rank[step * count:(step + 1) * count])
              for step in range(STEPS)]
    return curve, images


@pytest.mark.parametrize('how', ['shared', 'accumulated'])
@pytest.mark.parametrize('name', LEARNT)
def test_two_small_batches_are_one_large_batch(outcome, name, how):
    """Two processes, or two steps of gradient accumulation."""
    _, results = outcome
    whole, images = steps_of(results, f'whole_{name}')
    parts, same_images = steps_of(results, f'{how}_{name}')
    assert images == same_images and len(set(map(tuple, images))) > 1
    assert {'distill.loss_kd', 'distill.loss_outlier',
            'distill.loss_info'} <= whole[0].keys()
    for expected, found in zip(whole, parts):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=0), key
    assert all(first != last for first, last in
               zip(whole[0].values(), whole[-1].values()))
    adapters = [next(ranks[f'{kind}_{name}']['end'] for ranks in results
                     if f'{kind}_{name}' in ranks) for kind in ('whole', how)]
    for key, value in adapters[0].items():
        if key.startswith('adapters.'):
            torch.testing.assert_close(adapters[1][key], value,
                                       rtol=1e-5, atol=1e-5)


def test_fsdp_trains_as_one_process(outcome):
    folder, results = outcome
    whole, images = steps_of(results, 'whole_features_only')
    parts, same_images = steps_of(results, 'shared_fsdp')
    assert images == same_images
    for expected, found in zip(whole, parts):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=0), key
    expected = results[0]['whole_features_only']
    student, teacher = expected['held']
    for ranks in results:
        for moment in ('start', 'end'):
            found = ranks['shared_fsdp'][moment]
            assert found.keys() == expected[moment].keys()
            for key, value in expected[moment].items():
                torch.testing.assert_close(found[key], value,
                                           rtol=1e-4, atol=2e-5)
        # half of the student here, and the whole teacher
        held = ranks['shared_fsdp']['held']
        assert held[0] < 0.6 * student and held[1] == teacher
    log, = glob.glob(os.path.join(folder, 'shared_fsdp', '2*', 'vis_data',
                                  '2*.json'))
    with open(log) as file:
        names = set().union(*(json.loads(line) for line in file))
    assert 'mIoU' in names and 'diagnostics/e_safe_up_1' in names


def test_fsdp_resumes_and_divides_the_teacher(outcome):
    _, results = outcome
    for ranks in results:
        found, expected = ranks['shared_fsdp_resumed'], ranks['shared_fsdp']
        assert len(found['losses']) == STEPS - 3
        assert found['held'][1] < 0.7 * expected['held'][1]
        for key, value in expected['end'].items():
            # A last bit of a gradient depends on where tensors lie in memory
            torch.testing.assert_close(found['end'][key], value,
                                       rtol=1e-5, atol=1e-7)


def test_fsdp_begins_from_a_plain_student(outcome):
    folder, results = outcome
    student = checkpoint(folder, 'shared_fsdp/iter_6_student.pth')
    for ranks in results:
        start = ranks['fsdp_from_a_student']['start']
        for key, value in student['state_dict'].items():
            if f'student.{key}' in start:  # parameters, not buffers
                assert torch.equal(start[f'student.{key}'], value), key


def test_fsdp_does_not_divide_a_teacher_that_is_left_out(outcome):
    for ranks in outcome[1]:
        assert 'teacher.feature_cache do not go together' in \
            ranks['fsdp_remembers']


def test_fsdp_writes_whole_files(outcome):
    folder, results = outcome
    place = os.path.join(folder, 'shared_fsdp')
    names = sorted(f for f in os.listdir(place) if f.endswith('.pth'))
    assert names == ['iter_3.pth', 'iter_3_student.pth',
                     'iter_6.pth', 'iter_6_student.pth']
    content = checkpoint(folder, 'shared_fsdp/iter_6.pth')['state_dict']
    like = checkpoint(folder, 'whole_features_only/iter_6.pth')['state_dict']
    assert {k: v.shape for k, v in content.items()} == \
        {k: v.shape for k, v in like.items()}
    student = checkpoint(folder, 'shared_fsdp/iter_6_student.pth')
    for key, value in results[1]['shared_fsdp']['end'].items():
        assert torch.equal(content[key], value)
        if key.startswith('student.'):
            assert torch.equal(
                student['state_dict'][key[len('student.'):]], value)


@pytest.mark.parametrize('options,message', [
    (['strategy.type=mmsinger.FSDPStrategy'], 'torchrun'),
    (['strategy.type=mmsinger.FSDPStrategy',
      'strategy.state_dict_cfg=local'], "give 'full'"),
    (['strategy.type=mmsinger.FSDPStrategy',
      'strategy.skip_init_weights=True'],
     'skip_init_weights=True is not valid'),
])
def test_fsdp_says_what_it_cannot_do(outcome, options, message):
    result = forked.run('train.py', SEG_CONFIG, '--no-validate',
                        '--cfg-options', *options, cwd=outcome[0],
                        check=False)
    assert result.returncode == 1
    assert message in result.stdout and 'Traceback' not in result.stdout


def run_of_six_steps(name, batch_size, *more, resume=None, **options):
    """Command line of a run whose six steps see the same four images each,
    however these are divided."""
    options = {
        'train_cfg.max_iters': STEPS,
        'train_dataloader.batch_size': batch_size,
        'default_hooks.checkpoint.interval': 3,
        'default_hooks.checkpoint.save_best': None, 'param_scheduler': None,
        'train_dataloader.dataset.pipeline.2.prob': 0., 'randomness.seed': 3,
        'model.task_loss_weight': 0, 'auto_scale_lr.base_batch_size': 2,
        **options}
    return [SEG_CONFIG, '--work-dir', name, '--no-validate',
            '--auto-scale-lr', *more,
            *(('--resume', resume) if resume else ()), '--cfg-options',
            *(f'{key}={value}' for key, value in options.items())]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A run of one process, and two that change to another number."""
    folder = workplace(tmp_path_factory.mktemp('runs'))
    torchrun = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         f'--nproc_per_node={WORLD}', os.path.join(ROOT, 'tools/train.py'),
         *run_of_six_steps('two', 2, '--launcher', 'pytorch',
                           **{'train_cfg.max_iters': 3})],
        cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=dict(
            os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES=''))
    forked.run('train.py', *run_of_six_steps('one', 4), cwd=folder)
    forked.run('train.py', *run_of_six_steps('accumulated', 2, **{
        'optim_wrapper.accumulative_counts': 2, 'train_cfg.max_iters': 12,
        'default_hooks.checkpoint.interval': 12}), cwd=folder)
    port = str(unused_port())
    pair = [forked.start(  # with what torchrun sets, but warm
        'train.py', *run_of_six_steps('one_then_two', 2, '--launcher',
                                      'pytorch', resume='one/iter_3.pth'),
        cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD), MASTER_ADDR='localhost',
        MASTER_PORT=port) for rank in range(WORLD)]
    for process in pair:
        process.finish()
    output, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, output[-6000:]
    forked.run('train.py', *run_of_six_steps(
        'two_then_one', 4, resume='two/iter_3.pth'), cwd=folder)
    return folder


def unused_port():
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def checkpoint(folder, name):
    return torch.load(os.path.join(folder, name), weights_only=False)


@pytest.mark.parametrize('name', ['one_then_two', 'two_then_one'])
def test_resumes_on_another_number_of_processes(runs, name):
    expected = checkpoint(runs, 'one/iter_6.pth')['state_dict']
    halfway = checkpoint(runs, 'one/iter_3.pth')['state_dict']
    found = checkpoint(runs, f'{name}/iter_6.pth')['state_dict']
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)
    key = 'student.backbone.patch_embed.projection.weight'
    assert (halfway[key] - expected[key]).abs().max() > 1e-3
    assert not os.path.exists(os.path.join(runs, name, 'iter_3.pth'))


@pytest.mark.parametrize('name', ['one/iter_6.pth', 'two/iter_3.pth',
                                  'accumulated/iter_12.pth'])
def test_learning_rate_is_scaled_by_images_a_step(runs, name):
    """By 4 images over 2, whether of one process, of two, or accumulated."""
    groups = checkpoint(runs, name)['optimizer']['param_groups']
    multiples = {round(group['lr'] / 1e-3, 9) for group in groups}
    assert multiples == {2., 2. * 10, 2. * 0.1}  # lr_mult of the recipe


def test_pictures_need_a_whole_model(outcome, monkeypatch):
    monkeypatch.chdir(outcome[0])
    monkeypatch.setattr(diagnostics_hook, 'is_sharded', lambda model: True)
    init_default_scope('mmseg')
    runner = SimpleNamespace(model=MODELS.build(load_config(SEG_CONFIG).model))
    with pytest.raises(ConfigError, match='tools/plot.py'):
        diagnostics_hook.DiagnosticsHook(draw=True).before_train(runner)
