"""Standardised targets."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.models.targets.normalise import TargetNorm
from tiny import randn

seeds = st.integers(0, 2**31 - 1)
D = 16


def features(count=2000, dim=D, scale=7.0, seed=0):
    """Like raw block outputs: a large mean, the same in every token."""
    return scale * randn(count, dim, seed=seed) + \
        30 * randn(dim, seed=seed + 1)


def calibrated(tokens):
    norm = TargetNorm(tokens.shape[1], 'standardise')
    norm.calibrate(tokens)
    return norm


@given(st.integers(2, 64), st.floats(0.01, 100), seeds)
def test_a_typical_token_gets_the_norm_sqrt_d(dim, scale, seed):
    tokens = features(500, dim, scale, seed)
    norms = calibrated(tokens).normalise(tokens[None])[0].norm(dim=-1)
    assert norms.median().item() == pytest.approx(dim**0.5, rel=1e-3)


def test_channels_are_centred():
    norm = calibrated(features())
    centred = norm.normalise(features(seed=0)[None])[0]
    assert centred.median(dim=0).values.abs().max() < 1e-5
    assert centred.mean(dim=0).abs().max() < 0.1


def test_statistics_by_hand():
    import numpy as np
    tokens = features(501)
    norm = calibrated(tokens)
    values = tokens.double().numpy()
    centre = np.median(values, axis=0)
    scale = np.median(np.linalg.norm(values - centre, axis=1)) / D**0.5
    np.testing.assert_allclose(norm.centre.numpy(), centre, rtol=1e-5)
    assert norm.scale.item() == pytest.approx(scale, rel=1e-5)


@given(st.floats(10, 1000), seeds)
def test_five_percent_outliers_hardly_move_them(size, seed):
    clean = features(seed=seed)
    spoilt = clean.clone()
    direction = nn.functional.normalize(randn(D, seed=seed + 2), dim=0)
    spoilt[::20] += size * 30 * direction  # an artifact direction
    first, second = calibrated(clean), calibrated(spoilt)
    assert second.scale.item() == pytest.approx(first.scale.item(), rel=0.1)
    # in units of the features' own spread, 7
    assert ((second.centre - first.centre) / 7).abs().max() < 0.2
    # what mean and standard deviation would have done
    assert (spoilt.mean(0) - clean.mean(0)).norm() / 7 > 1


@given(seeds, st.integers(1, 4))
def test_restore_inverts_normalise(seed, batch):
    norm = calibrated(features(seed=seed))
    tokens = features(batch * 6, seed=seed + 5).reshape(batch, 6, D)
    torch.testing.assert_close(norm.restore(norm.normalise(tokens)), tokens,
                               rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(norm.normalise(norm.restore(tokens)), tokens,
                               rtol=1e-4, atol=1e-3)


def test_constant_tokens_do_not_divide_by_zero():
    norm = calibrated(torch.ones(50, D))
    assert torch.isfinite(norm.normalise(torch.ones(1, 3, D))).all()


def test_half_precision_tokens():
    norm = calibrated(features().bfloat16())
    tokens = features(6)[None]
    exact = norm.normalise(tokens)
    half = norm.normalise(tokens.bfloat16())
    assert exact.dtype == half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0.1)


# -- modes --------------------------------------------------------------------


def test_none_is_the_paper_and_does_nothing():
    norm = TargetNorm(D)
    tokens = randn(2, 5, D)
    assert norm.normalise(tokens) is tokens
    assert norm.restore(tokens) is tokens
    assert norm.target(tokens) is tokens
    assert not norm.needs_calibration
    assert not norm.state_dict()


def test_layernorm_changes_the_kd_target_alone():
    norm = TargetNorm(D, 'layernorm')
    tokens = features(10)[None]
    assert norm.normalise(tokens) is tokens
    assert norm.restore(tokens) is tokens
    target = norm.target(tokens.bfloat16())
    assert target.dtype == torch.float32
    for token in norm.target(tokens)[0]:
        assert token.mean().item() == pytest.approx(0, abs=1e-5)
        assert token.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    assert not norm.needs_calibration
    assert not norm.state_dict()


def test_standardise_has_no_further_target():
    norm = calibrated(features())
    tokens = randn(2, 5, D)
    assert norm.target(tokens) is tokens


def test_gradient_passes():
    for mode in (None, 'standardise', 'layernorm'):
        norm = TargetNorm(D, mode)
        if mode == 'standardise':
            norm.calibrate(features())
        tokens = randn(2, 5, D).requires_grad_()
        norm.target(norm.normalise(tokens)).square().sum().backward()
        assert torch.isfinite(tokens.grad).all()
        assert not list(norm.parameters())  # nothing to train


def test_bad_mode():
    with pytest.raises(ConfigError) as caught:
        TargetNorm(D, 'standardize')
    message = str(caught.value)
    assert "target_norm='standardize'" in message
    assert "'standardise', 'layernorm', or None" in message
    assert "Did you mean 'standardise'" in message


# -- calibration and checkpoints ----------------------------------------------


def test_needs_calibration_once():
    norm = TargetNorm(D, 'standardise')
    assert norm.needs_calibration
    norm.calibrate(features())
    assert not norm.needs_calibration
    assert not copy.deepcopy(norm).needs_calibration


def test_uncalibrated_use_cannot_go_unnoticed():
    """NaN, which stops the run, rather than raw features."""
    norm = TargetNorm(D, 'standardise')
    assert torch.isnan(norm.normalise(randn(1, 2, D))).all()


def test_state_dict_round_trip_keeps_the_calibration():
    norm = calibrated(features())
    assert set(norm.state_dict()) == {'centre', 'scale'}
    other = TargetNorm(D, 'standardise')
    other.load_state_dict(norm.state_dict())
    assert not other.needs_calibration
    tokens = features(6)[None]
    assert torch.equal(other.normalise(tokens), norm.normalise(tokens))


def test_round_trip_through_a_parent():
    def model():
        return nn.ModuleDict({
            '17': TargetNorm(D, 'standardise'),
            '23': TargetNorm(D, 'standardise')})

    source, target = model(), model()
    source['17'].calibrate(features())
    target.load_state_dict(source.state_dict())
    assert not target['17'].needs_calibration
    # saved before its calibration: still to be done
    assert target['23'].needs_calibration
