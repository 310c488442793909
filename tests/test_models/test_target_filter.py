"""Clipped and masked targets: against numpy, and in a distiller."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from mmsinger.errors import ConfigError
from mmsinger.metrics import robust_threshold
from mmsinger.models import (ClipNorms, FeatureMSELoss, FitNetDistiller,
                             MaskTokens)
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.filter import clip_norms
from tiny import vit

seeds = st.integers(0, 2**16)
PLANTED = dict(backbone=dict(type='mmsinger.PlantedArtifacts',
                             backbone=vit(), after=0, share=0.1))


def clip(**kwargs):
    return dict(type='mmsinger.ClipNorms', **kwargs)


def mask(**kwargs):
    return dict(type='mmsinger.MaskTokens', **kwargs)


def random_tokens(seed=0, batch=3, grid=(4, 4), dim=8, prefix=1):
    generator = torch.Generator().manual_seed(seed)
    count = prefix + grid[0] * grid[1]
    values = torch.randn(batch, count, dim, generator=generator)
    values *= 1 + 5 * torch.rand(batch, count, 1, generator=generator)**4
    return Tokens(values, grid)


def norms_of(tokens):
    return np.linalg.norm(tokens.patches.numpy().astype(float), axis=-1)


def mad_threshold(norms, k):
    # torch's median is the lower one of an even number
    lower = lambda v: np.sort(v.ravel())[(v.size - 1) // 2]  # noqa: E731
    median = lower(norms)
    return median, median + k * 1.4826 * lower(np.abs(norms - median))


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.5, 8))
def test_robust_threshold(seed, k):
    norms = norms_of(random_tokens(seed))
    ours = robust_threshold(torch.tensor(norms), k)
    assert np.allclose(ours, mad_threshold(norms, k), rtol=1e-4)


def test_robust_threshold_is_hardly_moved_by_artifacts():
    clean = torch.rand(4, 100) + 10
    spoilt = clean.clone()
    spoilt[:, :20] = 1e4
    before, after = (robust_threshold(n, 6.)[1] for n in (clean, spoilt))
    assert 0 < after - before < 2


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([dict(quantile=0.9), dict(mad=1.5)]))
def test_clipping(seed, limit):
    tokens = random_tokens(seed)
    clipped = ClipNorms(**limit).filter(tokens)
    assert clipped.weight is None
    assert torch.equal(clipped.prefix, tokens.prefix)
    norms = norms_of(tokens)
    if 'quantile' in limit:
        limit = np.quantile(norms, 0.9, axis=1, keepdims=True)
    else:
        limit = mad_threshold(norms, 1.5)[1]
    expected = np.minimum(norms, limit)
    assert np.allclose(norms_of(clipped), expected, rtol=1e-4)
    # the direction stays
    cosine = torch.cosine_similarity(clipped.patches, tokens.patches, dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)


def test_clipping_of_zeros_has_a_finite_gradient():
    patches = torch.zeros(1, 4, 3, requires_grad=True)
    norms = torch.linalg.vector_norm(patches, dim=-1)
    clip_norms(patches, norms, torch.ones(())).sum().backward()
    assert torch.isfinite(patches.grad).all()


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_mask(seed):
    tokens = random_tokens(seed)
    masked = MaskTokens(mad=2.).filter(tokens)
    assert torch.equal(masked.values, tokens.values)
    assert (masked.weight[:, 0] == 1).all()  # CLS counts
    norms = norms_of(tokens)
    expected = norms <= mad_threshold(norms, 2.)[1]
    same = masked.patch_weight.numpy() == expected
    assert same.mean() > 0.99  # rounding at the limit
    assert 0 < expected.sum() < expected.size


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_weighted_feature_loss(seed):
    pred = random_tokens(seed).values
    target = random_tokens(seed + 1).values
    loss = FeatureMSELoss(2.)
    ones = torch.ones(pred.shape[:2])
    assert torch.allclose(loss(pred, target, ones), loss(pred, target))
    keep = torch.rand(pred.shape[:2]) > 0.5
    if keep.any():
        assert torch.allclose(loss(pred, target, keep.float()),
                              loss(pred[keep], target[keep]), rtol=1e-4)
    assert loss(pred, target, 0 * ones) == 0


# -- in a distiller ----------------------------------------------------------


def distiller(teacher=None, **kwargs):
    torch.manual_seed(0)
    model = FitNetDistiller(
        student=vit(), teacher=teacher or dict(backbone=vit()),
        layers=(1, 3), task_loss_weight=0, **kwargs)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def images():
    return torch.randn(2, 3, 32, 32,
                       generator=torch.Generator().manual_seed(1))


def test_masked_loss_leaves_the_planted_tokens_out():
    """Whatever stands there in the target, the loss is the same."""
    model = distiller(PLANTED, targets=[mask(oracle=True)])
    targets, losses = model.make_targets(model.run_teacher(images()))
    assert losses == {}
    planted = model.teacher.backbone.planted_mask
    assert 0 < planted.sum() < planted.numel() / 2
    target = targets[3]
    assert torch.equal(target.patch_weight, (~planted).float())
    student = random_tokens(batch=2, dim=32)
    loss = model.kd_loss(3, student, target)
    assert torch.isfinite(loss)

    def changed(where):
        patches = target.patches + 100. * where.unsqueeze(-1)
        return model.kd_loss(3, student, target.with_patches(patches))

    assert torch.equal(changed(planted), loss)
    assert changed(~planted) > 10 * loss
    # CLS counts
    cls = target._replace(values=target.values.clone())
    cls.values[:, 0] += 100
    assert model.kd_loss(3, student, cls) > 10 * loss


FILTERS = dict(
    clip_quantile=[clip(quantile=0.9)], clip_mad=[clip(mad=2.)],
    mask_mad=[mask(mad=2.)], mask_oracle=[mask(oracle=True)],
    both=[mask(mad=4.), clip(mad=2.)])


@pytest.mark.parametrize('name', FILTERS)
@pytest.mark.parametrize('norm', [None, 'standardise'])
def test_filters_lower_the_loss_of_planted_targets(name, norm):
    losses = []
    for targets in ([], FILTERS[name]):
        model = distiller(PLANTED, target_norm=norm, targets=targets)
        if norm:
            model.calibrate([images()])
        loss = model.loss(images(), None)['distill.loss_kd']
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()
                   if p.requires_grad)
        losses.append(loss.item())
    assert 0 < losses[1] < 0.95 * losses[0]


def test_limits_that_nothing_exceeds_change_nothing():
    plain = distiller().loss(images(), None)['distill.loss_kd']
    for step in (clip(mad=1e6), mask(mad=1e6)):
        loss = distiller(targets=[step]).loss(images(), None)
        assert torch.allclose(loss['distill.loss_kd'], plain, rtol=1e-5)


def test_steps_are_taken_in_the_order_of_the_list():
    """Clipped tokens are nowhere above the limit that masks."""
    limits = clip(mad=2.), mask(mad=2.5)
    left_out = []
    for targets in (limits, limits[::-1]):
        model = distiller(PLANTED, targets=list(targets))
        found, _ = model.make_targets(model.run_teacher(images()))
        left_out.append((found[3].weight == 0).sum().item())
    assert left_out[0] == 0 < left_out[1]


@pytest.mark.parametrize('name', FILTERS)
def test_a_copy_filters_too(name):
    model = distiller(PLANTED, targets=FILTERS[name])
    twin = copy.deepcopy(model)
    model.eval(), twin.eval()
    assert torch.equal(*(m.loss(images(), None)['distill.loss_kd']
                         for m in (model, twin)))
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert not any('steps' in key for key in model.state_dict())


@pytest.mark.parametrize('step', [
    ClipNorms(quantile=0.9), ClipNorms(mad=2.), MaskTokens(mad=2.)], ids=str)
@pytest.mark.parametrize('weighted', [False, True])
def test_nothing_depends_on_data(step, weighted):
    """FakeTensors have no values to look at."""
    with FakeTensorMode():
        weight = torch.empty(2, 17) if weighted else None
        tokens = step.filter(Tokens(torch.empty(2, 17, 8), (4, 4), weight))
        assert tokens.values.shape == (2, 17, 8)
        assert tokens.weight is None or tokens.weight.shape == (2, 17)


@pytest.mark.parametrize('targets, words', [
    ([clip()], ['model.targets.0.quantile: give quantile=0.95 or mad=6.0']),
    ([clip(mad=2., quantile=0.9)], ['model.targets.0.quantile', 'not both']),
    ([clip(quantil=0.9)], ['model.targets.0.quantil', "'quantile'"]),
    ([clip(quantile=1.0)], ['targets.0.quantile=1.0', 'between 0 and 1']),
    ([clip(mad=0)], ['targets.0.mad=0', 'above 0']),
    ([clip(mad='6')], ["targets.0.mad='6'", 'above 0']),
    ([mask()], ['targets.0.mad: give mad=6.0 or oracle=True']),
    ([mask(quantile=0.9)], ['model.targets.0.quantile', 'MaskTokens']),
    ([mask(mad=6., oracle=True)], ['targets.0.mad: give', 'not both']),
    ([mask(oracle=True)], ['targets.0.oracle=True', 'PlantedArtifacts']),
    ([dict(type='mmsinger.ClipNrms', mad=6.)], [
        "model.targets.0.type='mmsinger.ClipNrms'", "'ClipNorms'"]),
    ([dict(type='mmsinger.FeatureMSELoss')], [
        'FeatureMSELoss is no step', 'MaskTokens']),
    ([dict(mad=6.)], ["model.targets.0.type=''"]),
    ([dict(type=None, mad=6.)], ['model.targets.0.type=None']),
    ([dict(type=7)], ['model.targets.0.type=7']),
    (clip(mad=6.), ["model.targets.type=", 'a dict']),
    ([clip(mad=6.), 'mmsinger.MaskTokens'], [
        "model.targets.1='mmsinger.MaskTokens'", 'a dict']),
    (dict(long=clip(quantil=0.9)), ['model.targets.long.quantil']),
    (dict(clip=clip(mad=6.), mask='mad'), [
        "model.targets.mask='mad'", 'a dict']),
    (None, ['model.targets=None', 'a list']),
], ids=str)
def test_bad_input(targets, words):
    with pytest.raises(ConfigError) as error:
        distiller(targets=targets)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_clipping_has_no_effect_on_targets_of_one_norm():
    with pytest.raises(ConfigError, match='ClipNorms has no effect.*'
                       "target_norm='layernorm'"):
        distiller(targets=[clip(mad=6.)], target_norm='layernorm')


@pytest.mark.parametrize('old', [
    dict(clip=dict(mad=6.)), dict(mask='oracle')], ids=str)
def test_keys_of_old(old):
    with pytest.raises(ConfigError, match='no such key.*targets'):
        distiller(**old)


def test_a_limit_that_is_infinite_has_gradients():
    """Of an image of which no token counts."""
    patches = torch.randn(2, 5, 8, requires_grad=True)
    limit = torch.tensor([[float('inf')], [1.]])
    clipped = clip_norms(patches, patches.norm(dim=-1), limit)
    assert torch.equal(clipped[0], patches[0])
    with torch.autograd.detect_anomaly(check_nan=True):
        clipped.sum().backward()
    assert torch.isfinite(patches.grad).all()
