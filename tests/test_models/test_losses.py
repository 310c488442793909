"""The three losses (sections 3.1 and 3.3), each on its own."""
import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
from step_cost import AllocatedMemory
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmsinger.engine.diagnostics import inlier_variance_ratio
from mmsinger.errors import ConfigError
from mmsinger.metrics import cosine_gram, outlier_threshold
from mmsinger.models.adapters import SiNGERAdapter
from mmsinger.models.losses import (FeatureCosineLoss, FeatureMSELoss,
                                    FeatureSmoothL1Loss, GramInformationLoss,
                                    OutlierSuppressionLoss, gram_difference,
                                    loss_behind_block)
from tiny import randn

seeds = st.integers(0, 2**31 - 1)
batches = st.integers(1, 3)
dims = st.integers(1, 8)


def rotation(dim, seed=0):
    return torch.linalg.qr(randn(dim, dim, seed=seed).double())[0].float()


def gradient(function, tokens):
    tokens = tokens.detach().clone().requires_grad_()
    value = function(tokens)
    value.backward()
    return value.detach(), tokens.grad


def between_tokens(quantile, count):
    """Whether the quantile lies clearly between two order statistics: on one
    of them, rounding decides whether that token counts as above it."""
    position = quantile * (count - 1)
    return abs(position - round(position)) > 1e-3


# -- L_outlier ----------------------------------------------------------------


def outlier_by_hand(patches, quantile):
    """Token by token, in the dtype of the patches."""
    terms = []
    for image in patches:
        norms = [token.norm() for token in image]
        ordered = sorted(float(n) for n in norms)
        position = quantile * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        q = ordered[low] + (position - low) * (ordered[high] - ordered[low])
        terms += [(norm - q)**2 for norm in norms if float(norm) > q]
    if not terms:
        return 0 * patches.sum()
    return sum(terms) / len(terms)


@given(batches, st.integers(2, 25), dims, st.floats(0.02, 0.98), seeds,
       st.sampled_from([1e-2, 1., 1e3]))
def test_outlier_loss_by_hand(batch, count, dim, quantile, seed, scale):
    assume(between_tokens(quantile, count))
    patches = scale * randn(batch, count, dim, seed=seed)
    loss = OutlierSuppressionLoss(quantile, loss_weight=1.0)
    value, grad = gradient(loss, patches)
    expected, expected_grad = gradient(
        lambda p: outlier_by_hand(p, quantile), patches.double())
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-3,
                                         abs=1e-9 * scale**2)
    torch.testing.assert_close(
        grad.double() / scale, expected_grad / scale, rtol=1e-3, atol=1e-5)


def test_a_token_on_the_quantile_is_not_above_it():
    """Of norms 1 to 21 the quantile is the 20th: one token exceeds it."""
    norms = torch.arange(1., 22.).view(1, 21, 1)
    assert OutlierSuppressionLoss(0.95, loss_weight=1.)(norms) == 1


@given(batches, st.integers(1, 40), st.floats(0.01, 0.99), seeds)
def test_outlier_threshold_is_the_quantile(batch, count, quantile, seed):
    norms = randn(batch, count, seed=seed).abs().requires_grad_()
    threshold = outlier_threshold(norms, quantile)
    assert threshold.shape == (batch, 1) and not threshold.requires_grad
    np.testing.assert_allclose(
        threshold[:, 0].numpy(),
        np.quantile(norms.detach().double().numpy(), quantile, axis=1),
        rtol=1e-4, atol=1e-6)


def test_outlier_gradient_pulls_outliers_only_along_themselves():
    """2 (norm - q) / count, in the token's own direction; the quantile is a
    constant, so that inliers feel nothing."""
    patches = randn(2, 30, 6)
    patches[0, 4] *= 20
    patches[1, 7] *= 30
    _, grad = gradient(OutlierSuppressionLoss(0.97, 1.0), patches)
    norms = patches.norm(dim=-1)
    q = np.quantile(norms.numpy(), 0.97, axis=1, keepdims=True)
    above = norms > torch.tensor(q)
    assert above.nonzero().tolist() == [[0, 4], [1, 7]]
    expected = torch.zeros_like(patches)
    for b, p in ((0, 4), (1, 7)):
        expected[b, p] = 2 * (norms[b, p] - q[b, 0]) / 2 \
            * patches[b, p] / norms[b, p]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert not grad[~above].any()


