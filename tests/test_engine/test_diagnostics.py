"""DiagnosticsHook: its numbers by hand, where they go, what stays as it was."""
import copy
import functools
import gc
import json
import os
import uuid

import numpy as np
import pytest
import torch
from mmengine.registry import VISBACKENDS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend
from yapf.yapflib import yapf_api

import tiny
from mmsinger.engine.diagnostics import (adapter_energies, gradient_share,
                                         step_diagnostics)
from mmsinger.engine.hooks import DiagnosticsHook
from mmsinger.engine.hooks.diagnostics_hook import add_image
from mmsinger.engine.prepare import load_config, prepare_training
from mmsinger.errors import ConfigError
from mmsinger.models import (FeatureDistiller, FitNetDistiller,
                             SiNGERDistiller, ViTKDDistiller)
from mmsinger.models.adapters import left_singular_directions, linearised_ffn
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.tokens import Tokens

STUDENT = tiny.vit(arch=dict(embed_dims=16, num_layers=4, num_heads=2,
                             feedforward_channels=32))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BEFORE = {'outlier_share', 'norm_median', 'norm_p99', 'norm_max',
          'gram_student', 'gradient_share'}
AFTER = {f'{name}_refined' for name in ('outlier_share', 'norm_median',
                                        'norm_p99', 'norm_max')}
REFINED = BEFORE | AFTER | {'cosine', 'gram'}
ENERGIES = {'e_safe_up', 'e_prob_up', 'e_safe_down', 'e_prob_down'}


def distiller(cls=SiNGERDistiller, **kwargs):
    torch.manual_seed(0)
    if cls is not ViTKDDistiller:
        kwargs.setdefault('layers', (1, 3))
    model = cls(student=STUDENT, teacher=dict(backbone=tiny.vit()),
                task_loss_weight=0, **kwargs)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if model.refinement:
        model.refinement.init_weights(model.teacher)
    if model.needs_calibration:
        model.calibrate([IMAGES])
    return model.train()


def record_of(model, max_images=16, images=IMAGES):
    """A recorded step and its losses."""
    record = StepRecord(max_images)
    model.records.append(record)
    losses = model.loss(images, None)
    model.records.remove(record)
    return record, losses


# -- numbers -----------------------------------------------------------------


@pytest.mark.parametrize('cls', [FitNetDistiller, ViTKDDistiller])
@pytest.mark.parametrize('patch_size', [16, 4])
def test_on_another_grid(cls, patch_size, monkeypatch):
    """Outliers are of the teacher's grid, gradients of the student's."""
    student = copy.deepcopy(STUDENT)
    student['patch_size'] = patch_size
    monkeypatch.setitem(globals(), 'STUDENT', student)
    record, _ = record_of(distiller(cls, resample='teacher'))
    shares = [numbers['gradient_share']
              for numbers in step_diagnostics(record).values()]
    assert shares and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize('target_norm', [None, 'standardise', 'layernorm'])
def test_numbers_by_hand(target_norm):
    model = distiller(target_norm=target_norm)
    record, _ = record_of(model)
    numbers = step_diagnostics(record)
    assert set(numbers) == {1, 3}
    with torch.no_grad():
        teacher = model.run_teacher(IMAGES).tokens(1).values
        refined = model.adapters['1'](teacher[:, 1:]).numpy()
    teacher = teacher[:, 1:].numpy()
    medians, largest, shares, cosines, distances = [], [], [], [], []
    for before, after in zip(teacher, refined):
        norms = np.linalg.norm(before, axis=1)
        median = np.median(norms)
        mad = np.median(abs(norms - median))
        medians.append(median)
        largest.append(np.linalg.norm(after, axis=1).max())
        shares.append((norms > median + 5 * 1.4826 * mad).mean())
        cosines.append(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                                for a, b in zip(before, after)]))
        units = [x / np.linalg.norm(x, axis=1)[:, None]
                 for x in (before, after)]
        distances.append(np.linalg.norm(units[0] @ units[0].T
                                        - units[1] @ units[1].T))
    found = {name: value.item() for name, value in numbers[1].items()}
    assert set(found) == REFINED
    for name, values in (('norm_median', medians),
                         ('norm_max_refined', largest),
                         ('outlier_share', shares), ('cosine', cosines),
                         ('gram', distances)):
        assert found[name] == pytest.approx(np.mean(values), rel=1e-3), name
    assert found['cosine'] < 0.9999 and found['gram'] > 0.01


