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
from mmsinger.models import FeatureMSELoss, FitNetDistiller
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.filter import TargetCure, clip_norms
from tiny import vit

seeds = st.integers(0, 2**16)
PLANTED = dict(backbone=dict(type='mmsinger.PlantedArtifacts',
                             backbone=vit(), after=0, share=0.1))


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
def test_clipping(seed, clip):
    tokens = random_tokens(seed)
    clipped, weight = TargetCure(clip=clip)(tokens, None)
    assert weight is None
    assert torch.equal(clipped.prefix, tokens.prefix)
    norms = norms_of(tokens)
    if 'quantile' in clip:
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
    same, weight = TargetCure(mask=dict(mad=2.))(tokens, None)
    assert torch.equal(same.values, tokens.values)
    norms = norms_of(tokens)
    expected = norms <= mad_threshold(norms, 2.)[1]
    assert (weight.numpy() == expected).mean() > 0.99  # rounding at the limit
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
    model = distiller(PLANTED, mask='oracle')
    taps = model.teacher(images(), [1, 3], model.student_normalisation)
    planted = model.teacher.backbone.planted_mask
    assert 0 < planted.sum() < planted.numel() / 2
    target = model.teacher_tokens(taps, 3)
    student = random_tokens(batch=2, dim=32)
    loss = model.kd_loss(3, student, target)
    assert torch.isfinite(loss)

    def changed(where):
        patches = target.patches + 100. * where.unsqueeze(-1)
        return model.kd_loss(3, student, target.with_patches(patches))

    assert torch.equal(changed(planted), loss)
    assert changed(~planted) > 10 * loss
    # CLS counts
    cls = Tokens(target.values.clone(), target.grid)
    cls.values[:, 0] += 100
    assert model.kd_loss(3, student, cls) > 10 * loss


@pytest.mark.parametrize('cure', [
    dict(clip=dict(quantile=0.9)), dict(clip=dict(mad=2.)),
    dict(mask=dict(mad=2.)), dict(mask='oracle'),
    dict(clip=dict(mad=2.), mask=dict(mad=4.))], ids=str)
@pytest.mark.parametrize('norm', [None, 'standardise'])
def test_cures_lower_the_loss_of_planted_targets(cure, norm):
    losses = []
    for kwargs in (dict(), cure):
        model = distiller(PLANTED, target_norm=norm, **kwargs)
        if norm:
            model.calibrate_target_norms([images()])
        loss = model.loss(images(), None)['distill.loss_kd']
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()
                   if p.requires_grad)
        losses.append(loss.item())
    assert 0 < losses[1] < 0.95 * losses[0]


def test_limits_that_nothing_exceeds_change_nothing():
    plain = distiller().loss(images(), None)['distill.loss_kd']
    for cure in (dict(clip=dict(mad=1e6)), dict(mask=dict(mad=1e6))):
        cured = distiller(**cure).loss(images(), None)['distill.loss_kd']
        assert torch.allclose(cured, plain, rtol=1e-5)


def test_a_copy_is_cured_too():
    model = copy.deepcopy(distiller(PLANTED, mask='oracle'))
    assert torch.isfinite(model.loss(images(), None)['distill.loss_kd'])


@pytest.mark.parametrize('cure', [
    dict(clip=dict(quantile=0.9)), dict(clip=dict(mad=2.)),
    dict(mask=dict(mad=2.))], ids=str)
def test_nothing_depends_on_data(cure):
    """FakeTensors have no values to look at."""
    with FakeTensorMode():
        tokens = Tokens(torch.empty(2, 17, 8), (4, 4))
        cured, weight = TargetCure(**cure)(tokens, None)
        assert cured.values.shape == (2, 17, 8)
        assert weight is None or weight.shape == (2, 16)


@pytest.mark.parametrize('kwargs, words', [
    (dict(clip=0.95), ['model.clip=0.95', 'dict(quantile=0.95)']),
    (dict(clip=dict(quantil=0.9)), ['model.clip.quantil', "'quantile'"]),
    (dict(clip=dict(quantile=1.0)), ['model.clip.quantile=1.0', 'between']),
    (dict(clip=dict(mad=0)), ['model.clip.mad=0', 'above 0']),
    (dict(clip=dict(mad=2., quantile=0.9)), ['model.clip=']),
    (dict(mask=dict(quantile=0.9)), ['model.mask.quantile']),
    (dict(mask='orcale'), ["model.mask='orcale'", "'oracle'"]),
    (dict(mask='oracle'), ["mask='oracle'", 'PlantedArtifacts']),
    (dict(clip=dict(mad=6.), target_norm='layernorm'),
     ['clip has no effect', 'layernorm']),
])
def test_bad_input(kwargs, words):
    with pytest.raises(ConfigError) as error:
        distiller(**kwargs)
    for word in words:
        assert word in str(error.value), str(error.value)