def test_outlier_quantiles_are_per_image():
    """An image of large tokens does not hide the outlier of another."""
    quiet, loud = randn(1, 30, 6), 100 * randn(1, 30, 6, seed=1)
    quiet[0, 3] *= 20
    _, grad = gradient(OutlierSuppressionLoss(0.97, 1.0),
                       torch.cat([quiet, loud]))
    assert grad[0, 3].abs().max() > 0


def test_outlier_loss_is_a_mean_over_the_patches_above():
    """Not over all patches, nor a mean of the images' means: twice the same
    image costs the same."""
    loss = OutlierSuppressionLoss(0.93, 1.0)
    patches = randn(1, 30, 6)
    assert loss(patches.repeat(2, 1, 1)).item() == \
        pytest.approx(loss(patches).item())
    assert loss(3 * patches).item() == \
        pytest.approx(9 * loss(patches).item(), rel=1e-4)


def test_outlier_loss_falls_with_its_outlier():
    patches = randn(1, 40, 6)
    values = []
    for factor in (50, 20, 5):
        patches[0, 3] = factor
        values.append(OutlierSuppressionLoss(0.95)(patches).item())
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize('patches', [
    torch.ones(2, 9, 4), torch.zeros(2, 9, 4), torch.ones(2, 1, 4),
    -3 * torch.eye(4)[None]
], ids=['equal', 'zero', 'single', 'equal-norms'])
def test_outlier_loss_of_equal_norms_is_zero(patches):
    value, grad = gradient(OutlierSuppressionLoss(0.95), patches)
    assert value.item() == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 1e-5


def test_outlier_loss_does_not_hide_a_nan():
    patches = randn(2, 9, 4)
    patches[0, 3, 1] = math.nan
    assert torch.isnan(OutlierSuppressionLoss()(patches))


@pytest.mark.parametrize('quantile', [
    0, 1, 0.0, 1.0, -0.1, 1.5, 95, math.nan, '0.95', None, True
], ids=repr)
def test_bad_quantile(quantile):
    with pytest.raises(ConfigError) as caught:
        OutlierSuppressionLoss(quantile=quantile)
    message = str(caught.value)
    assert f'OutlierSuppressionLoss.quantile={quantile!r}' in message
    assert 'between 0 and 1' in message


# -- L_info -------------------------------------------------------------------


def gram_by_hand(tokens):
    count = tokens.shape[1]
    return torch.stack([torch.stack([torch.stack([
        image[i] @ image[j] / (image[i].norm() * image[j].norm())
        for j in range(count)]) for i in range(count)]) for image in tokens])


def gram_loss_by_hand(pred, target):
    difference = gram_by_hand(pred) - gram_by_hand(target)
    return sum(d**2 for d in difference.flatten()) / difference.numel()


@given(batches, st.integers(1, 5), st.integers(2, 6), st.integers(0, 3),
       seeds)
def test_gram_loss_by_hand(batch, count, dim, prefix, seed):
    pred = randn(batch, prefix + count, dim, seed=seed)
    target = randn(batch, prefix + count, dim, seed=seed + 1)
    loss = GramInformationLoss()
    value, grad = gradient(
        lambda p: loss(p, target, num_prefix=prefix), pred)
    expected, expected_grad = gradient(
        lambda p: gram_loss_by_hand(p[:, prefix:],
                                    target.double()[:, prefix:]),
        pred.double())
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3,
                               atol=1e-5 * max(1, grad.abs().max().item()))
    assert not grad[:, :prefix].any()  # prefix tokens do not take part


@given(batches, st.integers(1, 9), dims, seeds)
def test_gram_matrix_holds_cosines(batch, count, dim, seed):
    gram = cosine_gram(randn(batch, count, dim, seed=seed))
    assert gram.shape == (batch, count, count)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, gram.transpose(1, 2))
    torch.testing.assert_close(gram.diagonal(dim1=1, dim2=2),
                               torch.ones(batch, count))
    assert gram.abs().max() <= 1 + 1e-5


