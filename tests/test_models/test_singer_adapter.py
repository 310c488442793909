"""The adapter F_hat = F + gain (F down) up (section 3.2)."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.engine.diagnostics import inlier_variance_ratio
from mmsinger.errors import ConfigError
from mmsinger.metrics import subspace_energy
from mmsinger.models.adapters import SiNGERAdapter, left_singular_directions
from tiny import nullspace_of, randn

seeds = st.integers(0, 2**31 - 1)


def decomposition(dim, seed=0):
    return left_singular_directions(randn(dim, dim, seed=seed))


def initialised(dim=12, rank=4, gain=1.0, seed=0, **kwargs):
    adapter = SiNGERAdapter(dim, rank, gain)
    adapter.initialise(decomposition(dim, seed), **kwargs)
    return adapter


def test_state_dict_is_the_two_matrices():
    adapter = initialised()
    assert list(adapter.state_dict()) == ['down', 'up']
    assert {k: tuple(v.shape) for k, v in adapter.state_dict().items()} == \
        {'down': (12, 4), 'up': (4, 12)}
    assert [n for n, _ in adapter.named_parameters()] == ['down', 'up']
    assert all(p.requires_grad for p in adapter.parameters())
    assert adapter.rank == 4


def test_rank_defaults_to_the_papers():
    assert SiNGERAdapter(32).rank == 16
    assert SiNGERAdapter(32).gain == 1


@given(st.integers(1, 16), st.data(), st.sampled_from([1., -1., 0.5, 2.]),
       seeds)
def test_as_initialised_the_nullspace_component_is_scaled(
        dim, data, gain, seed):
    rank = data.draw(st.integers(1, dim))
    adapter = initialised(dim, rank, gain, seed)
    patches = randn(2, 5, dim, seed=seed + 1)
    refined = adapter(patches)

    # a reference projector, from numpy-like algebra on W W^T
    W = randn(dim, dim, seed=seed).double()
    _, vectors = torch.linalg.eigh(W @ W.T)  # ascending
    projector = (vectors[:, :rank] @ vectors[:, :rank].T).float()
    expected = patches @ (torch.eye(dim) + gain * projector)
    torch.testing.assert_close(refined, expected, rtol=1e-3, atol=1e-3)
    assert refined.shape == patches.shape


def test_gain_minus_one_removes_the_component():
    adapter = initialised(gain=-1.0)
    basis = nullspace_of(randn(12, 12), 4).basis.float()
    patches = 100 * randn(2, 5, 12, seed=1)
    refined = adapter(patches)
    assert (patches @ basis.T).abs().max() > 10
    assert (refined @ basis.T).abs().max() < 1e-3
    # and nothing else; twice is the same as once
    torch.testing.assert_close(refined, patches - patches @ basis.T @ basis,
                               rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(adapter(refined), refined,
                               rtol=1e-4, atol=1e-3)


def test_gain_one_doubles_the_component():
    adapter = initialised()
    basis = nullspace_of(randn(12, 12), 4).basis.float()
    patches = randn(2, 5, 12, seed=1)
    torch.testing.assert_close(adapter(patches) @ basis.T,
                               2 * patches @ basis.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('gain', [1., -1.])
def test_the_linearised_ffn_hardly_notices_the_refinement(gain):
    """The point of it all: a W with an exact nullspace sees no change."""
    W = randn(12, 8).double() @ randn(8, 12, seed=1).double()
    adapter = SiNGERAdapter(12, 4, gain)
    info = adapter.initialise(left_singular_directions(W))
    assert max(info['singular_values']) < 1e-9
    patches = randn(2, 5, 12, seed=2)
    refined = adapter(patches)
    assert (refined - patches).abs().max() > 0.1
    torch.testing.assert_close(refined.double() @ W, patches.double() @ W,
                               rtol=1e-4, atol=1e-4)


def test_zero_init_is_the_identity_and_can_learn():
    adapter = initialised(init='zero')
    patches = randn(2, 5, 12, seed=1)
    refined = adapter(patches)
    assert torch.equal(refined, patches)
    refined.square().sum().backward()
    assert adapter.up.grad.abs().max() > 0
    assert adapter.down.abs().max() > 0
    # the gradient is that of a linear map
    torch.testing.assert_close(
        adapter.up.grad,
        (patches @ adapter.down).flatten(0, 1).T @ (2 * patches).flatten(0, 1))


def test_before_initialisation_it_is_the_identity():
    adapter = SiNGERAdapter(12, 4)
    patches = randn(2, 5, 12)
    assert torch.equal(adapter(patches), patches)


def test_random_init_is_seeded():
    first, same, other = (initialised(init='random', seed=0),
                          initialised(init='random', seed=0),
                          SiNGERAdapter(12, 4))
    other.initialise(decomposition(12), init='random', seed=1)
    assert torch.equal(first.up, same.up)
    assert not torch.allclose(first.up, other.up)
    torch.testing.assert_close(first.up.norm(dim=1), torch.ones(4))
    assert torch.equal(first.down, first.up.T)


@pytest.mark.parametrize('init', ['nullspace', 'random', 'zero'])
def test_initialisation_depends_on_its_seed_alone(init):
    """The same on every rank, whatever the global generator did before; and
    it leaves the global generator alone."""
    torch.manual_seed(1)
    first = initialised(init=init)
    torch.manual_seed(2)
    second = SiNGERAdapter(12, 4)
    state = torch.get_rng_state()
    second.initialise(decomposition(12), init=init)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.down, second.down)
    assert torch.equal(first.up, second.up)


@pytest.mark.parametrize('init, values, num_random', [
    ('nullspace', 4, 0), ('random', 0, 4), ('zero', 0, 4)])
def test_what_is_logged(init, values, num_random):
    adapter = SiNGERAdapter(12, 4)
    info = adapter.initialise(decomposition(12), init=init)
    assert info['init'] == init and info['rank'] == 4
    assert len(info['singular_values']) == values
    assert info['num_random'] == num_random
    expected = sorted(torch.linalg.svdvals(randn(12, 12).double()))[:values]
    assert info['singular_values'] == pytest.approx(
        [float(v) for v in expected])


def initialised_up(threshold, seed):
    adapter = SiNGERAdapter(12, 4)
    adapter.initialise(decomposition(12), selection='threshold',
                       threshold=float(threshold), seed=seed)
    return adapter.up


def test_threshold_selection_reaches_the_adapter():
    adapter = SiNGERAdapter(12, 4)
    with pytest.warns(UserWarning, match='2 of 4'):
        values = decomposition(12)[1]
        info = adapter.initialise(
            decomposition(12), selection='threshold',
            threshold=float(values[-3]), seed=5)
    assert info['num_random'] == 2
    assert info['singular_values'] == pytest.approx(values[-2:].tolist())
    with pytest.warns(UserWarning):
        ups = [initialised_up(values[-3], seed) for seed in (5, 5, 6)]
    assert torch.equal(ups[0], ups[1]) and torch.equal(ups[0], adapter.up)
    assert not torch.equal(ups[0], ups[2])


def test_energy_of_an_initialised_adapter():
    adapter = initialised(16, 4)
    directions, _ = decomposition(16)
    assert subspace_energy(adapter.up, directions) == \
        pytest.approx((1, 0), abs=1e-6)
    assert subspace_energy(adapter.down.T, directions) == \
        pytest.approx((1, 0), abs=1e-6)


# -- precision ----------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_keeps_float32_weights(dtype):
    adapter = initialised(64, 16)
    patches = randn(2, 9, 64, seed=1).to(dtype).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        refined = adapter(patches)
        loss = refined.float().square().mean()
    loss.backward()
    assert refined.dtype == dtype
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    assert patches.grad.dtype == dtype
    exact = adapter(patches.detach().float())
    torch.testing.assert_close(refined.float(), exact, rtol=2e-2, atol=3e-2)


def test_autocast_still_leaves_the_rest_alone():
    """What is orthogonal to the adapter passes without loss of precision:
    the sum is taken in the tokens' own dtype."""
    adapter = initialised(64, 16, init='zero')
    patches = randn(2, 9, 64, seed=1)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(adapter(patches), patches)


