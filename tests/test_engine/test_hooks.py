"""The hooks of a training run, in a Runner on eight small scenes."""
import copy
import errno
import functools
import gc
import glob
import logging
import os
import random
import signal
import subprocess
import sys
import uuid
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import default_collate
from yapf.yapflib import yapf_api

from mmsinger.checkpoint import load_checkpoint
from mmsinger.engine.diagnostics import inlier_variances
from mmsinger.engine.hooks import (CalibrationHook, DiagnosticsHook,
                                   RandomStateHook, RunGuardHook,
                                   SafeCheckpointHook, SiNGERAdapterHook,
                                   StudentCheckpointHook, adapter_hook,
                                   calibration_hook, knn_bank_hook)
from mmsinger.engine.prepare import (add_required_hooks, fit_workers,
                                     load_config, prepare_training)
from mmsinger.engine.samples import DataError
from mmsinger.errors import ConfigError, TrainingError
from mmsinger.export import student_config
from mmsinger.files import LOCK, unlock_folder
from mmsinger.models.distillers import SiNGERDistiller
from mmsinger.registry import MODELS
import tiny
from tiny import SEG_CONFIG, workplace

ALL_HOOKS = [f'mmsinger.{hook.__name__}' for hook in (
    RandomStateHook, RunGuardHook, SiNGERAdapterHook, StudentCheckpointHook,
    CalibrationHook)]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    gc.collect()
    gc.freeze()  # mmengine collects garbage whenever it builds a data set
    yield workplace(tmp_path_factory.mktemp('hooks'))
    gc.unfreeze()


@pytest.fixture(scope='module')
def tiny_config():
    return load_config(SEG_CONFIG)


@pytest.fixture
def make(place, tiny_config, tmp_path, monkeypatch, caplog):
    """Builds a runner; dotted keys override tests/configs/tiny_seg.py."""
    monkeypatch.chdir(place)
    # formatting the dumped config takes longer than the training
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **_: (text, 1))

    def build(max_iters=2, hooks=(), validate=False, **options):
        cfg = copy.deepcopy(tiny_config)
        cfg.merge_from_dict(dict(
            {'train_cfg.max_iters': max_iters,
             'default_hooks.checkpoint.interval': 100,
             'default_hooks.checkpoint.save_last': False,
             'work_dir': str(tmp_path)}, **copy.deepcopy(options)))
        cfg.experiment_name = uuid.uuid4().hex
        cfg.visualizer.name = cfg.experiment_name
        if not validate:
            cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
            cfg.default_hooks.checkpoint.save_best = None
        prepare_training(cfg)
        runner = Runner.from_cfg(cfg)
        for hook in hooks:
            runner.register_hook(hook, hook.priority)
        runner.logger.addHandler(caplog.handler)  # it does not propagate
        return runner

    yield build
    init_default_scope('mmengine')


class Spy(Hook):
    """Calls functions at points of a run: Spy(before_train=f)."""

    def __init__(self, priority='NORMAL', **points):
        self.priority = priority
        for name, function in points.items():
            setattr(self, name, function)