@given(batches, st.integers(1, 200), dims, dims, seeds)
def test_gram_difference_in_parts_is_that_of_whole_matrices(
        batch, count, dim, other_dim, seed):
    # Of one length, so that gradients are: short tokens have large ones
    pred, target = (torch.nn.functional.normalize(t, dim=-1).requires_grad_()
                    for t in (randn(batch, count, dim, seed=seed),
                              randn(batch, count, other_dim, seed=seed + 1)))
    whole = torch.nn.functional.mse_loss(cosine_gram(pred),
                                         cosine_gram(target))
    parts = gram_difference(pred, target)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-10)
    for ours, expected in zip(torch.autograd.grad(3 * parts, (pred, target)),
                              torch.autograd.grad(3 * whole, (pred, target))):
        torch.testing.assert_close(ours, expected, rtol=1e-4,
                                   atol=1e-5 / (batch * count))


def test_gram_difference_grows_with_the_tokens_not_their_square():
    def peak(count):
        pred = randn(1, count, 32).requires_grad_()
        target = randn(1, count, 32, seed=1)
        with AllocatedMemory() as memory:
            gram_difference(pred, target).backward()
        return memory.peak

    assert peak(2048) < 4.5 * peak(512)


def test_gram_difference_computes_no_gradient_that_is_not_needed():
    pred, target = randn(1, 100, 32), randn(1, 100, 32, seed=1)
    product = 2 * 100 * 100 * 32

    def products(pred_needs, target_needs, context=contextlib.nullcontext):
        inputs = (pred.clone().requires_grad_(pred_needs),
                  target.clone().requires_grad_(target_needs))
        with context(), FlopCounterMode(display=False) as counter:
            gram_difference(*inputs)
        return counter.get_total_flops() / product

    assert products(False, False) == 2
    assert products(True, False) == products(False, True) == 3
    assert products(True, True) == 4
    assert products(True, True, torch.no_grad) == 2


@given(batches, st.integers(1, 9), dims, seeds)
def test_gram_loss_ignores_lengths_and_rotations(batch, count, dim, seed):
    pred = randn(batch, count, dim, seed=seed)
    target = randn(batch, count, dim, seed=seed + 1)
    loss = GramInformationLoss()
    reference = loss(pred, target).item()
    lengths = 10 * torch.rand(
        batch, count, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    turn = rotation(dim, seed)
    for other in (loss(pred * lengths, target), loss(pred, target * lengths),
                  loss(pred @ turn, target @ turn), loss(pred @ turn, target),
                  loss(target, pred)):
        assert other.item() == pytest.approx(reference, rel=1e-4, abs=1e-7)
    # but not directions
    if dim > 1 and count > 1:
        changed = pred.clone()
        changed[:, 0] *= -1
        assert loss(changed, pred).item() > 1e-6


@pytest.mark.parametrize('kwargs', [
    dict(), dict(is_last=False), dict(num_prefix=2)], ids=str)
@pytest.mark.parametrize('intermediate', ['gram', 'mse'])
def test_info_loss_of_agreeing_tokens_is_zero(intermediate, kwargs):
    tokens = randn(2, 9, 4)
    value, grad = gradient(
        lambda t: GramInformationLoss(intermediate)(t, tokens, **kwargs),
        tokens)
    assert value.item() == 0
    assert not grad.any()


def test_official_intermediate_loss_is_an_mse_of_all_tokens():
    pred, target = randn(2, 9, 4), randn(2, 9, 4, seed=1)
    official = GramInformationLoss(intermediate='mse')
    mse = sum((a - b)**2 for a, b in zip(
        pred.flatten().tolist(), target.flatten().tolist())) / pred.numel()
    # prefix tokens included
    for num_prefix in (0, 3):
        assert official(pred, target, num_prefix=num_prefix, is_last=False
                        ).item() == pytest.approx(mse, rel=1e-5)
    # the last layer stays a Gram loss
    assert official(pred, target, num_prefix=1).item() == pytest.approx(
        GramInformationLoss()(pred, target, num_prefix=1).item())
    # and the paper's intermediate loss is one too
    assert GramInformationLoss()(pred, target, is_last=False).item() == \
        pytest.approx(GramInformationLoss()(pred, target).item())


# -- a loss behind a frozen block ---------------------------------------------


def frozen_block(dim=8):
    block = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim))
    return block.requires_grad_(False)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16],
                         ids=str)