def keep_gradient(module, gradients, name):
    """Collect the gradient of what a module gives."""

    def hook(module, args, output):
        output.register_hook(
            lambda gradient: gradients.__setitem__(name, gradient))

    module.register_forward_hook(hook)


@pytest.mark.parametrize('kwargs', [
    {}, dict(targets=[dict(type='MaskTokens', mad=0.5)]),
    dict(target_norm='layernorm'),
    dict(target_norm='standardise',
         targets=[dict(type='ClipNorms', quantile=0.5)])])
@pytest.mark.parametrize('cls', [
    SiNGERDistiller, FitNetDistiller,
    functools.partial(SiNGERDistiller, gate=dict(mad=8.), cap=True)])
def test_gradient_share_is_that_of_autograd(cls, kwargs):
    """The closed form against the gradient of the step itself."""
    model = distiller(cls, **kwargs)
    gradients = {}
    for layer, projector in model.projectors.items():
        keep_gradient(projector, gradients, int(layer))
    record, losses = record_of(model)
    losses['distill.loss_kd'].backward()
    for layer, values in record.layers.items():
        outliers = torch.zeros(3, 16, dtype=torch.bool)
        outliers[0, 2:5] = outliers[2, 7] = True
        energy = gradients[layer].square().sum(dim=-1)
        expected = energy[:, 1:][outliers].sum() / energy.sum()
        share = gradient_share(
            values['kd_gradient'].values.squeeze(-1), outliers)
        assert share.item() == pytest.approx(expected.item(), rel=1e-3)
        assert 0.001 < share < 0.999


@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_gradient_share_of_vitkd(reduction):
    model = distiller(ViTKDDistiller, mimic_layers=(0, ), generate_layer=3,
                      reduction=reduction)
    gradients = {}
    keep_gradient(model.projectors['0'], gradients, 0)
    keep_gradient(model.generator, gradients, 3)
    record, losses = record_of(model)
    sum(losses.values()).backward()
    gradients[0] = gradients[0][:, 1:]  # patches alone are mimicked
    gradients[3] = gradients[3].flatten(2).transpose(1, 2)
    outliers = torch.zeros(3, 16, dtype=torch.bool)
    outliers[:, :6] = True
    for layer in (0, 3):
        energy = gradients[layer].square().sum(dim=-1)
        share = gradient_share(record.layers[layer][
            'kd_gradient'].values.squeeze(-1), outliers)
        assert share.item() == pytest.approx(
            (energy[outliers].sum() / energy.sum()).item(), rel=1e-3)
    assert set(step_diagnostics(record)[3]) == BEFORE


def test_outliers_take_the_gradient():
    """What equation 3 says: few tokens of large norm get most of it."""
    model = distiller(FitNetDistiller)
    original = model.run_teacher

    def planted(*args):
        outputs = original(*args)
        for output in outputs.taps._outputs.values():
            output[:, 4] *= 40  # after CLS: patch 3
        return outputs

    model.run_teacher = planted
    numbers = step_diagnostics(record_of(model)[0])[1]
    assert 1 / 16 <= numbers['outlier_share'] < 0.3
    assert numbers['gradient_share'] > 0.9


def test_no_gradient_no_share():
    assert gradient_share(torch.zeros(2, 5), torch.ones(2, 4).bool()) == 0