class Batches(Spy):
    """Keeps what the model is fed with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append((
            [sample.img_path for sample in data_batch['data_samples']],
            torch.stack([x.float() for x in data_batch['inputs']])))


def poison_loss(at):
    """The loss of that iteration is not a number."""

    def before_train_iter(runner, batch_idx, data_batch=None):
        model = runner.model
        if runner.iter + 1 == at:
            original = model.loss
            model.loss = lambda *args: {
                k: v * float('nan') if k == 'distill.loss_kd' else v
                for k, v in original(*args).items()}

    return Spy(before_train_iter=before_train_iter)


def poison_weights(at):
    """The step of that iteration leaves a weight that is not a number."""

    def after_train_iter(runner, *args, **kwargs):
        if runner.iter + 1 == at:
            with torch.no_grad():
                runner.model.projectors['3'].weight[0, 0] = float('inf')

    return Spy(priority='HIGHEST', after_train_iter=after_train_iter)


def files(folder, pattern='*.pth'):
    return sorted(os.path.basename(p)
                  for p in glob.glob(os.path.join(str(folder), pattern)))


# -- gradient clips ----------------------------------------------------------


def one_step(make, **options):
    """How far each part of the model gets in a step of SGD at a rate of 1,
    which is the norm of the gradient that it is given; and what is logged."""
    starts, squares = {}, {}

    def keep(runner):
        starts.update({name: value.detach().clone() for name, value
                       in runner.model.named_parameters()})

    runner = make(
        max_iters=1, hooks=[Spy('LOWEST', before_train=keep)],
        **{'optim_wrapper.clip_grad': dict(max_norm=0.5),
           'optim_wrapper.optimizer': dict(
               _delete_=True, type='SGD', lr=1., weight_decay=0.),
           'optim_wrapper.paramwise_cfg': dict(
               _delete_=True, norm_decay_mult=0.), **options})
    runner.train()
    for name, value in runner.model.named_parameters():
        part = name.split('.')[0]
        squares[part] = squares.get(part, 0) + (
            value.detach() - starts[name]).square().sum().item()
    return {part: square**0.5 for part, square in squares.items()}, \
        {name: log.current() for name, log
         in runner.message_hub.log_scalars.items() if 'grad_norm' in name}


def apart(**max_norms):
    return dict(custom_hooks=[dict(type='mmsinger.ClipApartHook',
                                   max_norms=max_norms)])


def test_gradients_of_a_part_are_clipped_apart(make):
    shared, logged = one_step(make)
    assert set(logged) == {'train/grad_norm'}
    assert sum(v**2 for v in shared.values())**0.5 == pytest.approx(
        0.5, rel=1e-4)
    others, logged = one_step(make, **apart(adapters=1e-3))
    assert others.pop('adapters') == pytest.approx(1e-3, rel=1e-4)
    assert logged['train/grad_norm_adapters'] > 1e-3
    # The others are clipped without them
    assert sum(v**2 for v in others.values())**0.5 == pytest.approx(
        0.5, rel=1e-4)
    assert all(others[part] > shared[part] for part in others)


def test_the_longest_part_of_a_name_counts(make):
    found, _ = one_step(make, **apart(**{
        'student': 1e-2, 'student.backbone': 1e-3}))
    assert found['student'] == pytest.approx((1e-4 + 1e-6)**0.5, rel=1e-3)


@pytest.mark.parametrize('options, said', [
    ({'optim_wrapper.clip_grad': None}, r'needs optim_wrapper\.clip_grad='),
    ({'optim_wrapper.clip_grad': dict(_delete_=True, type='value',
                                      clip_value=1.)},
     r'needs optim_wrapper\.clip_grad='),
    (apart(adaptors=1.), "'adaptors'.*no parameter.*'adapters'")])
def test_what_cannot_be_clipped_apart(make, options, said):
    with pytest.raises(ConfigError, match=said):
        make(**{**apart(adapters=1.), **options}).train()


def test_a_negative_norm_is_refused(make):
    with pytest.raises(ConfigError, match=r'max_norms.adapters=-1'):
        make(**apart(adapters=-1.))


# -- adapters ----------------------------------------------------------------


def test_adapters_start_before_the_first_step(make, caplog):
    states = []

    def look(runner, *args, **kwargs):
        states.append([a.up.abs().sum().item()
                       for a in runner.model.adapters.values()])

    make(1, hooks=[Spy(before_run=look, before_train=look)]).train()
    assert states[0] == [0, 0] and all(v > 0 for v in states[1])
    text = caplog.text
    for layer, block in ((1, 2), (3, 3)):
        assert f"SiNGER adapter of layer {layer}: init='nullspace' on the " \
            f'FFN of block {block}, rank 4, singular values kept' in text
    assert text.count('E_safe 1.0000') == 2
    assert text.count('E_prob 0.0000') == 2


def test_adapters_do_not_depend_on_the_seed(make):
    ups = []
    for seed in (1, 2):
        runner = make(1, hooks=[Spy('LOWEST', before_train=lambda r: ups.append(
            copy.deepcopy(r.model.adapters.state_dict())))],
            **{'randomness.seed': seed, 'model.adapter.init': 'random'})
        runner.train()
    assert all(torch.equal(ups[0][key], ups[1][key]) for key in ups[0])


@pytest.mark.parametrize('how', ['resume', 'load_from'])
def test_adapters_of_a_checkpoint_are_kept(make, tmp_path, how):
    make(2, **{'default_hooks.checkpoint.interval': 2}).train()
    saved = load_checkpoint(str(tmp_path / 'iter_2.pth'))['state_dict']
    started = []
    runner = make(3, hooks=[Spy('LOWEST', before_train=lambda r: started.append(
        copy.deepcopy(r.model.adapters.state_dict())))],
        load_from=str(tmp_path / 'iter_2.pth'), resume=how == 'resume')
    runner.train()
    assert all(torch.equal(value, saved[f'adapters.{key}'])
               for key, value in started[0].items())


@pytest.mark.parametrize('how', ['load_from', 'resume'])
def test_adapters_of_another_rank_are_refused(make, tmp_path, how):
    make(1, **{'default_hooks.checkpoint.interval': 1}).train()
    runner = make(2, load_from=str(tmp_path / 'iter_1.pth'),
                  resume=how == 'resume', **{'model.adapter.rank': 2})
    with pytest.raises(ConfigError, match='model.adapter.rank: 4 then, 2 now'):
        runner.train()


def test_a_plain_students_checkpoint_starts_the_adapters(make, tmp_path,
                                                         caplog):
    make(1, **{'default_hooks.checkpoint.interval': 1}).train()
    caplog.clear()
    weights = []
    runner = make(1, load_from=str(tmp_path / 'iter_1_student.pth'),
                  hooks=[Spy('LOWEST', before_train=lambda r: weights.append(
                      copy.deepcopy(r.model.student.state_dict())))])
    runner.train()
    assert 'SiNGER adapter of layer 1' in caplog.text
    file = load_checkpoint(str(tmp_path / 'iter_1_student.pth'))
    assert all(torch.equal(weights[0][key], value)
               for key, value in file['state_dict'].items())


@pytest.fixture
def collapsing(make, monkeypatch):

    def build(ratios, **kwargs):
        """A run whose measured variance ratios are these."""
        values = iter(ratios)

        def report(record, quantile):
            assert set(inlier_variances(record, quantile)) == {1, 3}
            return {1: torch.tensor(next(values))}

        monkeypatch.setattr(adapter_hook, 'inlier_variances', report)
        return make(len(ratios), **kwargs)

    return build


def test_collapse_is_reported_once(collapsing, caplog):
    runner = collapsing([0.9, 0.51, 0.49, 0.3, 0.2])
    hook, = (h for h in runner.hooks if isinstance(h, SiNGERAdapterHook))
    hook.interval = 1
    runner.train()
    warnings = [r.getMessage() for r in caplog.records
                if r.levelno == logging.WARNING
                and 'shrinks ordinary tokens' in r.getMessage()]
    assert len(warnings) == 1
    assert 'Iteration 3: the adapter of layer 1' in warnings[0]
    assert '0.49' in warnings[0] and 'lr_mult' in warnings[0]
    history = runner.message_hub.get_scalar(
        'train/distill.inlier_variance_1').data[0]
    assert history[-5:] == pytest.approx([0.9, 0.51, 0.49, 0.3, 0.2])


def test_collapse_is_reported_again_after_a_recovery(collapsing, caplog):
    runner = collapsing([0.4, 0.9, 0.4])
    hook, = (h for h in runner.hooks if isinstance(h, SiNGERAdapterHook))
    hook.interval = 1
    runner.train()
    assert caplog.text.count('shrinks ordinary tokens') == 2


def test_no_report_while_refinement_is_sound(make, caplog):
    runner = make(3)
    hook, = (h for h in runner.hooks if isinstance(h, SiNGERAdapterHook))
    hook.interval = 2
    runner.train()
    assert 'shrinks ordinary tokens' not in caplog.text
    for layer in (1, 3):  # one measurement in three iterations
        assert len(runner.message_hub.get_scalar(
            f'train/distill.inlier_variance_{layer}').data[0]) == 1


# -- target norms ------------------------------------------------------------


def generators():
    return (random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist())


def test_calibration_leaves_random_states_alone(make, caplog):
    states = []
    look = lambda runner: states.append(generators())  # noqa: E731
    runner = make(1, hooks=[Spy('HIGHEST', before_train=look),
                            Spy('LOWEST', before_train=look)],
                  **{'model.target_norm': 'standardise'})
    runner.train()
    assert states[0] == states[1]
    assert 'Calibrating targets on 256 training' not in caplog.text
    assert 'Calibrating targets on 8 training images' in caplog.text


def test_calibration_does_not_change_the_batches(make):
    seen = []
    for mode in (None, 'standardise'):
        batches = Batches()
        make(4, hooks=[batches], **{'model.target_norm': mode}).train()
        seen.append(batches.seen)
    assert len(seen[0]) == 4
    for (paths, inputs), (other_paths, other_inputs) in zip(*seen):
        assert paths == other_paths
        assert torch.equal(inputs, other_inputs)
    assert seen[0][0][0] != seen[0][1][0]


def test_statistics_are_those_of_the_images(make, place):
    runner = make(1, **{'model.target_norm': 'standardise'})
    runner.train()
    model = runner.model
    for layer in (1, 2, 3):
        norm = model.target_norms[str(layer)]
        assert norm.scale > 0 and torch.isfinite(norm.centre).all()
    # one teacher pass over all of them, flips as the hook drew them
    again = copy.deepcopy(model.target_norms.state_dict())
    for norm in model.target_norms.values():
        norm.scale.fill_(float('nan'))
    with torch.random.fork_rng():
        CalibrationHook().before_train(runner)
    assert all(torch.equal(value, again[key]) for key, value in
               model.target_norms.state_dict().items())


def test_statistics_are_kept_on_resume(make, tmp_path, caplog):
    options = {'model.target_norm': 'standardise',
               'default_hooks.checkpoint.interval': 2}
    make(2, **options).train()
    saved = load_checkpoint(str(tmp_path / 'iter_2.pth'))['state_dict']
    caplog.clear()
    runner = make(3, resume=True, **options)
    runner.train()
    assert 'Targets calibrated' not in caplog.text
    ours = runner.model.target_norms.state_dict()
    assert len(ours) == 6
    assert all(torch.equal(value, saved[f'target_norms.{key}'])
               for key, value in ours.items())


def test_no_calibration_where_nothing_is_to_calibrate(make, monkeypatch):
    def fail(*args):
        raise AssertionError('the data was read')

    monkeypatch.setattr(calibration_hook, 'training_batches', fail)
    for mode in (None, 'layernorm'):
        make(1, **{'model.target_norm': mode}).train()


# -- student files -----------------------------------------------------------

SAVING = {'default_hooks.checkpoint.interval': 2,
          'default_hooks.checkpoint.max_keep_ckpts': 2}


def plain_keys(runner):
    return set(MODELS.build(runner.cfg.model.student).state_dict())


def test_a_student_beside_every_checkpoint(make, tmp_path):
    runner = make(6, **SAVING)
    runner.train()
    assert files(tmp_path) == ['iter_4.pth', 'iter_4_student.pth',
                               'iter_6.pth', 'iter_6_student.pth']
    for step in (4, 6):
        whole = load_checkpoint(str(tmp_path / f'iter_{step}.pth'))
        student = load_checkpoint(str(tmp_path / f'iter_{step}_student.pth'))
        assert set(student['state_dict']) == plain_keys(runner)
        assert all(torch.equal(
            value, whole['state_dict'][f'student.{key}'])
            for key, value in student['state_dict'].items())
        assert student['meta']['iter'] == step
        assert student['meta']['dataset_meta']['classes'] == ('a', 'b', 'c')
        assert 'optimizer' not in student
        assert not any('teacher' in key for key in whole['state_dict'])
    # they differ, so neither is a copy of the other
    first, second = (load_checkpoint(str(
        tmp_path / f'iter_{i}_student.pth'))['state_dict'] for i in (4, 6))
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert os.stat(tmp_path / 'iter_6_student.pth').st_mode & 0o444 == 0o444


def test_a_checkpoint_by_a_link_is_written_where_it_leads(make, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    (tmp_path / 'iter_1.pth').symlink_to('disk/kept.pth')
    (disk / 'kept.pth').write_bytes(b'before')
    make(1, **{'default_hooks.checkpoint.interval': 1}).train()
    assert (tmp_path / 'iter_1.pth').is_symlink()
    assert load_checkpoint(str(disk / 'kept.pth'))['meta']['iter'] == 1
    assert os.listdir(disk) == ['kept.pth']
    assert files(tmp_path, '.*') == files(tmp_path, '*.tmp') == []


def test_removal_goes_on_after_a_resume(make, tmp_path):
    make(4, **SAVING).train()
    assert files(tmp_path, '*student.pth') == ['iter_2_student.pth',
                                               'iter_4_student.pth']
    make(8, resume=True, **SAVING).train()
    assert files(tmp_path) == ['iter_6.pth', 'iter_6_student.pth',
                               'iter_8.pth', 'iter_8_student.pth']


def test_a_student_beside_the_best_checkpoint(make, tmp_path, monkeypatch):
    scores = iter([30., 50., 40.])
    from mmseg.evaluation import IoUMetric
    monkeypatch.setattr(IoUMetric, 'compute_metrics',
                        lambda self, results: dict(mIoU=next(scores)))
    make(6, validate=True, **{'train_cfg.val_interval': 2}).train()
    best = [f for f in files(tmp_path) if f.startswith('best')]
    assert best == ['best_mIoU_iter_4.pth', 'best_mIoU_iter_4_student.pth']
    whole, student = (load_checkpoint(str(tmp_path / f))['state_dict']
                      for f in best)
    assert student
    assert all(torch.equal(value, whole[f'student.{key}'])
               for key, value in student.items())


def test_the_best_by_a_metric_that_there_is_not(make, tmp_path):
    runner = make(4, validate=True, **{
        'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 2,
        'default_hooks.checkpoint.save_best': 'mIou'})
    with pytest.raises(ConfigError, match="save_best='mIou'.*mean 'mIoU'"):
        runner.train()
    assert 'iter_2.pth' in files(tmp_path)


def test_a_run_stops_by_a_metric_that_there_is(make):
    runner = make(3, validate=True, custom_hooks=[
        dict(type='EarlyStoppingHook', monitor='mIoUU')])
    with pytest.raises(ConfigError, match="monitor='mIoUU'.*mean 'mIoU'"):
        runner.train()


@pytest.mark.parametrize('high, said', [(0, True), (255, True), (1, False)])
def test_one_class_in_all_labels(make, tmp_path, caplog, high, said):
    """As in maps of 0 and 255, of which the latter is ignored."""
    tiny.write_scenes(str(tmp_path))
    for name in os.listdir(tmp_path / 'annotations'):
        path = str(tmp_path / 'annotations' / name)
        cv2.imwrite(path, (cv2.imread(path, 0) > 0).astype('uint8') * high)
    make(2, **{'train_dataloader.dataset.data_root': str(tmp_path)}).train()
    text = 'The labels of the first 2 batches are all 0, or ignored'
    assert (text in caplog.text) is said


def test_label_maps_that_do_not_fit_into_eight_bits(make, tmp_path):
    """mmseg keeps the lower eight bits: 256 would be 0."""
    tiny.write_scenes(str(tmp_path))
    for name in os.listdir(tmp_path / 'annotations'):
        path = str(tmp_path / 'annotations' / name)
        cv2.imwrite(path, cv2.imread(path, 0).astype('uint16') * 128)
    runner = make(2, **{
        'train_dataloader.dataset.data_root': str(tmp_path)})
    with pytest.raises(DataError, match='annotations.*has the label 256'):
        runner.train()


def test_a_head_of_more_classes_than_the_data(make, caplog):
    make(1, **{'model.student.decode_head.num_classes': 5}).train()
    assert 'num_classes=5, and the training data have 3' in caplog.text


def test_fewer_images_than_a_batch(make):
    runner = make(1, param_scheduler=None, **{
        'train_dataloader.sampler.type': 'DefaultSampler',
        'train_dataloader.batch_size': 64, 'train_dataloader.drop_last': True})
    with pytest.raises(ConfigError, match='8 images make no batch'):
        runner.train()


def test_a_folder_of_checkpoints_apart_is_claimed_too(make, tmp_path):
    """Two runs may have work dirs of the same name."""
    folder = tmp_path / 'disk' / tmp_path.name
    claim = ('import sys; from mmsinger.files import lock_folder; '
             'lock_folder(sys.argv[1])')

    def other_run(*args, **kwargs):
        assert subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', claim, str(folder)],
            capture_output=True).returncode == expected

    expected = 1
    make(2, [Spy(before_train_iter=other_run)], **{
        'default_hooks.checkpoint.out_dir': str(tmp_path / 'disk')}).train()
    expected = 0
    other_run()


@pytest.mark.parametrize('validate', [False, True])
def test_the_student_of_an_averaged_model(make, tmp_path, validate):
    runner = make(4, validate=validate, **{
        **SAVING, 'train_cfg.val_interval': 2,
        'custom_hooks': [dict(type='EMAHook', momentum=0.5)]})
    averages, raw = [], []

    def keep(runner, *args, **kwargs):
        hook, = (h for h in runner.hooks if type(h).__name__ == 'EMAHook')
        averages.append(copy.deepcopy(
            hook.ema_model.module.student.state_dict()))
        raw.append(copy.deepcopy(runner.model.student.state_dict()))

    runner.register_hook(Spy('LOWEST', after_train_iter=keep), 'LOWEST')
    runner.train()
    names = ['iter_4_student.pth']
    if validate:
        names += [f for f in files(tmp_path, 'best*student.pth')]
        assert len(names) == 2
    for name in names:
        student = load_checkpoint(str(tmp_path / name))['state_dict']
        step = int(name.split('iter_')[1].split('_')[0])
        for key, value in student.items():
            if not key.endswith(('running_mean', 'running_var',
                                 'num_batches_tracked')):
                assert torch.equal(value, averages[step - 1][key]), key
        assert any(not torch.equal(value, raw[step - 1][key])
                   for key, value in student.items())


def test_a_run_with_averages_does_not_go_on_without(make, tmp_path):
    hooks = {'custom_hooks': [dict(type='EMAHook', momentum=0.5)]}
    make(2, **SAVING, **hooks).train()
    make(3, resume=True, **SAVING, **hooks).train()
    with pytest.raises(ConfigError, match='EMAHook.*load_from='):
        make(4, resume=True, **SAVING).train()
    path = str(tmp_path / 'iter_2.pth')
    make(1, load_from=path, work_dir=str(tmp_path / 'new')).train()


def test_a_missing_student_is_written_when_the_run_is_resumed(make, tmp_path):
    """It was killed, or the disk was full, between the two files."""
    make(4, **SAVING).train()
    path = tmp_path / 'iter_4_student.pth'
    before = load_checkpoint(str(path))['state_dict']
    path.unlink()
    make(4, resume=True, **SAVING).train()  # nothing is left to train
    after = load_checkpoint(str(path))['state_dict']
    assert all(torch.equal(after[key], value)
               for key, value in before.items())


def test_a_student_outlives_a_checkpoint_removed_by_hand(make, tmp_path):
    """… and goes with one that makes room."""
    def after_train_iter(runner, *args, **kwargs):
        if runner.iter + 1 == 5:
            os.remove(tmp_path / 'iter_4.pth')

    make(12, [Spy(after_train_iter=after_train_iter)],
         **{'default_hooks.checkpoint.interval': 2,
            'default_hooks.checkpoint.max_keep_ckpts': 2}).train()
    assert {path.name for path in tmp_path.glob('iter_*')} == {
        'iter_4_student.pth', 'iter_10.pth', 'iter_10_student.pth',
        'iter_12.pth', 'iter_12_student.pth'}


def test_plain_config_beside_the_students(make, tmp_path, place):
    runner = make(1, default_scope='mmseg',
                  **{'default_hooks.checkpoint.interval': 1})
    runner.train()
    path = str(tmp_path / 'tiny_seg_student.py')
    with open(path) as file:
        assert 'mmsinger' not in file.read()
    cfg = Config.fromfile(path)
    assert cfg.model.type == 'EncoderDecoder'
    assert 'teacher' not in cfg
    cfg.update(work_dir=str(tmp_path / 'plain'),
               experiment_name=uuid.uuid4().hex,
               load_from=str(tmp_path / 'iter_1_student.pth'))
    plain = Runner.from_cfg(cfg)
    assert type(plain.model).__module__.startswith('mmseg.')
    student = load_checkpoint(cfg.load_from)['state_dict']
    plain.model.load_state_dict(student, strict=True)
    metrics = plain.test()
    assert 0 <= metrics['mIoU'] <= 100


def test_a_failed_write_leaves_no_half_file(make, tmp_path, monkeypatch):
    import mmsinger.files as module
    runner = make(2, **SAVING)
    save = torch.save

    def fail(content, file, *args, **kwargs):
        if 'student.pth' in str(getattr(file, 'name', '')):
            file.write(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device')
        return save(content, file, *args, **kwargs)

    monkeypatch.setattr(module.torch, 'save', fail)
    with pytest.raises(TrainingError, match='_student.pth cannot be written: '
                       'No space'):
        runner.train()
    assert files(tmp_path, '*') == [f for f in files(tmp_path, '*')
                                    if 'student.pth' not in f
                                    and not f.endswith('.tmp')]


# -- run guard ---------------------------------------------------------------


def test_loss_that_is_not_finite(make, tmp_path):
    runner = make(6, hooks=[poison_loss(at=4)], **{
        **SAVING, 'default_hooks.checkpoint.save_last': True})
    batches = Batches()
    runner.register_hook(batches)
    with pytest.raises(TrainingError) as error:
        runner.train()
    text = str(error.value)
    assert text.startswith('Iteration 4: loss, distill.loss_kd is not finite') \
        or text.startswith('Iteration 4: distill.loss_kd, loss is not finite')
    for path in batches.seen[3][0]:
        assert path in text
    assert len(batches.seen) == 4
    last = str(tmp_path / 'iter_2.pth')
    assert f'The last good checkpoint is {last}' in text
    # it is as it was, and nothing was written over or after it
    assert files(tmp_path) == ['iter_2.pth', 'iter_2_student.pth']
    content = load_checkpoint(last)
    assert content['meta']['iter'] == 2
    assert all(torch.isfinite(v).all() for v in
               content['state_dict'].values())
    with open(tmp_path / 'last_checkpoint') as file:
        assert file.read() == last


def test_loss_that_is_not_finite_before_any_checkpoint(make):
    with pytest.raises(TrainingError, match='No checkpoint had been saved'):
        make(2, hooks=[poison_loss(at=1)]).train()


@pytest.mark.parametrize('at, poisoned, fault', [
    (2, False, 'Lower the learning rate'),
    (1, False, 'no learning rate is at fault'),
    (2, True, 'NaN or infinite values in its images')])
def test_what_is_at_fault(make, at, poisoned, fault):
    class Poison(Hook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if poisoned and runner.iter + 1 == at:
                data_batch['inputs'][0] = data_batch['inputs'][0].float()
                data_batch['inputs'][0][0, 0, 0] = float('nan')

    hooks = [Poison()] + ([] if poisoned else [poison_loss(at=at)])
    with pytest.raises(TrainingError, match=fault):
        make(3, hooks=hooks).train()


@pytest.mark.parametrize('max_iters, options', [
    (4, {}),
    (3, {'default_hooks.checkpoint.save_begin': 1,
         'train_cfg.max_iters': 5}),
    # the last iteration saves whatever the interval is
    (3, {'default_hooks.checkpoint.save_last': True}),
    # the best checkpoint
    (3, {'validate': True, 'train_cfg.val_interval': 3})])
def test_weights_that_are_not_finite_are_not_saved(make, tmp_path, max_iters,
                                                   options):
    runner = make(max_iters, hooks=[poison_weights(at=max_iters)],
                  **{**SAVING, **options})
    with pytest.raises(TrainingError) as error:
        runner.train()
    text = str(error.value)
    assert text.startswith(f"Iteration {max_iters}: the weights "
                           "['projectors.3.weight'] (1 in all) are not")
    first = 1 if 'default_hooks.checkpoint.save_begin' in options else 2
    assert f'iter_{first}.pth' in text
    assert files(tmp_path) == [f'iter_{first}.pth',
                               f'iter_{first}_student.pth']


def test_weights_are_checked_at_the_end_of_an_epoch(make, tmp_path):
    runner = make(hooks=[poison_weights(at=4)], **{
        'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop',
                          max_epochs=2, val_interval=5),
        'train_dataloader.sampler': dict(
            _delete_=True, type='DefaultSampler', shuffle=True),
        'param_scheduler': [], 'default_hooks.checkpoint.by_epoch': True,
        'default_hooks.checkpoint.interval': 1})
    with pytest.raises(TrainingError, match='projectors.3.weight'):
        runner.train()
    assert files(tmp_path) == ['epoch_1.pth', 'epoch_1_student.pth']


EPOCHS = {
    'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop',
                      max_epochs=3, val_interval=9),
    'train_dataloader.sampler': dict(
        _delete_=True, type='DefaultSampler', shuffle=True),
    'param_scheduler': [], 'default_hooks.checkpoint.by_epoch': True,
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.max_keep_ckpts': -1}


@pytest.mark.parametrize('batch_size', [1, 4])
def test_an_epoch_of_another_length(make, tmp_path, batch_size, caplog):
    """Iterations are counted anew, nothing is skipped or removed."""
    first = dict(EPOCHS['train_cfg'], max_epochs=2)
    make(**{**EPOCHS, 'train_dataloader.batch_size': 2,
            'train_cfg': first}).train()
    seen = []
    runner = make(hooks=[Spy(
        before_train_epoch=lambda runner: seen.append([]),
        after_train_iter=lambda runner, *_, **__: seen[-1].append(
            runner.iter))], **{
        **EPOCHS, 'train_dataloader.batch_size': batch_size,
        'resume': True, 'load_from': str(tmp_path / 'epoch_2.pth')})
    runner.train()
    length = len(runner.train_dataloader)
    assert seen == [list(range(2 * length, 3 * length))]
    assert f'An epoch has {length} iterations, and had' in caplog.text
    assert [name for name in files(tmp_path) if 'student' not in name] == [
        'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']


def test_an_epoch_of_another_length_within_one(make, tmp_path):
    def stop(runner, batch_idx, *args, **kwargs):
        if runner.iter == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        make(hooks=[Spy(after_train_iter=stop)], **{
            **EPOCHS, 'train_dataloader.batch_size': 1}).train()
    assert files(tmp_path, 'iter_?.pth') == ['iter_2.pth']
    with pytest.raises(ConfigError, match='within an epoch of'):
        make(**{**EPOCHS, 'train_dataloader.batch_size': 2, 'resume': True,
                'load_from': str(tmp_path / 'iter_2.pth')}).train()


def test_a_run_that_fails_leaves_the_process_as_it_was(make, tmp_path):
    before = signal.getsignal(signal.SIGTERM), torch.load
    runner = make(2, hooks=[poison_loss(at=1)])
    with pytest.raises(TrainingError):
        runner.train()
    assert (signal.getsignal(signal.SIGTERM), torch.load) == before
    assert files(tmp_path, LOCK) == []
    for method, place in (('train', '_init_model_weights'),
                          ('train', 'load_or_resume'),
                          ('val', 'load_or_resume')):
        runner = make(2, validate=True)
        setattr(runner, place, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            getattr(runner, method)()
        assert (signal.getsignal(signal.SIGTERM), torch.load) == before
        assert method == 'val' or files(tmp_path, LOCK) == []
    runner = make(2, hooks=[Spy(before_val_iter=lambda *_, **__: 1 / 0)],
                  validate=True)
    with pytest.raises(ZeroDivisionError):
        runner.val()
    assert torch.load is before[1]
    unlock_folder(str(tmp_path))
    runner = make(2)
    unlock_folder(str(tmp_path))
    (tmp_path / LOCK).symlink_to('elsewhere')
    with pytest.raises(ConfigError, match='is a link'):
        runner.train()
    assert (signal.getsignal(signal.SIGTERM), torch.load) == before


def test_no_images(make, monkeypatch):
    runner = make(2)
    monkeypatch.setattr(type(runner.train_dataloader.dataset), '__len__',
                        lambda self: 0)
    with pytest.raises(ConfigError, match='train_dataloader.dataset: the '
                       'BaseSegDataset found no images.*suffix'):
        RunGuardHook().before_train(runner)


def test_no_images_of_that_suffix(make):
    with pytest.raises(ConfigError, match=r"train_dataloader\.dataset.*"
                       r"scenes/images.*img_suffix='\.jpeg'"):
        make(2, **{'train_dataloader.dataset.img_suffix': '.jpeg'})


def test_testing_does_not_read_the_training_data(make):
    runner = make()
    runner.test()
    assert isinstance(runner._train_loop, dict)


def test_all_hooks_are_added_to_a_config_without_them(make):
    runner = make()
    names = [type(hook).__name__ for hook in runner.hooks]
    assert {name.split('.')[1] for name in ALL_HOOKS} <= set(names)
    hook, = (h for h in runner.hooks if type(h).__name__ == 'DiagnosticsHook')
    assert hook.interval == 100
    assert len(names) == len(set(names))


def test_a_hook_that_the_config_lists_keeps_its_arguments(tiny_config):
    """However its type is written."""
    for kind in ('mmsinger.DiagnosticsHook', 'DiagnosticsHook',
                 DiagnosticsHook):
        cfg = copy.deepcopy(tiny_config)
        cfg.custom_hooks = [dict(type=kind, interval=7), dict(type=Spy)]
        add_required_hooks(cfg)
        hooks = cfg.custom_hooks
        assert hooks[0].interval == 7 and hooks[1].type is Spy
        assert [h.type for h in hooks[2:]] == [
            f'mmsinger.{name}' for name in SiNGERDistiller.required_hooks
            if name != 'DiagnosticsHook']


def test_a_hook_that_is_built_is_refused(tiny_config):
    """A config with it cannot be written beside the run."""
    cfg = copy.deepcopy(tiny_config)
    cfg.custom_hooks = [Spy()]
    with pytest.raises(ConfigError, match='must be a list of dict'):
        add_required_hooks(cfg)


def test_a_plain_model_gets_what_every_run_needs(tiny_config):
    cfg = copy.deepcopy(tiny_config)
    cfg.model = cfg.model.student
    add_required_hooks(cfg)
    assert [h.type for h in cfg.custom_hooks] == [
        'mmsinger.SafeCheckpointHook', 'mmsinger.RunGuardHook',
        'mmsinger.RandomStateHook']


@pytest.mark.parametrize('settings, resumed', [
    ({}, 'first'), (dict(diff_rank_seed=True), None)])
def test_a_process_that_is_new_on_resume(monkeypatch, settings, resumed):
    """It goes on with the first one's random numbers, unless processes are
    to draw numbers of their own."""
    monkeypatch.setattr('mmsinger.engine.hooks.random_state_hook.get_rank',
                        lambda: 1)
    hook = RandomStateHook()
    hook.after_load_checkpoint(SimpleNamespace(_randomness_cfg=settings), dict(
        random_states=['first']))
    assert hook._resumed == resumed
    hook.after_load_checkpoint(SimpleNamespace(_randomness_cfg=settings), dict(
        random_states=['first', 'second']))
    assert hook._resumed == 'second'


def test_hooks_of_a_pure_python_config(place, tiny_config, tmp_path):
    """Given as classes, they run once, and the student's config is free of
    mmsinger."""
    tiny_config.dump(str(tmp_path / 'base.py'))
    (tmp_path / 'lazy.py').write_text('''\
from mmengine.config import read_base
from mmengine.hooks import EMAHook

from mmsinger.engine.hooks import DiagnosticsHook, SiNGERAdapterHook

with read_base():
    from .base import *

custom_hooks = [dict(type=EMAHook), dict(type=DiagnosticsHook, interval=2),
                dict(type=SiNGERAdapterHook)]
''')
    cfg = load_config(str(tmp_path / 'lazy.py'), {'model.adapter.rank': 3})
    init_default_scope('mmseg')
    add_required_hooks(cfg)
    names = [getattr(hook.type, '__name__', hook.type).split('.')[-1]
             for hook in cfg.custom_hooks]
    assert names[:3] == ['EMAHook', 'DiagnosticsHook', 'SiNGERAdapterHook']
    assert len(names) == len(set(names)) == 8
    cfg.load_from, cfg.resume = 'a_distiller.pth', True
    plain = student_config(cfg)
    assert plain.load_from is None and not plain.resume
    assert len(plain.custom_hooks) == 1
    plain.dump(str(tmp_path / 'student.py'))
    assert 'mmsinger' not in (tmp_path / 'student.py').read_text()


@pytest.mark.parametrize('workers', [0, 2])
def test_data_workers(tiny_config, workers):
    """What torch refuses without workers is dropped."""
    cfg = copy.deepcopy(tiny_config)
    cfg.train_dataloader.update(num_workers=workers, prefetch_factor=3)
    cfg.train_dataloader.pop('persistent_workers')
    cfg.val_dataloader.update(num_workers=workers, persistent_workers=True)
    fit_workers(cfg)
    assert cfg.val_dataloader.get('persistent_workers', False) == bool(workers)
    assert cfg.train_dataloader.get('persistent_workers', False) == \
        bool(workers)
    assert ('prefetch_factor' in cfg.train_dataloader) == bool(workers)


def test_a_student_hook_brings_what_makes_a_run_safe(place, tiny_config,
                                                     tmp_path, monkeypatch):
    """Under a host's own tool; each hook starts once."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **_: (text, 1))
    cfg = copy.deepcopy(tiny_config)
    cfg.merge_from_dict({
        'work_dir': str(tmp_path), 'train_cfg.max_iters': 1,
        'custom_hooks': [dict(type='mmsinger.StudentCheckpointHook')],
        'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None,
        'default_hooks.checkpoint.save_best': None})
    cfg.experiment_name = cfg.visualizer.name = uuid.uuid4().hex
    runner = Runner.from_cfg(cfg)
    starts = []
    for kind in (RunGuardHook, RandomStateHook, SafeCheckpointHook,
                 StudentCheckpointHook, CheckpointHook):
        monkeypatch.setattr(kind, 'before_run', functools.partialmethod(
            lambda self, runner, name, call: (
                starts.append(name), call(self, runner))[1],
            name=kind.__name__, call=kind.before_run))
    runner.train()
    assert sorted(starts) == [
        'CheckpointHook', 'RandomStateHook', 'RunGuardHook',
        'SafeCheckpointHook', 'StudentCheckpointHook']
    assert type(runner.train_dataloader.dataset).__name__ == 'BaseSegDataset'
    assert hasattr(runner.train_dataloader.dataset, '_config_key')
    init_default_scope('mmengine')