@pytest.mark.parametrize('size', [1., 1e-9, 1e4])
def test_known_gradient_is_that_of_autograd(size, dtype):
    """Bit by bit in float32; in half precision of any size, where autograd
    without a loss scale has zeros or infinities."""
    torch.manual_seed(0)
    block, tokens = frozen_block(), torch.randn(2, 5, 8, requires_grad=True)

    def loss(output):
        return size * output.float().square().mean()

    exact, = torch.autograd.grad(loss(block(tokens)), tokens)
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        value = loss_behind_block(block, loss, tokens)
    assert value.item() == pytest.approx(
        loss(block(tokens)).item(), rel=1e-6 if dtype is None else 0.02)
    found, = torch.autograd.grad(3 * value, tokens)
    if dtype is None:
        assert torch.equal(found, 3 * exact)
    else:
        torch.testing.assert_close(
            found / (3 * size), exact / size, rtol=0.05,
            atol=0.02 * (exact / size).abs().max().item())


def test_known_gradient_of_half_precision_tokens():
    """Under the loss scale that mmengine starts with."""
    torch.manual_seed(0)
    block = frozen_block().half()
    tokens = torch.randn(2, 5, 8).half().requires_grad_()
    value = loss_behind_block(
        block, lambda output: 1e-7 * output.square().mean(), tokens)
    (2**16 * value).backward()
    assert torch.isfinite(tokens.grad).all() and tokens.grad.any()


def test_known_gradient_is_not_computed_for_nothing():
    block, tokens = frozen_block(), torch.randn(2, 5, 8)
    assert not loss_behind_block(block, torch.sum, tokens).requires_grad
    tokens.requires_grad_()
    with torch.no_grad():
        assert not loss_behind_block(block, torch.sum, tokens).requires_grad


def test_known_gradient_hides_no_nan_and_knows_zero():
    block, tokens = frozen_block(), torch.randn(2, 5, 8, requires_grad=True)
    for factor, check in ((float('nan'), torch.isnan),
                          (0., lambda g: g == 0)):
        value = loss_behind_block(block, lambda out: factor * out.sum(), tokens)
        found, = torch.autograd.grad(value, tokens)
        assert check(found).all()


def test_last_is_kept_for_the_distiller():
    assert GramInformationLoss().last == 'self'
    assert GramInformationLoss(last='previous').last == 'previous'


@pytest.mark.parametrize('key, value, choices', [
    ('intermediate', 'gramm', "'gram', 'mse'"),
    ('last', 'sefl', "'self', 'previous'")])
def test_bad_info_options(key, value, choices):
    with pytest.raises(ConfigError) as caught:
        GramInformationLoss(**{key: value})
    message = str(caught.value)
    assert f'GramInformationLoss.{key}={value!r}' in message
    assert choices in message and 'Did you mean' in message


# -- L_KD ---------------------------------------------------------------------


@given(batches, st.integers(1, 9), dims, seeds)
def test_feature_loss_by_hand(batch, count, dim, seed):
    pred = randn(batch, count, dim, seed=seed)
    target = randn(batch, count, dim, seed=seed + 1)
    value, grad = gradient(lambda p: FeatureMSELoss()(p, target), pred)
    expected = sum((a - b)**2 for a, b in zip(
        pred.flatten().tolist(), target.flatten().tolist())) / pred.numel()
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(grad, 2 * (pred - target) / pred.numel())


@given(batches, st.integers(1, 9), dims, st.sampled_from([0.1, 1., 3.]),
       seeds)