@pytest.mark.parametrize('loss', ['mse', 'other'])
def test_only_an_mse_has_the_closed_form(loss):
    model = distiller(FitNetDistiller)
    if loss == 'other':
        model.loss_kd = torch.nn.SmoothL1Loss()
    numbers = step_diagnostics(record_of(model)[0])[1]
    assert ('gradient_share' in numbers) == (loss == 'mse')


def test_adapter_energies():
    model = distiller(adapter=dict(rank=4))
    directions = left_singular_directions(linearised_ffn(
        model.teacher.blocks.modules[2]))[0]
    adapter = model.adapters['1']
    numbers = adapter_energies(adapter, directions)
    assert numbers['e_safe_up'] == pytest.approx(1)
    with torch.no_grad():  # half the energy in the safe quarter
        adapter.down.zero_()
        adapter.down[:, 0] = directions[:, -1]
        adapter.down[:, 1] = directions[:, 0]
    numbers = adapter_energies(adapter, directions)
    assert numbers['e_safe_down'] == pytest.approx(0.5)
    assert numbers['e_prob_down'] == pytest.approx(0.5)
    assert numbers['e_safe_up'] == pytest.approx(1)


def test_students_of_another_grid():
    model = distiller(FitNetDistiller)
    record, _ = record_of(model)
    student = record.layers[1]['student']
    record.layers[1]['student'] = Tokens(student.values[:, :1 + 4], (2, 2))
    numbers = step_diagnostics(record)[1]
    assert torch.isfinite(numbers['gram_student'])


def test_padding_does_not_count():
    torch.manual_seed(0)
    real, padded = StepRecord(), StepRecord()
    names = dict(teacher=8, refined=8, student=6, kd_gradient=1)
    for name, width in names.items():
        prefix = torch.rand(3, 1, width)
        pictures = torch.rand(3, 6, 4, width)
        pictures[:, 2, 1] *= 50
        larger = torch.full((3, 6, 7, width), 30.)
        larger[:, :, :4] = pictures
        if name == 'kd_gradient':  # what has no weight has no gradient
            larger[:, :, 4:] = 0
        weight = torch.zeros(3, 6, 7)
        weight[:, :, :4] = 1
        weight = torch.cat([torch.ones(3, 1), weight.flatten(1)], dim=1)
        real.add(1, **{name: Tokens(torch.cat(
            [prefix, pictures.flatten(1, 2)], dim=1), (6, 4))})
        padded.add(1, **{name: Tokens(torch.cat(
            [prefix, larger.flatten(1, 2)], dim=1), (6, 7), weight)})
    expected, numbers = (step_diagnostics(record)[1]
                         for record in (real, padded))
    assert set(numbers) == REFINED and expected['outlier_share'] > 0
    assert numbers == {key: pytest.approx(value.item(), rel=1e-5)
                       for key, value in expected.items()}


def test_a_record_keeps_copies_of_the_first_images():
    record, _ = record_of(distiller(), max_images=2)
    for values in record.layers.values():
        for value in values.values():
            tensor = value.values if isinstance(value, Tokens) else value
            assert len(tensor) == 2 and not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == \
                tensor.numel() * tensor.element_size()


def test_a_step_is_the_same_with_a_record():
    losses = []
    for recorded in (False, True):
        model = distiller()
        losses.append(record_of(model)[1] if recorded
                      else model.loss(IMAGES, None))
        sum(losses[-1].values()).backward()
        losses[-1]['gradient'] = model.adapters['1'].up.grad
    assert all(torch.equal(value, losses[1][name])
               for name, value in losses[0].items())


# -- the hook in a run -------------------------------------------------------


