"""SiNGER's refinement as a step: gate, cap and place, against formulas."""
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mmsinger.engine.diagnostics import inlier_variances
from mmsinger.errors import ConfigError
from mmsinger.models import FitNetDistiller, SiNGERDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets import refine
from mmsinger.registry import MODELS
from tiny import vit


def distiller(cls=SiNGERDistiller, ready=True, **kwargs):
    torch.manual_seed(0)
    if cls is SiNGERDistiller:
        kwargs = {**dict(adapter=dict(rank=4)), **kwargs}
    model = cls(**{**dict(
        student=vit(), teacher=dict(backbone=vit()), layers=(1, 3),
        task_loss_weight=0), **kwargs})
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if ready and model.refinement:
        model.refinement.init_weights(model.teacher)
        for adapter in model.adapters.values():
            torch.nn.init.normal_(adapter.down, std=0.3)
        if model.needs_calibration:
            model.calibrate([images(4)])
    return model.train()


def gated(mad=8., **kwargs):
    return distiller(gate=dict(mad=mad), cap=True, **kwargs)


def images(count=2):
    return torch.randn(count, 3, 32, 32,
                       generator=torch.Generator().manual_seed(1))


def tokens_with_outliers(count=3):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(2, 17, 32, generator=generator)
    values[0, 1:1 + count] *= 9
    return Tokens(values, (4, 4))


def norm(values):
    return np.linalg.norm(values, axis=-1)


# -- gate and cap -------------------------------------------------------------


