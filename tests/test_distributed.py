"""Two processes (gloo) with DistributedDataParallel on the tiny run."""
import os
import uuid

import pytest
import torch
import torch.multiprocessing

from tiny import SEG_CONFIG, workplace

WORLD = 2
RUNS = dict(
    features_only={'model.task_loss_weight': 0,
                   'model.target_norm': 'standardise'},
    with_task_loss={
        'model.task_loss_weight': 1,
        # the head reads both levels of the neck, or DDP would rightly complain
        'model.student.decode_head.input_transform': 'resize_concat',
        'model.student.decode_head.in_index': [0, 1],
        'model.student.decode_head.in_channels': [16, 16]})


def train(rank, folder, name, options):
    """Three iterations; what this process has in the end."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmsinger.engine.config import load_config, prepare_training

    class Recorder(Hook):
        priority = 'LOWEST'
        start, paths = None, []

        def before_train(self, runner):
            self.start = state(runner)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.paths = self.paths + [
                sample.img_path for sample in data_batch['data_samples']]

    def state(runner):
        module = runner.model.module
        tensors = dict(module.named_parameters())
        tensors.update((f'target_norms.{key}', value) for key, value in
                       module.target_norms.named_buffers())
        return {key: value.detach().clone()
                for key, value in tensors.items()}

    cfg = load_config(SEG_CONFIG, {
        'train_cfg.max_iters': 3, 'train_dataloader.batch_size': 2,
        'default_hooks.checkpoint.interval': 3,
        'default_hooks.checkpoint.save_best': None,
        'work_dir': os.path.join(folder, name), 'launcher': 'pytorch',
        # other random numbers in each process: only broadcasts make them agree
        'randomness.diff_rank_seed': True, **options})
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel',
                                 find_unused_parameters=False,
                                 device_ids=None)  # the CPU
    cfg.experiment_name = cfg.visualizer.name = f'{name}_{uuid.uuid4().hex}'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    prepare_training(cfg)
    runner = Runner.from_cfg(cfg)
    recorder = Recorder()
    runner.register_hook(recorder, recorder.priority)
    runner.train()
    return dict(
        start=recorder.start, end=state(runner), paths=recorder.paths,
        find_unused=runner.model.find_unused_parameters,
        teacher=[name for name, _ in runner.model.named_parameters()
                 if 'teacher' in name],
        trained=[name for name, p in runner.model.module.named_parameters()
                 if p.requires_grad])


def worker(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(WORLD), CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    os.chdir(folder)
    import mmsinger  # noqa: F401
    from mmsinger.models import BaseDistiller
    from yapf.yapflib import yapf_api
    yapf_api.FormatCode = lambda text, **_: (text, True)
    # mmengine's own set-up would ask for a GPU
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank,
        world_size=WORLD)
    results = {name: train(rank, folder, name, options)
               for name, options in RUNS.items()}

    BaseDistiller._freeze_what_features_do_not_reach = lambda self: None
    try:
        train(rank, folder, 'unfrozen', RUNS['features_only'])
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
    torch.multiprocessing.spawn(worker, (folder, ), nprocs=WORLD)
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
        assert 'did not receive grad' in results['unfrozen'] or \
            'finished reduction' in results['unfrozen']


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