def test_smooth_l1_loss_by_hand(batch, count, dim, beta, seed):
    pred = randn(batch, count, dim, seed=seed)
    target = 3 * randn(batch, count, dim, seed=seed + 1)
    value, grad = gradient(lambda p: FeatureSmoothL1Loss(beta)(p, target),
                           pred)
    gaps = [abs(a - b) for a, b in zip(
        pred.flatten().tolist(), target.flatten().tolist())]
    expected = sum(gap**2 / (2 * beta) if gap < beta else gap - beta / 2
                   for gap in gaps) / len(gaps)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    # however far a target is, it pulls no harder than beta away
    assert grad.abs().max() <= (1 + 1e-5) / pred.numel()


@given(batches, st.integers(1, 9), st.integers(2, 8), seeds)
def test_cosine_loss_by_hand(batch, count, dim, seed):
    pred = randn(batch, count, dim, seed=seed)
    target = randn(batch, count, dim, seed=seed + 1)
    loss = FeatureCosineLoss()
    value, _ = gradient(lambda p: loss(p, target), pred)
    terms = [1 - (a @ b / a.norm() / b.norm()).item() for a, b in zip(
        pred.double().flatten(0, 1), target.double().flatten(0, 1))]
    assert value.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    lengths = 10 * torch.rand(
        batch, count, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    for other in (loss(pred, lengths * target), loss(lengths * pred, target)):
        assert other.item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)


def test_feature_loss_reaches_both_sides():
    """In SiNGER the target depends on the adapter."""
    pred, target = randn(2, 9, 4).requires_grad_(), \
        randn(2, 9, 4, seed=1).requires_grad_()
    FeatureMSELoss()(pred, target).backward()
    torch.testing.assert_close(pred.grad, -target.grad)
    assert pred.grad.abs().max() > 0


# -- what all share -----------------------------------------------------------

LOSSES = {
    'kd': (FeatureMSELoss, 2),
    'kd-smooth-l1': (FeatureSmoothL1Loss, 2),
    'kd-cosine': (FeatureCosineLoss, 2),
    'outlier': (OutlierSuppressionLoss, 1),
    'info': (GramInformationLoss, 2),
    'info-official': (lambda **kw: GramInformationLoss('mse', **kw), 2),
}


def evaluate(name, *tokens, **kwargs):
    make, arity = LOSSES[name]
    loss = make(**kwargs)
    if name == 'info-official':
        return loss(*tokens[:arity], is_last=False)
    return loss(*tokens[:arity])


@pytest.mark.parametrize('name', LOSSES)
def test_loss_weight(name):
    tokens = randn(2, 30, 6), randn(2, 30, 6, seed=1)
    single = evaluate(name, *tokens, loss_weight=1.0)
    assert single.item() > 0
    assert evaluate(name, *tokens, loss_weight=0.3).item() == \
        pytest.approx(0.3 * single.item())
    assert evaluate(name, *tokens, loss_weight=0).item() == 0