def test_optimiser_step_under_autocast_moves_float32_weights():
    adapter = initialised(64, 16)
    before = adapter.up.detach().clone()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        adapter(randn(2, 9, 64, seed=1)).square().sum().backward()
    optimiser.step()
    change = (adapter.up - before).abs().max()
    assert 0 < change < 1e-3  # lost if the weights were bfloat16


# -- bad input ----------------------------------------------------------------


@pytest.mark.parametrize('rank', [13, 0, -4, True, 4.0, '4'], ids=repr)
def test_bad_rank(rank):
    with pytest.raises(ConfigError) as caught:
        SiNGERAdapter(12, rank)
    message = str(caught.value)
    assert f'adapter.rank={rank!r}' in message
    assert 'between 1 and 12' in message


def test_bad_init():
    with pytest.raises(ConfigError) as caught:
        SiNGERAdapter(12, 4).initialise(decomposition(12), init='nulspace')
    message = str(caught.value)
    assert "adapter.init='nulspace'" in message
    assert "'nullspace', 'random', 'zero'" in message
    assert "Did you mean 'nullspace'?" in message


def test_bad_selection_leaves_the_adapter_untouched():
    adapter = SiNGERAdapter(12, 4)
    with pytest.raises(ConfigError, match='adapter.selection'):
        adapter.initialise(decomposition(12), selection='largest')
    assert not adapter.up.any()