@pytest.mark.parametrize('workers', [0, 1])
def test_samples_that_were_read_too_early(make, workers):
    """mmengine 0.10.7 begins to read when it builds the loop."""
    def batches(*hooks):
        seen = Batches()
        make(4, hooks=[seen, *hooks], **{
            'train_dataloader.num_workers': workers,
            'train_dataloader.persistent_workers': bool(workers)}).train()
        return seen.seen

    expected = batches()
    found = batches(Spy('HIGHEST', before_run=lambda runner: next(
        runner.train_loop.dataloader_iterator)))
    assert [paths for paths, _ in found] == [paths for paths, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected))


@pytest.mark.parametrize('spoil', [
    lambda model: model.weight.data.fill_(float('nan')),
    lambda model: model.running_var.fill_(float('inf'))])
def test_weights_and_buffers_that_are_not_finite(spoil):
    model = torch.nn.BatchNorm1d(2)
    runner = SimpleNamespace(model=model, message_hub=SimpleNamespace(
        runtime_info={}), work_dir='.')
    RunGuardHook().check_weights(runner, 7)
    spoil(model)
    with pytest.raises(TrainingError, match='Iteration 7: .*not finite'):
        RunGuardHook().check_weights(runner, 7)


def test_calibration_looks_at_evenly_spaced_images():
    model = torch.nn.Module()
    model.data_preprocessor = lambda batch, training: batch
    loader = SimpleNamespace(
        dataset=[dict(inputs=torch.full((3, 4, 4), i)) for i in range(10)],
        collate_fn=default_collate)
    batches = calibration_hook.training_batches(
        SimpleNamespace(model=model, train_dataloader=loader), 5, 2)
    assert [int(image[0, 0, 0]) for batch in batches
            for image in batch['inputs']] == [0, 2, 4, 6, 8]


def test_the_bank_is_in_the_data_sets_order(monkeypatch):
    """Process 0 reads images 0, 2 and 4, the other 1, 3 and 0 again."""
    monkeypatch.setattr(knn_bank_hook, 'all_gather', lambda share: [
        torch.tensor([[0], [2], [4]]), torch.tensor([[1], [3], [0]])])
    assert knn_bank_hook._all(torch.tensor([[0], [2], [4]]), 5).tolist() == \
        [[0], [1], [2], [3], [4]]
