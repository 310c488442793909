"""Properties of the method's mathematics, on random input."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn.bricks.transformer import FFN
from torch import nn
from torch.autograd import gradcheck

from mmsinger.metrics import subspace_energy
from mmsinger.models import (ClipNorms, FeatureCosineLoss, FeatureMSELoss,
                             FeatureSmoothL1Loss, GramInformationLoss,
                             LogitKLLoss, MaskTokens, OutlierSuppressionLoss)
from mmsinger.models.adapters import (SiNGERAdapter, left_nullspace,
                                      left_singular_directions, linearised_ffn)
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.refine import NormThreshold, Refine

F64 = torch.float64
DIM, GRID, PREFIX = 8, (3, 4), 2
PATCHES = GRID[0] * GRID[1]
seeds = st.integers(0, 2**31 - 1)

FEATURE_LOSSES = {
    'mse': FeatureMSELoss(), 'smooth-l1': FeatureSmoothL1Loss(0.5),
    'cosine': FeatureCosineLoss()}
REFINEMENTS = {'paper': {}, 'gate': dict(gate=dict(mad=1.)),
               'cap': dict(gate=dict(mad=1.), cap=True)}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator(
        ).manual_seed(seed)).to(dtype)


def artifacts(seed=0, dtype=torch.float32, batch=2):
    """Patch tokens (B, P, D) of which two an image are five times as long."""
    patches = randn(batch, PATCHES, DIM, seed=seed, dtype=dtype)
    patches[:, [1, 6]] *= 5
    return patches


def weights(seed=0, batch=2):
    """Of patches: 0, 1 and what is between them."""
    return (1.5 * torch.rand(batch, PATCHES, generator=torch.Generator(
        ).manual_seed(seed)) - 0.25).clamp(0, 1)


def block(dim=DIM, hidden=3 * DIM, seed=0, **kwargs):
    """A module with an FFN as mmpretrain's blocks have it, in float64."""
    torch.manual_seed(seed)
    module = nn.Module()
    module.ffn = FFN(dim, hidden, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return module.double().eval()


def adapter(seed=0, rank=3, gain=-0.7):
    result = SiNGERAdapter(DIM, rank, gain)
    result.initialise(left_singular_directions(linearised_ffn(block(seed=seed))
                                               ))
    return result


def refinement(seed=0, **kwargs):
    """A Refine step whose layer 0 has an adapter, made without a teacher."""
    step = Refine(adapter=dict(rank=3), loss_outlier=dict(
        type='mmsinger.OutlierSuppressionLoss', quantile=0.7), **kwargs)
    step.adapters = nn.ModuleDict({'0': adapter(seed)})
    if step.gate:
        step.gates = nn.ModuleDict({'0': NormThreshold()})
        step.calibrate({0: artifacts(seed)})
    return step


# -- the nullspace -----------------------------------------------------------


@given(st.integers(2, 24), st.sampled_from([1, 2]), seeds, st.data())
def test_basis_is_orthonormal(dim, terms, seed, data):
    """Of any matrix, repeated and zero singular values too."""
    matrix = randn(dim, terms * dim, seed=seed, dtype=F64)
    kept = data.draw(st.integers(0, dim))
    matrix = matrix[:, :kept] @ matrix[:, :kept].T @ matrix if kept else \
        torch.eye(dim, terms * dim, dtype=F64)
    rank = data.draw(st.integers(1, dim))
    rows = left_nullspace(left_singular_directions(matrix), rank).basis
    identity = torch.eye(rank, dtype=F64)
    assert (rows @ rows.T - identity).abs().max() < 1e-12
    directions, _ = left_singular_directions(matrix)
    assert (directions.T @ directions - torch.eye(dim, dtype=F64)
            ).abs().max() < 1e-12


@given(st.integers(2, 24), seeds)
def test_what_gets_through_grows_with_the_rank(dim, seed):
    """The energy that W lets through of the basis, and its rows: a larger
    basis holds the smaller ones."""
    matrix = randn(dim, dim, seed=seed, dtype=F64)
    before, passed = None, 0.
    for rank in range(1, dim + 1):
        null = left_nullspace(left_singular_directions(matrix), rank)
        energy = (null.basis @ matrix).square().sum().item()
        assert energy >= passed
        torch.testing.assert_close(energy, null.singular_values.square(
            ).sum().item())
        if before is not None:
            assert torch.equal(null.basis[:-1], before)
        before, passed = null.basis, energy
    torch.testing.assert_close(passed, matrix.square().sum().item())


@given(st.integers(8, 24), seeds)
def test_energy_among_the_safe_directions_falls_with_the_rank(dim, seed):
    """E_safe is 1 as long as the rank is below the safe share, then falls;
    E_prob rises."""
    singular = left_singular_directions(
        randn(dim, dim, seed=seed, dtype=F64))
    shares = [subspace_energy(left_nullspace(singular, rank).basis,
                              singular.directions)
              for rank in range(1, dim + 1)]
    safe, problem = zip(*shares)
    assert all(a >= b - 1e-12 for a, b in zip(safe, safe[1:]))
    assert all(a <= b + 1e-12 for a, b in zip(problem, problem[1:]))
    assert safe[0] == pytest.approx(1) and problem[0] == pytest.approx(0)


@given(st.integers(2, 10), st.integers(1, 8), st.floats(0.1, 1e3), seeds)
def test_linear_ffn_is_invariant(narrow, rank, length, seed):
    """The left-nullspace of a linear FFN with ``narrow`` hidden channels has
    D - narrow dimensions; along it, nothing changes, however far."""
    dim = narrow + rank
    module = block(dim, narrow, seed, act_cfg=dict(
        type='LeakyReLU', negative_slope=1.0))
    null = left_nullspace(left_singular_directions(
        linearised_ffn(module)), rank).basis
    tokens = randn(2, 5, dim, seed=seed, dtype=F64)
    step = length * randn(2, 5, rank, seed=seed + 1, dtype=F64) @ null
    nothing = torch.zeros_like(tokens)
    difference = module.ffn(tokens + step, identity=nothing) - \
        module.ffn(tokens, identity=nothing)
    assert difference.abs().max() < 1e-10 * (1 + length)


# -- permutations of patches ----------------------------------------------


@given(seeds, st.booleans())
def test_losses_do_not_know_the_order_of_patches(seed, weighted):
    tokens, target = artifacts(seed), artifacts(seed + 1)
    weight = weights(seed) if weighted else None
    order = torch.randperm(
        PATCHES, generator=torch.Generator().manual_seed(seed))

    def permuted(value):
        return None if value is None else value[:, order]

    for loss in FEATURE_LOSSES.values():
        torch.testing.assert_close(
            loss(permuted(tokens), permuted(target), permuted(weight)),
            loss(tokens, target, weight))
    loss = OutlierSuppressionLoss(0.7)
    torch.testing.assert_close(loss(permuted(tokens), permuted(weight)),
                               loss(tokens, weight))
    loss = GramInformationLoss()
    torch.testing.assert_close(
        loss(permuted(tokens), permuted(target), weight=permuted(weight)),
        loss(tokens, target, weight=weight))


def as_tokens(patches, weight=None, seed=0):
    """With CLS and a register in front, which nothing below touches."""
    tokens = Tokens(torch.cat(
        [randn(len(patches), PREFIX, DIM, seed=seed), patches], dim=1), GRID)
    return tokens if weight is None else tokens.weighed(weight)


@pytest.mark.parametrize('kind', ['adapter', 'clip', 'clip-mad', 'mask',
                                  *REFINEMENTS])
@given(seed=seeds, weighted=st.booleans())
def test_targets_follow_the_order_of_patches(kind, seed, weighted):
    order = torch.randperm(
        PATCHES, generator=torch.Generator().manual_seed(seed))
    patches = artifacts(seed)
    weight = weights(seed) if weighted else None
    if kind in REFINEMENTS:
        refine = refinement(seed, **REFINEMENTS[kind])

        def step(tokens):
            found = refine.refine(0, tokens)
            return found.target, found.loss_outlier
    else:
        make = {'clip': lambda: ClipNorms(quantile=0.8).filter,
                'clip-mad': lambda: ClipNorms(mad=1.).filter,
                'mask': lambda: MaskTokens(mad=1.).filter,
                'adapter': lambda: None}[kind]()

        def step(tokens):
            if kind == 'adapter':
                return tokens.with_patches(adapter(seed)(tokens.patches)), None
            return make(tokens), None

    ours, loss = step(as_tokens(patches, weight))
    theirs, permuted_loss = step(as_tokens(
        patches[:, order], None if weight is None else weight[:, order]))
    torch.testing.assert_close(theirs.patches, ours.patches[:, order])
    assert torch.equal(theirs.prefix, ours.prefix)
    if ours.weight is not None:
        assert torch.equal(theirs.patch_weight, ours.patch_weight[:, order])
    if loss is not None:
        torch.testing.assert_close(permuted_loss, loss)


# -- scale, precision -------------------------------------------------------


@given(seeds, st.floats(1e-3, 1e3), st.booleans())
def test_outlier_loss_grows_with_the_square_of_the_scale(
        seed, scale, weighted):
    """(norm - q)^2, and the quantile scales with the norms; its gradient
    grows with the scale."""
    weight = weights(seed) if weighted else None
    loss = OutlierSuppressionLoss(0.7, loss_weight=1.)
    results = []
    for factor in (1., scale):
        tokens = (factor * artifacts(seed)).requires_grad_()
        value = loss(tokens, weight)
        value.backward()
        results.append((value.item(), tokens.grad))
    (value, gradient), (scaled, scaled_gradient) = results
    assert value > 0
    assert scaled == pytest.approx(scale**2 * value, rel=1e-3)
    torch.testing.assert_close(
        scaled_gradient, scale * gradient, rtol=1e-3,
        atol=1e-3 * scale * gradient.abs().max().item())


# Relative errors of bfloat16 tokens, whose rounding is 2^-9 each, against
# float64: of what is a mean of squares, up to a few of them; of differences
# of long tokens, more.
BF16_ERROR = 0.02


@pytest.mark.parametrize('kind', [*FEATURE_LOSSES, 'outlier', 'info'])
@given(seed=seeds)
def test_losses_of_bfloat16_tokens(kind, seed):
    """Computed in float32, they are off by what rounding the tokens costs."""
    a, b = artifacts(seed, F64, 4), artifacts(seed + 1, F64, 4)
    if kind in FEATURE_LOSSES:
        loss = FEATURE_LOSSES[kind]
    elif kind == 'info':
        loss = GramInformationLoss()
    else:
        def loss(tokens, _):
            return OutlierSuppressionLoss(0.7)(tokens)
    exact = loss(a, b)
    rounded = loss(a.bfloat16(), b.bfloat16())
    assert rounded.dtype == torch.float32
    assert abs(rounded / exact - 1) < BF16_ERROR


@given(seeds)
def test_adapter_in_bfloat16(seed):
    """Under autocast, against float64; relative to the longest token."""
    module = adapter(seed)
    patches = artifacts(seed, F64)
    exact = patches + module.gain * (
        patches @ module.down.double() @ module.up.double())
    with torch.autocast('cpu', torch.bfloat16):
        found = module(patches.float())
    assert (found - exact).abs().max() < BF16_ERROR * exact.norm(
        dim=-1).max()


# -- gradients ---------------------------------------------------------------


@pytest.fixture
def float64(monkeypatch):
    """Losses compute in float32, too coarse for finite differences; the same
    formulas in float64."""
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)