@VISBACKENDS.register_module()
class MemoryVisBackend(BaseVisBackend):
    """Keeps what it is given, as TensorBoard's or W&B's backend gets it."""

    def __init__(self, save_dir=None):
        self.scalars, self.images = [], []

    experiment = None

    def _init_env(self):
        pass

    def add_config(self, config, **kwargs):
        pass

    def add_image(self, name, image, step=0, **kwargs):
        self.images.append((name, step, image))

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        self.scalars.append((step, dict(scalar_dict)))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    gc.collect()
    gc.freeze()
    yield tiny.workplace(tmp_path_factory.mktemp('diagnostics'))
    gc.unfreeze()


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """Trains; dotted keys override tests/configs/tiny_seg.py."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **_: (text, 1))

    def train(hook, max_iters=4, validate=False, model=None, **options):
        cfg = copy.deepcopy(load_config(tiny.SEG_CONFIG))
        cfg.merge_from_dict({
            'train_cfg.max_iters': max_iters, 'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 100,
            'default_hooks.checkpoint.save_last': False,
            'default_hooks.checkpoint.save_best': None,
            'work_dir': str(tmp_path), **options})
        cfg.experiment_name = cfg.visualizer.name = uuid.uuid4().hex
        cfg.visualizer.vis_backends = [
            dict(type='LocalVisBackend'), dict(type='MemoryVisBackend')]
        cfg.custom_hooks = [dict(type='mmsinger.DiagnosticsHook',
                                 **hook or dict(interval=0))]
        if model is not None:
            model(cfg)
        if not validate:
            cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        prepare_training(cfg)
        runner = Runner.from_cfg(cfg)
        runner.train()
        memory = runner.visualizer.get_backend('MemoryVisBackend')
        return runner, memory

    yield train
    init_default_scope('mmengine')


def diagnosed(memory):
    """What the hook logged, by step."""
    return {step: {key.partition('/')[2] for key in scalars
                   if key.startswith('diagnostics/')}
            for step, scalars in memory.scalars
            if any(key.startswith('diagnostics/') for key in scalars)}


def with_layers(names):
    return {f'{name}_{layer}' for name in names for layer in (1, 3)}


def test_a_run_logs_at_its_interval(run, tmp_path):
    runner, memory = run(dict(interval=2))
    found = diagnosed(memory)
    assert found == {2: with_layers(REFINED | ENERGIES),
                     4: with_layers(REFINED | ENERGIES)}
    assert not memory.images and not runner.model.records
    # in the files too, both of them
    for name in ('scalars.json', f'{runner.timestamp}.json'):
        with open(os.path.join(runner._log_dir, 'vis_data', name)) as file:
            lines = [json.loads(line) for line in file]
        ours = [line for line in lines if 'diagnostics/cosine_1' in line]
        assert [line['iter'] for line in ours] == [2, 4]
        assert 0.5 < ours[0]['diagnostics/cosine_1'] < 1
        assert ours[0]['diagnostics/e_safe_up_1'] > 0.99
    # and not on the terminal: sixteen numbers a layer would fill it
    with open(os.path.join(runner._log_dir,
                           f'{runner.timestamp}.log')) as file:
        assert 'gradient_share' not in file.read()


def fitnet(cfg):
    for key in ('adapter', 'loss_outlier', 'loss_info', 'last_layer'):
        cfg.model.pop(key, None)
    cfg.model.type = 'mmsinger.FitNetDistiller'


def vitkd(cfg):
    fitnet(cfg)
    cfg.model.type = 'mmsinger.ViTKDDistiller'
    for key in ('layers', 'loss_kd'):
        cfg.model.pop(key, None)
    cfg.model.update(mimic_layers=(1, ), generate_layer=3,
                     student_layers=(0, 1))


def gated(cfg):
    cfg.model.update(gate=dict(mad=8.), cap=True)
    cfg.model.target_norm = 'standardise'


def amp(cfg):
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.dtype = 'bfloat16'


def plain(cfg):
    from mmsinger.export import student_config
    cfg.model = student_config(cfg).model


@pytest.mark.parametrize('model, names', [
    (fitnet, BEFORE), (vitkd, BEFORE), (gated, REFINED | ENERGIES),
    (amp, REFINED | ENERGIES), (plain, set())],
    ids=lambda value: getattr(value, '__name__', ''))
def test_every_method_logs_what_it_has(run, model, names):
    _, memory = run(dict(interval=1), max_iters=1,
                    model=model)
    assert diagnosed(memory) == ({1: with_layers(names)} if names else {})
    for _, scalars in memory.scalars:
        for name, value in scalars.items():
            assert np.isfinite(value), name


def test_a_matrix_of_zeros_has_no_energies(run):
    _, memory = run(dict(interval=1), max_iters=1,
                    **{'model.adapter.init': 'zero',
                       'optim_wrapper.optimizer.lr': 0.})
    assert 'e_safe_down_1' in diagnosed(memory)[1]
    assert 'e_safe_up_1' not in diagnosed(memory)[1]


def test_training_is_the_same_with_it(run):
    weights = []
    for hook in (None, dict(interval=1, draw=True, draw_interval=2,
                            draw_images=1)):
        runner, _ = run(hook, max_iters=3)
        weights.append(runner.model.state_dict())
    assert all(torch.equal(value, weights[1][name])
               for name, value in weights[0].items())


def test_nothing_is_done_in_between(run, monkeypatch):
    """No record, hence no copy and no wait, in steps that do not log."""
    seen = []
    original = FeatureDistiller.make_targets

    def make_targets(self, *args):
        seen.append(len(self.records))
        return original(self, *args)

    monkeypatch.setattr(FeatureDistiller, 'make_targets', make_targets)
    run(dict(interval=3), max_iters=4)
    assert seen == [0, 0, 1, 0]


@pytest.mark.parametrize('how, steps', [
    ('validation', [2]), ('end', [2]), ('interval', [1])])
def test_pictures(run, how, steps):
    options = dict(draw=True, draw_images=1)
    if how == 'interval':
        options['draw_interval'] = 1
    runner, memory = run(
        dict(interval=0, **options), max_iters=1 if how == 'interval' else 2,
        validate=how == 'validation')
    names = ['norm_maps', 'similarity_maps', 'pca_maps']
    assert [(name, step) for name, step, _ in memory.images] == [
        (name, step) for step in steps for name in names]
    for _, _, image in memory.images:
        assert image.dtype == np.uint8 and image.ndim == 3
        assert len(np.unique(image)) > 50
    folder = os.path.join(runner._log_dir, 'vis_data', 'vis_image')
    assert sorted(os.listdir(folder)) == sorted(
        f'{name}_{step}.png' for step in steps for name in names)


def test_mlflow_gets_a_file_name():
    from mmengine.visualization import MLflowVisBackend
    calls = []

    class Backend(MLflowVisBackend):

        def __init__(self):
            pass

        def add_image(self, name, image, step=0, **kwargs):
            calls.append((name, step))

    class Visualizer:
        _vis_backends = dict(mlflow=Backend(), other=MemoryVisBackend())

    add_image(Visualizer, 'norm_maps', None, 7)
    assert calls == [('norm_maps_7.png', 7)]
    assert Visualizer._vis_backends['other'].images == [
        ('norm_maps', 7, None)]


def test_another_process_measures_nothing(run, monkeypatch):
    monkeypatch.setattr(
        'mmsinger.engine.hooks.diagnostics_hook.is_main_process',
        lambda: False)
    _, memory = run(dict(interval=1, draw=True, draw_interval=1), max_iters=2)
    assert not diagnosed(memory) and not memory.images


@pytest.mark.parametrize('kwargs, words', [
    (dict(interval=-1), ['interval=-1', '0 or more']),
    (dict(interval=2.5), ['interval=2.5', 'whole number']),
    (dict(num_images=0), ['num_images=0', '1 or more']),
    (dict(draw_interval=-1), ['draw_interval=-1', '0 or more']),
    (dict(patch=(0.5, 1)), ['patch.1=1', 'below 1'])])
def test_bad_settings(kwargs, words):
    with pytest.raises(ConfigError) as error:
        DiagnosticsHook(**kwargs)
    for word in words:
        assert word in str(error.value)
