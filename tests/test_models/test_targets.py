"""Methods, losses and target steps in every combination, from configs."""
import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper

from mmsinger.registry import MODELS
from tiny import vit

CLIP = dict(type='mmsinger.ClipNorms', quantile=0.9)
MASK = dict(type='mmsinger.MaskTokens', mad=3.)
REFINE = dict(type='mmsinger.Refine', adapter=dict(rank=4),
              loss_outlier=dict(quantile=0.8))
GATED = dict(REFINE, gate=dict(mad=0.5), cap=True)
TARGETS = {
    'plain': [], 'clip': [CLIP], 'mask': [MASK], 'refine': [REFINE],
    'gated': [GATED], 'mask-refine': [MASK, REFINE],
    'refine-clip': [REFINE, CLIP], 'all': [MASK, CLIP, REFINE, CLIP],
}
METHODS = {
    'fitnet': (dict(type='mmsinger.FitNetDistiller'), ['loss_kd']),
    'fitnet-mean': (dict(type='mmsinger.FitNetDistiller',
                         over_layers='mean'), ['loss_kd']),
    'cosine': (dict(type='mmsinger.FitNetDistiller', loss_kd=dict(
        type='mmsinger.FeatureCosineLoss')), ['loss_kd']),
    'smooth-l1': (dict(type='mmsinger.FitNetDistiller', loss_kd=dict(
        type='mmsinger.FeatureSmoothL1Loss', beta=0.5)), ['loss_kd']),
    'gram': (dict(type='mmsinger.FitNetDistiller', loss_kd=dict(
        type='mmsinger.GramInformationLoss')), ['loss_kd']),
    'vitkd': (dict(type='mmsinger.ViTKDDistiller'),
              ['loss_mimic', 'loss_generate']),
    'vitkd-mean': (dict(type='mmsinger.ViTKDDistiller', reduction='mean'),
                   ['loss_mimic', 'loss_generate']),
}


def build(method, targets, **kwargs):
    """A distiller from a config, initialised as a Runner would."""
    torch.manual_seed(0)
    cfg = ConfigDict(dict(
        student=dict(type='mmpretrain.ImageClassifier', backbone=vit()),
        teacher=dict(backbone=vit(), layers=(1, 3)), task_loss_weight=0,
        targets=targets, **method, **kwargs))
    model = MODELS.build(copy.deepcopy(cfg))
    model.init_weights()
    if model.needs_calibration:
        model.calibrate([batch()['inputs']])
    return model.train()


def batch():
    generator = torch.Generator().manual_seed(1)
    return dict(inputs=torch.randn(2, 3, 32, 32, generator=generator),
                data_samples=None)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('targets, norm', [
    *((targets, None) for targets in TARGETS),
    *((targets, 'standardise') for targets in ('gated', 'all')),
    # clipping is an error then, see test_target_filter.py
    *((targets, 'layernorm') for targets, steps in TARGETS.items()
      if CLIP not in steps)])
def test_a_step(name, targets, norm):
    """Losses are named, every trained parameter moves."""
    method, own = METHODS[name]
    model = build(method, TARGETS[targets], target_norm=norm)
    refines = any('Refine' in step['type'] for step in TARGETS[targets])
    assert bool(model.refinement) == refines
    steps = ['loss_outlier', 'loss_info'] if refines else []
    losses = model.loss(**batch())
    assert list(losses) == [f'distill.{key}' for key in own + steps]
    assert all(torch.isfinite(value) and value >= 0
               for value in losses.values())
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters()
                if p.requires_grad and p.grad is None]
    parts = {key.split('.')[0] for key, p in model.named_parameters()
             if p.grad is not None and p.grad.any()}
    expected = {'student', 'projectors'} | ({'adapters'} if refines else
                                            set())
    if 'ViTKD' in method['type']:
        expected |= {'generator', 'mask_token'}
    assert parts == expected

    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1e-3)))
    logs = model.train_step(batch(), wrapper)
    assert torch.isfinite(logs['loss'])
    moved = {key.split('.')[0] for key, value in model.state_dict().items()
             if not torch.equal(value, before[key])}
    assert moved == expected


@pytest.mark.parametrize('loss', ['MSE', 'SmoothL1', 'Cosine'])
@pytest.mark.parametrize('targets', ['plain', 'clip', 'mask'])
def test_a_step_of_singer(loss, targets):
    model = build(SINGER, TARGETS[targets], loss_kd=dict(
        type=f'mmsinger.Feature{loss}Loss'))
    losses = model.loss(**batch())
    assert list(losses) == [f'distill.loss_{name}'
                            for name in ('kd', 'outlier', 'info')]
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all()
               for p in model.parameters() if p.requires_grad)
    assert all(a.up.grad.any() for a in model.adapters.values())