def check_gradient(function, *tensors):
    assert gradcheck(function, [
        tensor.detach().double().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('seed', range(2))
class TestGradients:

    def test_adapter(self, float64, seed, weighted):
        module = adapter(seed)

        def forward(patches, down, up):
            return torch.func.functional_call(
                module, dict(down=down, up=up), (patches, ))

        check_gradient(forward, artifacts(seed), module.down, module.up)

    @pytest.mark.parametrize('name', FEATURE_LOSSES)
    def test_feature_losses(self, float64, seed, weighted, name):
        weight = weights(seed) if weighted else None
        check_gradient(
            lambda a, b: FEATURE_LOSSES[name](a, b, weight=weight),
            artifacts(seed), artifacts(seed + 1))

    def test_information_loss(self, float64, seed, weighted):
        weight = weights(seed, 1) if weighted else None
        for options in (dict(), dict(is_last=False)):
            for intermediate in ('gram', 'mse'):
                check_gradient(
                    lambda a, b: GramInformationLoss(intermediate)(
                        a, b, num_prefix=1, weight=weight, **options),
                    artifacts(seed, batch=1), artifacts(seed + 1, batch=1))

    @pytest.mark.parametrize('name', ['gate', 'cap'])
    def test_gate(self, float64, seed, weighted, name):
        """Of an adapter's weights, through L_outlier and the target."""
        step = refinement(seed, **REFINEMENTS[name])
        tokens = as_tokens(artifacts(seed),
                           weights(seed) if weighted else None)
        tokens = tokens._replace(values=tokens.values.double())

        def forward(down, up):
            class Given(nn.Module):
                def forward(self, patches):
                    return patches - patches @ down @ up
            step.adapters['0'] = Given()
            found = step.refine(0, tokens)
            return found.loss_outlier, found.target.values

        module = adapter(seed)
        check_gradient(forward, module.down, module.up)

    def test_outlier_loss(self, float64, seed, weighted, monkeypatch):
        """Above a constant threshold, as the paper has it."""
        patches = artifacts(seed, F64)
        weight = weights(seed) if weighted else None
        from mmsinger.models.losses import outlier_loss
        threshold = 1e-3 + outlier_loss.outlier_threshold(
            patches.norm(dim=-1), 0.7, weight)  # on no token's norm
        monkeypatch.setattr(outlier_loss, 'outlier_threshold',
                            lambda *_: threshold)
        check_gradient(lambda p: OutlierSuppressionLoss(0.7)(p, weight),
                       patches)

    def test_logit_loss(self, float64, seed, weighted):
        check_gradient(LogitKLLoss(temperature=2.),
                       randn(3, 5, seed=seed), randn(3, 5, seed=seed + 1))


# -- padding ------------------------------------------------------------------


@pytest.mark.parametrize('name', REFINEMENTS)
@given(seed=seeds)
def test_padding_changes_nothing(name, seed):
    """What tokens of weight 0 hold reaches no loss, no other token and no
    gradient of the adapter."""
    keep = torch.ones(2, PATCHES)
    keep[:, 8:] = 0
    outcomes = []
    for noise in (0., 1e4):
        patches = artifacts(seed)
        patches[:, 8:] += noise * randn(2, PATCHES - 8, DIM, seed=seed)
        step = refinement(seed, **REFINEMENTS[name])
        found = step.refine(0, as_tokens(patches, keep))
        student = as_tokens(artifacts(seed + 1)).values
        loss = found.loss_outlier + FeatureMSELoss()(
            student, found.target.values, found.target.weight) + \
            GramInformationLoss()(found.tokens.patches, student[:, PREFIX:],
                                  weight=keep)
        loss.backward()
        outcomes.append((loss, found.target.patches[:, :8], *(
            p.grad for p in step.adapters.parameters())))
    for ours, theirs in zip(*outcomes):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)