def test_default_weights():
    assert OutlierSuppressionLoss().loss_weight == 0.01
    assert OutlierSuppressionLoss().quantile == 0.95
    assert FeatureMSELoss().loss_weight == 1
    assert GramInformationLoss().loss_weight == 1


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('dtype', [
    torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', LOSSES)
def test_losses_are_computed_in_float32(name, dtype, autocast):
    """Nothing but the rounding of the inputs themselves is lost."""
    exact = 10 * randn(2, 40, 16), 10 * randn(2, 40, 16, seed=1)
    rounded = [t.to(dtype).requires_grad_() for t in exact]
    context = torch.autocast('cpu', torch.bfloat16) if autocast \
        else contextlib.nullcontext()
    with context:
        value = evaluate(name, *rounded)
    assert value.dtype == torch.float32
    value.backward()
    assert rounded[0].grad.dtype == dtype
    assert torch.isfinite(rounded[0].grad).all()

    same = [t.detach().float().requires_grad_() for t in rounded]
    reference = evaluate(name, *same)
    reference.backward()
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(rounded[0].grad, same[0].grad.to(dtype))
    # and the rounding costs no more than bfloat16 has
    assert value.item() == pytest.approx(
        evaluate(name, *exact).item(), rel=3e-2)


@pytest.mark.parametrize('name', LOSSES)
def test_norms_beyond_the_range_of_float16(name):
    """Artifact tokens reach norms whose squares overflow float16."""
    tokens = [randn(1, 30, 64, seed=s).half() for s in (0, 1)]
    for t in tokens:
        t[0, 5] = 2e4
    assert torch.isfinite(evaluate(name, *tokens))
    assert evaluate(name, *tokens).dtype == torch.float32


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('case', ['zero-token', 'all-zero', 'single'])
def test_degenerate_tokens_have_finite_gradients(name, case):
    pred, target = randn(2, 9, 4), randn(2, 9, 4, seed=1)
    if case == 'zero-token':
        pred[0, 2] = 0
    elif case == 'all-zero':
        pred.zero_()
    else:
        pred, target = pred[:, :1], target[:, :1]
    value, grad = gradient(lambda p: evaluate(name, p, target), pred)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


def fake_run(function, *shapes):
    """Run on tensors without data: whatever needs a value (``.item()``,
    ``if``, boolean indexing) raises."""
    with FakeTensorMode():
        tokens = [torch.empty(shape, requires_grad=True) for shape in shapes]
        result = function(*tokens)
        if result.requires_grad:
            result.backward()
            assert tokens[0].grad.shape == tokens[0].shape
    return result


@pytest.mark.parametrize('name', LOSSES)
def test_nothing_depends_on_data(name):
    result = fake_run(lambda a, b: evaluate(name, a, b),
                      (2, 30, 6), (2, 30, 6))
    assert result.shape == ()


def test_neither_do_adapter_and_collapse_measure():
    adapter = SiNGERAdapter(6, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.empty(2, 30, 6)
        refined = adapter(tokens)
        assert refined.shape == tokens.shape
        assert inlier_variance_ratio(tokens, refined, 0.95).shape == ()


@pytest.mark.parametrize('function', [
    lambda t, _: t[t.norm(dim=-1) > 1].sum(),
    lambda t, _: t.sum() * t.sum().item(),
    lambda t, _: t.sum() if (t > 0).any() else t.mean(),
], ids=['boolean-index', 'item', 'if'])
def test_the_check_itself_finds_data_dependence(function):
    with pytest.raises(Exception, match='nonzero|_local_scalar_dense'):
        fake_run(function, (2, 30, 6), (2, 30, 6))


@pytest.mark.parametrize('name', LOSSES)
def test_losses_compile_to_one_graph(name):
    tokens = randn(2, 30, 6), randn(2, 30, 6, seed=1)
    make, arity = LOSSES[name]
    loss = make()
    options = dict(is_last=False) if name == 'info-official' else {}
    compiled = torch.compile(loss, fullgraph=True, backend='eager')
    assert compiled(*tokens[:arity], **options).item() == \
        pytest.approx(evaluate(name, *tokens).item())


@pytest.mark.parametrize('scope', ['mmseg', 'mmpretrain', 'mmengine'])
@pytest.mark.parametrize('name, cfg', [
    ('kd', dict(type='mmsinger.FeatureMSELoss', loss_weight=2.0)),
    ('outlier', dict(type='mmsinger.OutlierSuppressionLoss', quantile=0.9,
                     loss_weight=2.0)),
    ('info', dict(type='mmsinger.GramInformationLoss', last='previous',
                  loss_weight=2.0)),
])
def test_built_from_any_config(scope, name, cfg):
    """As another package's model would: from its registry, in its scope."""
    if scope == 'mmseg':
        from mmseg.registry import MODELS
    elif scope == 'mmpretrain':
        from mmpretrain.registry import MODELS
    else:
        MODELS = MMENGINE_MODELS
    with DefaultScope.overwrite_default_scope(scope):
        loss = MODELS.build(cfg)
    assert type(loss).__name__ == cfg['type'].split('.')[1]
    assert loss.loss_weight == 2
    tokens = randn(2, 30, 6), randn(2, 30, 6, seed=1)
    assert loss(*tokens[:LOSSES[name][1]]).item() > 0