# -- collapse -----------------------------------------------------------------


def variance_ratio_by_hand(original, refined, quantile):
    """Total variance around the mean, over the inliers of all images."""
    import numpy as np
    kept = []
    for image, other in zip(original.double(), refined.double()):
        norms = image.norm(dim=1).numpy()
        limit = np.quantile(norms, quantile)
        kept += [(a, b) for a, b, n in zip(image, other, norms) if n <= limit]
    before = torch.stack([a for a, _ in kept])
    after = torch.stack([b for _, b in kept])
    return float((after - after.mean(0)).square().sum()
                 / (before - before.mean(0)).square().sum())


@given(st.integers(1, 3), st.integers(4, 30), st.sampled_from([0.5, 0.93]),
       seeds)
def test_inlier_variance_ratio_by_hand(batch, count, quantile, seed):
    position = quantile * (count - 1)
    if abs(position - round(position)) < 1e-3:
        quantile += 0.01
    original = randn(batch, count, 6, seed=seed) + 1
    refined = original + 0.5 * randn(batch, count, 6, seed=seed + 1)
    ratio = inlier_variance_ratio(original, refined, quantile)
    assert ratio.item() == pytest.approx(
        variance_ratio_by_hand(original, refined, quantile), rel=1e-4)


def test_inlier_variance_ratio_tells_a_collapse_from_suppression():
    original = randn(2, 100, 8)
    original[:, :3] *= 50  # artifacts
    suppressed = original.clone()
    suppressed[:, :3] = 0
    assert inlier_variance_ratio(original, original, 0.95).item() == \
        pytest.approx(1)
    assert inlier_variance_ratio(original, suppressed, 0.95).item() == \
        pytest.approx(1)
    assert inlier_variance_ratio(original, 0.1 * original, 0.95).item() == \
        pytest.approx(0.01)
    assert inlier_variance_ratio(original, torch.ones_like(original), 0.95
                                 ).item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(
        inlier_variance_ratio(torch.ones(1, 9, 4), torch.ones(1, 9, 4), 0.95))