@pytest.mark.parametrize('name', ['fitnet', 'vitkd'])
@pytest.mark.parametrize('targets', TARGETS)
def test_an_averaged_copy(name, targets):
    """It has its own adapters, shares the teacher, and its keys are the
    model's."""
    model = build(METHODS[name][0], TARGETS[targets])
    average = ExponentialMovingAverage(model, momentum=0.5)
    twin = average.module
    assert twin.teacher is model.teacher
    assert list(twin.state_dict()) == list(model.state_dict())
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.)
    average.update_parameters(model)
    for key, value in model.named_parameters():
        assert torch.allclose(twin.state_dict()[key], value - 0.5, atol=1e-5)
    losses = twin.loss(**batch())
    assert all(torch.isfinite(value) for value in losses.values())
    if model.refinement:
        assert twin.refinement.adapters is twin.adapters
        assert twin.adapters is not model.adapters


def test_sum_and_mean_over_layers():
    total, mean = (build(METHODS[name][0], [REFINE]).loss(**batch())
                   for name in ('fitnet', 'fitnet-mean'))
    assert torch.allclose(total['distill.loss_kd'],
                          2 * mean['distill.loss_kd'])
    for key in ('distill.loss_outlier', 'distill.loss_info'):
        assert torch.equal(total[key], mean[key])


# -- checkpoints --------------------------------------------------------------

# What was saved before there were target steps, beside the student
KEYS = dict(
    fitnet=['projectors.1.bias', 'projectors.1.weight', 'projectors.3.bias',
            'projectors.3.weight'],
    singer=['adapters.1.down', 'adapters.1.up', 'adapters.3.down',
            'adapters.3.up'],
    standardise=['target_norms.1.centre', 'target_norms.1.scale',
                 'target_norms.3.centre', 'target_norms.3.scale'],
    next_block=['target_norms.2.centre', 'target_norms.2.scale'],
    vitkd=['generator.0.bias', 'generator.0.weight', 'generator.2.bias',
           'generator.2.weight', 'mask_token', *(
               f'projectors.{layer}.{name}' for layer in (0, 1, 3)
               for name in ('bias', 'weight'))],
)
SINGER = dict(type='mmsinger.SiNGERDistiller', adapter=dict(rank=4))
LAYOUTS = {
    'singer': (SINGER, [], None, ['fitnet', 'singer']),
    'singer-standardised': (SINGER, [], 'standardise', [
        'fitnet', 'singer', 'standardise', 'next_block']),
    'gated': (dict(SINGER, gate=dict(mad=8.), cap=True), [], None,
              ['fitnet', 'singer']),
    'fitnet': (METHODS['fitnet'][0], [], None, ['fitnet']),
    'fitnet-standardised': (METHODS['fitnet'][0], [], 'standardise', [
        'fitnet', 'standardise']),
    'fitnet-clipped': (METHODS['fitnet'][0], [CLIP], None, ['fitnet']),
    'fitnet-masked': (METHODS['fitnet'][0], [MASK], None, ['fitnet']),
    'vitkd': (METHODS['vitkd'][0], [], None, ['vitkd']),
}


def shape_of(key):
    name = key.split('.')
    if name[0] == 'generator':
        return (32, ) if name[2] == 'bias' else (32, 32, 3, 3)
    return dict(down=(32, 4), up=(4, 32), scale=(), weight=(32, 32)
                ).get(name[-1], (32, ))


@pytest.mark.parametrize('name', LAYOUTS)
def test_checkpoints_of_before_target_steps_load(name):
    method, targets, norm, parts = LAYOUTS[name]
    model = build(method, targets, target_norm=norm)
    student = MODELS.build(dict(type='mmpretrain.ImageClassifier',
                                backbone=vit()))
    old = {f'student.{key}': torch.randn_like(value)
           for key, value in student.state_dict().items()}
    for part in parts:
        old.update({key: torch.rand(shape_of(key)) for key in KEYS[part]})
    assert 'student.backbone.layers.3.ffn.layers.1.weight' in old
    model.load_state_dict(old, strict=True)
    newer = {key for key in model.state_dict() if key.startswith('gates.')}
    assert set(model.state_dict()) - newer == set(old)
    assert bool(newer) == (name == 'gated')
    assert all(torch.equal(model.state_dict()[key], value)
               for key, value in old.items())
    assert not model.needs_calibration
    assert all(torch.isfinite(v) for v in model.loss(**batch()).values())


@pytest.mark.parametrize('norm', [None, 'standardise'])
def test_the_next_block_of_a_layers_own_tokens_is_the_next_layer(norm):
    """Normalised tokens go back to what the block takes."""
    model = build(dict(type='mmsinger.SiNGERDistiller',
                       adapter=dict(rank=4)), [], target_norm=norm)
    outputs = model.run_teacher(batch()['inputs'])
    torch.testing.assert_close(
        outputs.next_block(1, outputs.tokens(1)).values,
        outputs.tokens(2).values, rtol=0, atol=1e-4)


def test_looking_at_a_student_leaves_it_in_training():
    model = build(*[dict(type='mmsinger.FitNetDistiller'), []])
    model.student_tokens(batch()['inputs'])
    assert model.training and model.student.training
