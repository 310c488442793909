"""SiNGER for outliers alone, against the formulas."""
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from mmsinger.errors import ConfigError
from mmsinger.models import GatedSiNGERDistiller, SiNGERDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.tokens import Tokens
from tiny import vit


def distiller(cls=GatedSiNGERDistiller, ready=True, **kwargs):
    torch.manual_seed(0)
    model = cls(student=vit(), teacher=dict(backbone=vit()), layers=(1, 3),
                task_loss_weight=0, **{**dict(adapter=dict(rank=4)),
                                       **kwargs})
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if ready:
        model.refinement.init_weights(model.teacher)
        for adapter in model.adapters.values():
            torch.nn.init.normal_(adapter.down, std=0.3)
    return model.train()


def tokens_with_outliers(count=3):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(2, 17, 32, generator=generator)
    values[0, 1:1 + count] *= 9
    return Tokens(values, (4, 4))


def norm(values):
    return np.linalg.norm(values, axis=-1)


def test_refinement_is_that_of_the_formulas():
    model = distiller(gate=dict(mad=5.))
    tokens = tokens_with_outliers()
    with torch.no_grad():
        refined, target, outlier = model.refine(3, tokens)
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
    assert np.allclose(target.patches, capped, atol=1e-5)
    assert np.abs(capped - f_hat).max() > 1


def test_without_outliers_it_is_fitnet():
    """Nothing is gated: the student gets the features as they are."""
    model = distiller(gate=dict(mad=1e6))
    tokens = tokens_with_outliers()
    refined, target, outlier = model.refine(3, tokens)
    assert torch.equal(refined.values, tokens.values)
    assert torch.equal(target.values, tokens.values)
    assert outlier == 0
    losses = model.loss(torch.randn(2, 3, 32, 32), None)
    assert losses['distill.loss_info'] < 1e-9
    sum(losses.values()).backward()
    for p in model.parameters():  # DDP wants gradients all the same
        assert p.grad is not None or not p.requires_grad
    assert all(not p.grad.any() for p in model.adapters.parameters())


def test_gated_tokens_train_the_adapters():
    model = distiller(gate=dict(mad=0.5))
    record = StepRecord()
    model.records.append(record)
    losses = model.loss(torch.randn(2, 3, 32, 32), None)
    assert losses['distill.loss_outlier'] > 0
    sum(losses.values()).backward()
    for p in model.adapters.parameters():
        assert torch.isfinite(p.grad).all() and p.grad.any()
    ratios = model.refinement.inlier_variance(record.layers)
    assert len(ratios) == 2
    assert all(torch.isfinite(v) for v in ratios.values())


def test_default_singer_is_the_papers():
    """The paper refines all tokens and aims at the refined ones."""
    model = distiller(SiNGERDistiller)
    tokens = tokens_with_outliers()
    refined, target, _ = model.refine(3, tokens)
    assert target is refined
    assert (refined.patches != tokens.patches).any(dim=-1).all()


def test_nothing_depends_on_data():
    model = distiller()
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = Tokens(torch.empty(2, 17, 32), (4, 4))
        refined, target, outlier = model.refine(3, tokens)
        assert refined.values.shape == target.values.shape == (2, 17, 32)
        assert outlier.shape == ()


@pytest.mark.parametrize('gate, words', [
    (dict(mda=8.), ['model.gate.mda', "'mad'"]),
    (dict(mad=-1), ['model.gate.mad=-1', 'above 0']),
    (8.0, ['model.gate=8.0', 'dict(mad=']),
    (None, ['model.gate=None'])])
def test_bad_gate(gate, words):
    with pytest.raises(ConfigError) as error:
        distiller(gate=gate, ready=False)
    for word in words:
        assert word in str(error.value)


def test_it_is_singer_to_the_hooks():
    assert issubclass(GatedSiNGERDistiller, SiNGERDistiller)
    assert 'SiNGERAdapterHook' in GatedSiNGERDistiller.required_hooks