@pytest.mark.parametrize('cap', [False, True])
def test_gated_refinement_is_that_of_the_formulas(cap):
    model = distiller(gate=dict(mad=5.), cap=cap)
    tokens = tokens_with_outliers()
    model.refinement.calibrate({1: tokens.patches, 3: tokens.patches})
    with torch.no_grad():
        refined, target, outlier = model.refinement.refine(3, tokens)
        everywhere = model.adapters['3'](tokens.patches).numpy()
    patches = tokens.patches.numpy()
    norms = norm(patches)
    ordered = np.sort(norms.ravel())
    median = ordered[(norms.size - 1) // 2]
    mad = np.sort(np.abs(norms - median).ravel())[(norms.size - 1) // 2]
    gate = norms > median + 5 * 1.4826 * mad
    assert gate.sum() == 3 and gate[0, :3].all()
    f_hat = np.where(gate[..., None], everywhere, patches)
    assert np.allclose(refined.patches, f_hat, atol=1e-6)
    # inliers bit by bit, prefix tokens too
    assert torch.equal(refined.patches[~torch.tensor(gate)],
                       tokens.patches[~torch.tensor(gate)])
    assert torch.equal(target.prefix, tokens.prefix)
    lengths = norm(f_hat)
    excess = [(n - median)**2 for n in lengths[gate] if n > median]
    assert excess
    weight = model.loss_outlier.loss_weight
    assert outlier.item() == pytest.approx(
        weight * 0.5 * np.mean(excess), rel=1e-4)
    capped = f_hat * np.where(
        gate, np.minimum(1, median / lengths), 1.)[..., None]
    assert np.abs(capped - f_hat).max() > 1
    assert np.allclose(target.patches, capped if cap else f_hat, atol=1e-5)


def test_the_gate_is_the_same_for_every_batch():
    """Its threshold is kept with the weights; a batch of one image, or of
    long tokens alone, does not move it."""
    model = distiller(gate=dict(mad=5.))
    tokens = tokens_with_outliers()
    model.refinement.calibrate({1: tokens.patches, 3: tokens.patches})
    together = model.refinement.refine(3, tokens).tokens.values
    alone = model.refinement.refine(3, tokens._replace(
        values=tokens.values[:1])).tokens.values
    assert torch.equal(together[:1], alone)
    other = distiller(gate=dict(mad=5.), ready=False)
    assert other.needs_calibration
    other.load_state_dict(model.state_dict())
    assert not other.needs_calibration
    assert torch.equal(other.gates['3'].threshold, model.gates['3'].threshold)


@pytest.mark.parametrize('change', [
    dict(adapter=dict(rank=4, init='random')),
    dict(adapter=dict(rank=4, selection='threshold')),
    dict(adapter=dict(rank=4, threshold=0.5)),
    dict(adapter=dict(rank=4, seed=3)),
    dict(adapter=dict(rank=4, fold_layer_scale=True)),
    dict(adapter=dict(rank=4, fold_norm=True)), dict(gate=dict(mad=2.))],
    ids=str)
def test_settings_of_the_start_have_no_effect_afterwards(change):
    """All of ``start_only``, which a resumed run says so of, and no other."""
    names = {f'{key}.{name}' for key, value in change.items()
             for name in value} - {'adapter.rank'}
    assert names <= set(refine.Refine.start_only)
    model = distiller(gate=dict(mad=0.5))
    other = distiller(**{**dict(gate=dict(mad=0.5)), **change})
    other.load_state_dict(model.state_dict())
    tokens = tokens_with_outliers()
    assert torch.equal(model.refinement.refine(3, tokens).target.values,
                       other.refinement.refine(3, tokens).target.values)
    assert len(refine.Refine.start_only) == 7


def test_a_loss_of_ones_own():
    class Mine(nn.Module):

        def forward(self, patches, weight=None):
            return patches.square().mean()

    MODELS.register_module(name='MyOutlierLoss', module=Mine, force=True)
    mine = dict(type='MyOutlierLoss')
    model = distiller(loss_outlier=mine)
    record = StepRecord()
    model.records.append(record)
    assert model.loss(images(), None)['distill.loss_outlier'] > 0
    assert inlier_variances(record, 0.95)[3] > 0
    for other in (mine, dict(of='teacher')):
        with pytest.raises(ConfigError, match='loss_weight alone is read'):
            distiller(loss_outlier=other, gate=dict(mad=8.))


def test_a_gate_comes_before_what_changes_values():
    gate = dict(type='mmsinger.Refine', gate=dict(mad=8.))
    for step in (dict(type='mmsinger.ClipNorms', mad=6.),
                 dict(type='mmsinger.RemoveOutlierSubspace')):
        with pytest.raises(ConfigError, match=r'targets\.1\.gate.*first'):
            distiller(FitNetDistiller, targets=[step, gate])
        distiller(FitNetDistiller, targets=[gate, step])
    for step in (dict(type='mmsinger.MaskTokens', mad=6.),
                 dict(type='mmsinger.RemoveOutlierSubspace', inside=True)):
        distiller(FitNetDistiller, targets=[step, gate])


def test_outliers_that_are_shorter_than_the_median_have_no_loss():
    """L_outlier shortens tokens; it never makes one longer."""
    model = distiller(gate=dict(mad=5.))
    tokens = tokens_with_outliers()
    model.refinement.calibrate({1: tokens.patches, 3: tokens.patches})
    loss = {}
    for count in (3, 2):  # so many keep their length, the others lose it
        keep = torch.ones(2, 16, 1)
        keep[0, count:3] = 0.
        model.refinement.adapters['3'].forward = lambda x: x * keep
        loss[count] = model.refinement.refine(3, tokens).loss_outlier
    median = model.gates['3'].median
    excess = (tokens.patches[0, :3].norm(dim=-1) - median).square() / 2
    weight = model.loss_outlier.loss_weight
    torch.testing.assert_close(loss[3], weight * excess.mean())
    torch.testing.assert_close(loss[2], weight * excess[:2].mean())


def test_a_checkpoint_without_the_gates_statistics():
    """They are found anew; all else has to be there."""
    model = distiller(gate=dict(mad=5.), ready=False)
    old = {key: value for key, value in model.state_dict().items()
           if 'gates' not in key}
    model.load_state_dict(old)
    assert model.needs_calibration
    with pytest.raises(RuntimeError, match='calibrated'):
        model.loss(images(), None)


def test_without_outliers_the_gate_leaves_fitnets_targets():
    """Nothing is gated: the student gets the features as they are, to the
    bit."""
    model, fitnet = gated(1e6), distiller(FitNetDistiller)
    tokens = tokens_with_outliers()
    refined, target, outlier = model.refinement.refine(3, tokens)
    assert torch.equal(refined.values, tokens.values)
    assert torch.equal(target.values, tokens.values)
    assert outlier == 0
    fitnet.__dict__['teacher'] = model.teacher
    targets, _ = model.make_targets(model.run_teacher(images()))
    expected, _ = fitnet.make_targets(fitnet.run_teacher(images()))
    for layer in (1, 3):
        assert torch.equal(targets[layer].values, expected[layer].values)
        assert targets[layer].weight is expected[layer].weight is None
    losses = model.loss(images(), None)
    assert losses['distill.loss_info'] < 1e-9
    sum(losses.values()).backward()
    for p in model.parameters():  # DDP wants gradients all the same
        assert p.grad is not None or not p.requires_grad
    assert all(not p.grad.any() for p in model.adapters.parameters())


def test_gated_tokens_train_the_adapters():
    model = gated(0.5)
    record = StepRecord()
    model.records.append(record)
    losses = model.loss(images(), None)
    assert losses['distill.loss_outlier'] > 0
    sum(losses.values()).backward()
    for p in model.adapters.parameters():
        assert torch.isfinite(p.grad).all() and p.grad.any()
    ratios = inlier_variances(record, 0.95)
    assert len(ratios) == 2
    assert all(torch.isfinite(v) for v in ratios.values())


def test_default_is_the_papers():
    """The paper refines all tokens and aims at the refined ones."""
    model = distiller()
    tokens = tokens_with_outliers()
    refined, target, _ = model.refinement.refine(3, tokens)
    assert target is refined
    assert (refined.patches != tokens.patches).any(dim=-1).all()


@pytest.mark.parametrize('kwargs', [{}, dict(gate=dict(mad=8.), cap=True)],
                         ids=['paper', 'gated'])
@pytest.mark.parametrize('weighted', [False, True])
def test_nothing_depends_on_data(kwargs, weighted):
    model = distiller(**kwargs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty(2, 17) if weighted else None
        tokens = Tokens(torch.empty(2, 17, 32), (4, 4), weight)
        refined, target, outlier = model.refinement.refine(3, tokens)
        assert refined.values.shape == target.values.shape == (2, 17, 32)
        assert outlier.shape == ()


@pytest.mark.parametrize('kwargs, words', [
    (dict(gate=dict(mda=8.)), ['gate.mda', "'mad'"]),
    (dict(gate=dict(mad=-1)), ['gate.mad=-1', 'above 0']),
    (dict(gate={}), ['gate', 'mad']),
    (dict(gate=8.0), ['gate=8.0', 'a dict with the keys mad']),
    (dict(gate=True), ['gate=True', 'a dict']),
    (dict(cap=True), ['cap=True', 'gate=dict(mad=8.0)']),
], ids=str)
def test_bad_gate(kwargs, words):
    with pytest.raises(ConfigError) as error:
        distiller(ready=False, **kwargs)
    for word in words:
        assert word in str(error.value), str(error.value)


# -- as a step of any method --------------------------------------------------


REFINE = dict(type='mmsinger.Refine', adapter=dict(rank=4))
CLIP = dict(type='mmsinger.ClipNorms', quantile=0.9)
MASK = dict(type='mmsinger.MaskTokens', mad=2.)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize('settings', [
    {}, dict(gate=dict(mad=1.), cap=True), dict(info_fraction=0.5),
    dict(loss_info=dict(last='previous', intermediate='mse'),
         last_layer='listed'),
    dict(loss_outlier=dict(quantile=0.8, loss_weight=1.))], ids=str)
def test_fitnet_on_refined_targets_is_singer(settings):
    """To the bit: losses and gradients."""
    singer = distiller(**settings)
    fitnet = distiller(FitNetDistiller, over_layers='mean',
                       targets=[{**REFINE, **settings}])
    assert list(singer.state_dict()) == list(fitnet.state_dict())
    outcomes = []
    for model in (singer, fitnet):
        torch.manual_seed(4)
        losses = model.loss(images(4), None)
        sum(losses.values()).backward()
        outcomes.append((losses, {
            key: p.grad for key, p in model.named_parameters()
            if p.grad is not None}))
    (ours, our_grads), (theirs, their_grads) = outcomes
    assert list(ours) == list(theirs) == [
        'distill.loss_kd', 'distill.loss_outlier', 'distill.loss_info']
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert our_grads.keys() == their_grads.keys()
    assert all(torch.equal(our_grads[key], their_grads[key])
               for key in our_grads)


@pytest.mark.parametrize('steps', [
    [REFINE], [REFINE, CLIP], [CLIP, REFINE], [MASK, CLIP, REFINE, MASK]],
    ids=lambda steps: '-'.join(s['type'].split('.')[1] for s in steps))
def test_checkpoints_do_not_know_the_place_of_a_step(steps):
    model = distiller(FitNetDistiller, targets=steps)
    assert model.state_dict().keys() == distiller().state_dict().keys()
    adapters = [key for key in model.state_dict() if 'adapter' in key]
    assert adapters == [f'adapters.{layer}.{name}' for layer in (1, 3)
                        for name in ('down', 'up')]
    losses = model.loss(images(), None)
    assert list(losses) == ['distill.loss_kd', 'distill.loss_outlier',
                            'distill.loss_info']
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters()
               if p.requires_grad)


def test_the_order_of_steps_counts():
    """Clipped before refinement, norms pass the limit again; clipped after
    it, they do not."""
    longest = []
    for steps in ([CLIP, REFINE], [REFINE, CLIP]):
        model = distiller(FitNetDistiller, targets=steps)
        with torch.no_grad():
            for adapter in model.adapters.values():
                adapter.up.mul_(3)
            targets, _ = model.make_targets(model.run_teacher(images()))
        norms = targets[3].patches.norm(dim=-1)
        ordered = norms.sort(dim=1).values
        longest.append((ordered[:, -1] / ordered[:, -2]).min().item())
    assert longest[0] > 1.001 and longest[1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('targets', [[CLIP, MASK], dict(b=CLIP, a=MASK)],
                         ids=['list', 'named'])
def test_steps_of_singer_come_after_its_refinement(targets):
    model = distiller(targets=targets)
    assert [type(step).__name__ for step in model.steps] == [
        'Refine', 'ClipNorms', 'MaskTokens']
    assert model.refinement is model.steps[0]


@pytest.mark.parametrize('cls', [FitNetDistiller, SiNGERDistiller])
@pytest.mark.parametrize('targets, key', [
    ([CLIP, dict(CLIP, mda=1)], '1'), (dict(long=dict(CLIP, mda=1)), 'long')],
    ids=['list', 'named'])
def test_errors_name_the_step_as_the_user_does(cls, targets, key):
    with pytest.raises(ConfigError, match=rf'model\.targets\.{key}\.mda'):
        distiller(cls, targets=targets)


def test_masked_tokens_are_not_refined_for():
    """Of a mask in front, neither L_outlier nor L_info sees the tokens."""
    model = distiller(FitNetDistiller, targets=[MASK, REFINE])
    outputs = model.run_teacher(images())
    tokens = outputs.tokens(3)
    spoilt = tokens.values.clone()
    spoilt[0, 5] *= 1e4
    found = []
    for values in (tokens.values, spoilt):
        masked = tokens._replace(values=values).weighed(
            (torch.arange(16) != 4).expand(2, 16))
        targets, losses = model.refinement({3: masked}, outputs)
        found.append(losses.values())
        assert targets[3].weight is masked.weight
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        assert a > 0


@pytest.mark.parametrize('make', [
    lambda: distiller(), lambda: gated(1.),
    lambda: distiller(FitNetDistiller, targets=[MASK, REFINE, CLIP])],
    ids=['singer', 'gated', 'fitnet'])
def test_a_copy_refines_with_its_own_adapters(make):
    model = make()
    model.eval()
    twin = copy.deepcopy(model)
    assert twin.teacher is model.teacher
    assert twin.refinement is not model.refinement
    assert twin.refinement.adapters is twin.adapters
    before = twin.loss(images(), None)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(1.)
    assert all(torch.equal(value, before[key])
               for key, value in twin.loss(images(), None).items())
    assert not torch.equal(model.loss(images(), None)['distill.loss_kd'],
                           before['distill.loss_kd'])


def test_adapters_start_with_the_weights_in_any_method():
    model = distiller(FitNetDistiller, ready=False, targets=[CLIP, REFINE])
    assert not any(a.up.any() for a in model.adapters.values())
    model.init_weights()
    assert all(a.up.any() for a in model.adapters.values())
    assert sorted(model.refinement.ffn_directions) == [1, 3]
    assert 'SiNGERAdapterHook' in model.required_hooks


@pytest.mark.parametrize('targets, words', [
    ([REFINE, REFINE], ['Refine cannot hold', 'once']),
    ([dict(REFINE, adaptr={})], ['model.targets.0.adaptr', "'adapter'"]),
    ([dict(REFINE, adapter=dict(rnk=4))], ['model.targets.0.adapter.rnk', "'rank'"]),
    ([dict(REFINE, adapter=4)], ['adapter=4', 'dict']),
    ([dict(REFINE, loss_info=dict(lasst='self'))], [
        'loss_info.lasst', "'last'"]),
    ([dict(REFINE, loss_info=dict(type='mmsinger.GramLoss'))], [
        "loss_info.type='mmsinger.GramLoss'"]),
    ([dict(REFINE, loss_outlier=0.1)], ['model.targets.0.loss_outlier=0.1', 'a dict']),
    ([dict(REFINE, last_layer='fnal')], ["last_layer='fnal'", "'final'"]),
], ids=str)
def test_bad_steps(targets, words):
    with pytest.raises(ConfigError) as error:
        distiller(FitNetDistiller, ready=False, targets=targets)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_two_refinements_of_singer():
    for targets in ([REFINE], dict(refine=REFINE)):
        with pytest.raises(ConfigError, match='Refine cannot hold.*once'):
            distiller(targets=targets)
    for targets in (None, CLIP, 5):
        with pytest.raises(ConfigError, match='targets'):
            distiller(targets=targets)


# -- the gradient of L_info, which is there before the backward pass ----------


@MODELS.register_module()
class LearnedInfoLoss(nn.Module):
    """A user's, with names of its own and something to learn."""
    loss_weight, last = 1., 'self'

    def __init__(self, learns=True):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(32), requires_grad=learns)

    def forward(self, refined, original, num_prefix, is_last, weight=None):
        return (self.factor * (refined - original)).square().mean()


def gradients(model):
    losses = model.loss(images(), None)
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters()
            if p.grad is not None}


@pytest.mark.parametrize('settings', [
    {}, dict(info_fraction=0.5), dict(loss_info=dict(intermediate='mse')),
    dict(target_norm='layernorm'), dict(teacher_dtype='bf16'),
    dict(loss_info=dict(type='LearnedInfoLoss')),
    dict(loss_info=dict(type='LearnedInfoLoss', learns=False)),
    dict(loss_info=dict(type='LearnedInfoLoss'), last_layer='listed'),
    dict(checkpointed=True)], ids=str)
def test_gradients_are_those_of_one_backward_pass(monkeypatch, settings):
    settings = dict(settings)
    if settings.pop('checkpointed', False):
        pytest.importorskip('mmseg')
        settings['teacher'] = dict(backbone=dict(
            type='mmseg.VisionTransformer', img_size=32, patch_size=8,
            embed_dims=32, num_layers=4, num_heads=4, with_cp=True))
    model = distiller(**settings)
    torch.manual_seed(3)
    found = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(refine, 'loss_behind_block',
                        lambda block, loss, tokens, _: loss(block(tokens)))
    torch.manual_seed(3)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    assert any('adapters' in name for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4,
                                   atol=1e-6 * grad.abs().max().item())
