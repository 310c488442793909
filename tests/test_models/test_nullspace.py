"""The linearised FFN and its left-nullspace (section 3.2)."""
import functools
import math
import warnings

import mmpretrain.models  # noqa: F401
import mmseg.models  # noqa: F401
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.metrics import subspace_energy
from mmsinger.models.adapters import left_singular_directions, linearised_ffn
from tiny import nullspace_of

D, H, HEADS = 12, 24, 2
F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed),
                       dtype=F64)


def orthogonal(dim, seed=0):
    return torch.linalg.qr(randn(dim, dim, seed=seed))[0]


def matrix_with(values, columns=None, seed=0):
    """A matrix (D, M) with these singular values, in any order."""
    values = torch.as_tensor(values, dtype=F64)
    dim, columns = len(values), columns or len(values)
    right = orthogonal(columns, seed + 1)[:dim]
    return orthogonal(dim, seed) * values @ right


def randomise(module, seed=0):
    """Non-trivial values for every parameter, norms and LayerScale too."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return module.double().eval()


# -- blocks, and where each keeps its weights ---------------------------------


def mmpretrain_block(**kwargs):
    from mmpretrain.models.backbones.vision_transformer import \
        TransformerEncoderLayer
    return TransformerEncoderLayer(D, HEADS, H, **kwargs)


def mmseg_block(**kwargs):
    from mmseg.models.backbones.vit import TransformerEncoderLayer
    return TransformerEncoderLayer(
        D, HEADS, H, attn_cfg={}, ffn_cfg={}, **kwargs)


def deit3_block():
    from mmpretrain.models.backbones.deit3 import DeiT3TransformerEncoderLayer
    return DeiT3TransformerEncoderLayer(D, HEADS, H)


def beit_block(layer_scale=0.1):
    from mmpretrain.models.backbones.beit import BEiTTransformerEncoderLayer
    return BEiTTransformerEncoderLayer(
        D, HEADS, H, layer_scale, window_size=(2, 2), use_rel_pos_bias=True)


def mmseg_beit_block():
    from mmseg.models.backbones.beit import BEiTTransformerEncoderLayer
    return BEiTTransformerEncoderLayer(
        D, HEADS, H, window_size=(2, 2), init_values=0.1, attn_cfg={},
        ffn_cfg=dict(add_identity=False))


def eva02_block(**kwargs):
    from mmpretrain.models.backbones.vit_eva02 import EVA02EndcoderLayer
    return EVA02EndcoderLayer(D, HEADS, H, **kwargs)


def timm_block(**kwargs):
    timm = pytest.importorskip('timm.models.vision_transformer')
    return timm.Block(D, HEADS, mlp_ratio=H / D, **kwargs)


def timm_glu_block(name):
    layers = pytest.importorskip('timm.layers')
    return timm_block(mlp_layer=getattr(layers, name), init_values=0.1)


def timm_eva_block(**kwargs):
    eva = pytest.importorskip('timm.models.eva')
    return eva.EvaBlock(D, HEADS, mlp_ratio=H / D, **kwargs)


class DINOv2Block(nn.Module):
    """As DINOv2's own repository names things."""

    class FFN(nn.Module):

        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Linear(D, H), nn.Linear(D, H)
            self.w3 = nn.Linear(H, D)

        def forward(self, x):
            return self.w3(nn.functional.silu(self.w1(x)) * self.w2(x))

    class Scale(nn.Module):

        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(D))

    def __init__(self):
        super().__init__()
        self.norm2 = nn.LayerNorm(D)
        self.mlp = self.FFN()
        self.ls2 = self.Scale()


def mmcv_mlp(block):
    return [block.ffn.layers[0][0].weight], block.ffn.layers[1].weight


def timm_mlp(block):
    return [block.mlp.fc1.weight], block.mlp.fc2.weight


def packed(ffn):
    half = ffn.w12.weight.shape[0] // 2
    return [ffn.w12.weight[:half], ffn.w12.weight[half:]], ffn.w3.weight


def packed_timm(block):
    fc1 = block.mlp.fc1.weight
    half = fc1.shape[0] // 2
    return [fc1[:half], fc1[half:]], block.mlp.fc2.weight


def gamma_of_beit(block):
    return block.gamma_2


def gamma_of_ffn(block):
    return block.ffn.gamma2.weight


def gamma_of_timm(block):
    return block.ls2.gamma


# name: (block, weights, LayerScale or None, norm)
BLOCKS = {
    'mmpretrain': (mmpretrain_block, mmcv_mlp, None, 'ln2'),
    'mmpretrain-layerscale': (
        functools.partial(mmpretrain_block, layer_scale_init_value=0.1),
        mmcv_mlp, gamma_of_ffn, 'ln2'),
    'deit3': (deit3_block, mmcv_mlp, gamma_of_ffn, 'ln2'),
    'mmseg': (mmseg_block, mmcv_mlp, None, 'norm2'),
    'mmseg-beit': (mmseg_beit_block, mmcv_mlp, gamma_of_beit, 'norm2'),
    'beit': (beit_block, mmcv_mlp, gamma_of_beit, 'ln2'),
    'beit-without-layerscale': (
        functools.partial(beit_block, 0.), mmcv_mlp, None, 'ln2'),
    'timm': (timm_block, timm_mlp, None, 'norm2'),
    'timm-layerscale': (
        functools.partial(timm_block, init_values=0.1), timm_mlp,
        gamma_of_timm, 'norm2'),
    'timm-eva': (
        functools.partial(timm_eva_block, init_values=0.1), timm_mlp,
        gamma_of_beit, 'norm2'),
    'swiglu-fused': (
        functools.partial(mmpretrain_block, ffn_type='swiglu_fused',
                          layer_scale_init_value=0.1),
        lambda b: packed(b.ffn), gamma_of_ffn, 'ln2'),
    'eva02': (eva02_block, lambda b: packed(b.mlp), None, 'norm2'),
    'eva02-sub-ln': (
        functools.partial(eva02_block, sub_ln=True),
        lambda b: packed(b.mlp), None, 'norm2'),
    'timm-swiglu': (
        functools.partial(timm_glu_block, 'SwiGLU'),
        lambda b: ([b.mlp.fc1_g.weight, b.mlp.fc1_x.weight],
                   b.mlp.fc2.weight), gamma_of_timm, 'norm2'),
    'timm-swiglu-packed': (
        functools.partial(timm_glu_block, 'SwiGLUPacked'), packed_timm,
        gamma_of_timm, 'norm2'),
    'timm-glu': (
        functools.partial(timm_glu_block, 'GluMlp'), packed_timm,
        gamma_of_timm, 'norm2'),
    'timm-eva-swiglu': (
        functools.partial(timm_eva_block, init_values=0.1, swiglu_mlp=True),
        packed_timm, gamma_of_beit, 'norm2'),
    'dinov2': (
        DINOv2Block,
        lambda b: ([b.mlp.w1.weight, b.mlp.w2.weight], b.mlp.w3.weight),
        gamma_of_timm, 'norm2'),
}
GATED = [name for name in BLOCKS if 'glu' in name or name in (
    'eva02', 'eva02-sub-ln', 'dinov2')]


@pytest.mark.parametrize('fold_norm', [False, True])
@pytest.mark.parametrize('fold_scale', [False, True])
@pytest.mark.parametrize('name', BLOCKS)
def test_linearised_ffn_is_the_product_of_its_weights(
        name, fold_scale, fold_norm):
    make, weights, gamma, norm = BLOCKS[name]
    block = randomise(make())
    branches, out = weights(block)
    channels = torch.ones(D, dtype=F64)
    gain = gamma(block) if gamma and fold_scale else channels
    norm = getattr(block, norm).weight if fold_norm else channels

    W = linearised_ffn(block, fold_layer_scale=fold_scale,
                       fold_norm=fold_norm)

    assert W.shape == (D, len(branches) * D) and W.dtype == F64
    assert not W.requires_grad
    # token by token, as the block does it: f -> gain * (out (in (norm f)))
    for token in randn(3, D):
        expected = torch.cat(
            [gain * (out @ (branch @ (norm * token))) for branch in branches])
        torch.testing.assert_close(token @ W, expected, rtol=1e-10,
                                   atol=1e-12)
    if name in GATED:
        assert len(branches) == 2


@pytest.mark.parametrize('name', [n for n, b in BLOCKS.items() if b[2]])
def test_layer_scale_is_folded_only_on_request(name):
    block = randomise(BLOCKS[name][0]())
    assert not torch.allclose(linearised_ffn(block),
                              linearised_ffn(block, fold_layer_scale=True))


@pytest.mark.parametrize('name', ['mmpretrain', 'swiglu-fused'])
def test_a_single_layer_scale_factor_for_all_channels(name):
    block = randomise(BLOCKS[name][0]())
    from mmcv.cnn.bricks.scale import Scale
    block.ffn.gamma2 = Scale(0.25).double()
    torch.testing.assert_close(linearised_ffn(block, fold_layer_scale=True),
                               0.25 * linearised_ffn(block))


def test_linearised_ffn_of_a_deeper_mlp():
    block = randomise(mmpretrain_block(num_fcs=3))
    first, second = (block.ffn.layers[i][0].weight for i in (0, 1))
    torch.testing.assert_close(
        linearised_ffn(block), (block.ffn.layers[2].weight @ second @ first).T)


@pytest.mark.parametrize('name', ['mmpretrain', 'timm', 'eva02'])
def test_linearised_ffn_is_computed_in_float64(name):
    """Float32 products would blur singular values of about 1e-9."""
    make, weights, _, _ = BLOCKS[name]
    block = make()
    branches, out = weights(block)
    expected = torch.cat([(out.double() @ branch.double()).T
                          for branch in branches], dim=1)
    torch.testing.assert_close(linearised_ffn(block), expected,
                               rtol=1e-13, atol=1e-15)
    assert linearised_ffn(block.half()).dtype == F64


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('name', ['mmpretrain', 'timm', 'eva02'])
def test_non_finite_weights_are_refused(name, value):
    block = randomise(BLOCKS[name][0]())
    with torch.no_grad():
        BLOCKS[name][1](block)[1][3, 5] = value
    with pytest.raises(ConfigError, match=f'(?s){type(block).__name__}.*'
                       'not finite.*NaN.*checkpoint'):
        linearised_ffn(block)


def test_blocks_without_an_ffn_are_refused():
    block = nn.Sequential()
    block.add_module('attention', nn.Identity())
    with pytest.raises(ConfigError, match='ffn or mlp.*attention'):
        linearised_ffn(block)


@pytest.mark.parametrize('ffn', [
    nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D + 1)),
    nn.Sequential(nn.Linear(D, H), nn.Linear(H + 1, D)),
    nn.Sequential(nn.Linear(D, D)),
    nn.Sequential(nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)),
], ids=['not-square', 'unchained', 'one-layer', 'convolutions'])
def test_unknown_ffns_are_refused(ffn):
    block = nn.Module()
    block.mlp = ffn
    with pytest.raises(ConfigError, match='unknown kind.*shapes.*SwiGLU'):
        linearised_ffn(block)


# -- what the directions mean -------------------------------------------------


def ffn_output(block, tokens):
    """The FFN alone, without the shortcut."""
    if hasattr(block, 'mlp'):
        return block.mlp(tokens)
    return block.ffn(tokens, identity=torch.zeros_like(tokens))


@pytest.mark.parametrize('num_fcs', [2, 3])
def test_a_linear_ffn_does_not_see_its_nullspace(num_fcs):
    """No activation, hidden layers narrower than D: exactly D - 8 null
    directions, whatever the tokens are and however far they are moved."""
    from mmcv.cnn.bricks.transformer import FFN
    block = randomise(mmpretrain_block())
    identity = dict(type='LeakyReLU', negative_slope=1.0)
    block.ffn = randomise(FFN(D, 8, num_fcs, act_cfg=identity))
    W = linearised_ffn(block)
    null = nullspace_of(W, D - 8)
    assert null.singular_values.max() < 1e-12

    tokens = randn(2, 7, D)
    moved = tokens + 10 * randn(2, 7, D - 8, seed=1) @ null.basis
    torch.testing.assert_close(ffn_output(block, moved),
                               ffn_output(block, tokens),
                               rtol=1e-10, atol=1e-10)
    # one direction more than the nullspace has is seen
    seen = nullspace_of(W, D - 7)
    assert seen.singular_values.max() > 1e-3
    moved = tokens + 10 * seen.basis[-1]
    assert (ffn_output(block, moved) - ffn_output(block, tokens)).abs().max() \
        > 1e-3


def make_blind(branches, hidden_from):
    """Make each branch blind to the span of the rows ``hidden_from``."""
    project = torch.eye(D, dtype=F64) - hidden_from.T @ hidden_from
    with torch.no_grad():
        for branch in branches:
            branch.copy_(branch @ project)


@pytest.mark.parametrize('name', GATED)
def test_swiglu_does_not_see_a_common_nullspace(name):
    """Gate and value are blind to four common directions, and each alone to
    two more: only the common ones are safe, and only they are found."""
    block = randomise(BLOCKS[name][0]())
    (gate, value), _ = BLOCKS[name][1](block)
    directions = orthogonal(D)
    common, gate_only, value_only = directions[:4], directions[4:6], \
        directions[6:8]
    make_blind([gate, value], common)
    make_blind([gate], gate_only)
    make_blind([value], value_only)

    W = linearised_ffn(block)
    null = nullspace_of(W, 4)
    assert null.singular_values.max() < 1e-12
    torch.testing.assert_close(null.basis.T @ null.basis, common.T @ common)
    assert nullspace_of(W, 5).singular_values.max() > 1e-3

    tokens = randn(2, 7, D)
    moved = tokens + 10 * randn(2, 7, 4, seed=1) @ null.basis
    before = ffn_output(block, tokens)
    torch.testing.assert_close(ffn_output(block, moved), before,
                               rtol=1e-10, atol=1e-10)
    for direction in (gate_only[0], value_only[0]):
        moved = tokens + 10 * direction
        assert (ffn_output(block, moved) - before).abs().max() > 1e-3


@pytest.mark.parametrize('name', ['mmpretrain', 'timm', 'beit', 'mmseg'])
def test_an_mlp_with_activation_does_not_see_what_fc1_does_not_see(name):
    block = randomise(BLOCKS[name][0]())
    blind = orthogonal(D)[:3]
    make_blind(BLOCKS[name][1](block)[0], blind)
    null = nullspace_of(linearised_ffn(block), 3)
    tokens = randn(2, 7, D)
    torch.testing.assert_close(
        ffn_output(block, tokens + 10 * null.basis.sum(0)),
        ffn_output(block, tokens), rtol=1e-10, atol=1e-10)


# -- selection ----------------------------------------------------------------


@st.composite
def matrices(draw):
    dim = draw(st.integers(1, 12))
    columns = draw(st.sampled_from([dim, dim + 1, 2 * dim]))
    W = randn(dim, columns, seed=draw(seeds))
    return W * 10.0**draw(st.integers(-4, 4))


@given(matrices(), st.data())
def test_basis_against_a_reference_decomposition(W, data):
    dim = len(W)
    rank = data.draw(st.integers(1, dim))
    null = nullspace_of(W, rank)
    left, values, _ = torch.linalg.svd(W)
    scale = values[0]

    assert null.basis.shape == (rank, dim) and null.basis.dtype == F64
    assert null.num_random == 0
    torch.testing.assert_close(null.basis @ null.basis.T,
                               torch.eye(rank, dtype=F64))
    # smallest first
    torch.testing.assert_close(null.singular_values,
                               values.flip(0)[:rank])
    # |u^T W| is the singular value
    torch.testing.assert_close((null.basis @ W).norm(dim=1) / scale,
                               null.singular_values / scale)
    reference = left[:, dim - rank:]
    torch.testing.assert_close(null.basis.T @ null.basis,
                               reference @ reference.T, atol=1e-6, rtol=0)


@given(matrices())
def test_directions_decompose_the_matrix(W):
    directions, values = left_singular_directions(W)
    assert (values[:-1] >= values[1:]).all()
    torch.testing.assert_close(directions @ directions.T,
                               torch.eye(len(W), dtype=F64))
    torch.testing.assert_close(
        directions * values.square() @ directions.T / values[0]**2,
        W @ W.T / values[0]**2)
    largest = directions.abs().argmax(dim=0, keepdim=True)
    assert (directions.gather(0, largest) > 0).all()


@given(seeds)
def test_no_direction_is_more_invisible_than_the_first(seed):
    W = randn(8, 8, seed=seed)
    first = nullspace_of(W, 1).basis[0]
    others = nn.functional.normalize(randn(64, 8, seed=seed + 1), dim=1)
    assert (first @ W).norm() <= (others @ W).norm(dim=1).min() + 1e-12


@pytest.mark.parametrize('columns', [8, 9, 16])
def test_exact_nullspace_is_found(columns):
    W = matrix_with([3, 0, 2, 0, 1e-3, 5, 0, 1], columns)
    null = nullspace_of(W, 4)
    torch.testing.assert_close(
        null.singular_values, torch.tensor([0, 0, 0, 1e-3], dtype=F64),
        atol=1e-12, rtol=0)
    assert (null.basis[:3] @ W).abs().max() < 1e-12


def test_sign_is_fixed():
    W = randn(8, 8)
    flip = torch.diag(torch.tensor([1., -1] * 4, dtype=F64))
    # another right factor, the same left singular directions
    torch.testing.assert_close(nullspace_of(W, 5).basis,
                               nullspace_of(W @ flip, 5).basis)
    torch.testing.assert_close(nullspace_of(W, 5).basis,
                               nullspace_of(-W, 5).basis)


VALUES = [9., 5., 1., 0.2, 0.04, 0.03, 0.02, 0.01]


def test_threshold_takes_the_nearest_below_it_first():
    W = matrix_with(VALUES)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        null = nullspace_of(W, 2, selection='threshold', threshold=0.05)
    assert null.num_random == 0
    torch.testing.assert_close(
        null.singular_values, torch.tensor([0.04, 0.03], dtype=F64))
    torch.testing.assert_close((null.basis @ W).norm(dim=1),
                               null.singular_values)


@pytest.mark.parametrize('threshold, found', [(0.05, 4), (0.015, 1), (0., 0)])
def test_threshold_pads_with_random_unit_rows(threshold, found):
    W = matrix_with(VALUES)
    rank = 6
    arguments = dict(rank=rank, selection='threshold', threshold=threshold)
    with pytest.warns(UserWarning) as caught:
        null = nullspace_of(W, seed=3, **arguments)
    message = str(caught[0].message)
    for part in (f'{found} of {rank}', f'threshold={threshold}',
                 f'{rank - found} random', 'adapter.threshold'):
        assert part in message
    assert null.num_random == rank - found
    assert null.basis.shape == (rank, 8)
    assert len(null.singular_values) == found
    torch.testing.assert_close(null.basis.norm(dim=1),
                               torch.ones(rank, dtype=F64))
    torch.testing.assert_close((null.basis[:found] @ W).norm(dim=1),
                               null.singular_values)
    with pytest.warns(UserWarning):
        again = nullspace_of(W, seed=3, **arguments)
        other = nullspace_of(W, seed=4, **arguments)
    assert torch.equal(again.basis, null.basis)
    assert torch.equal(other.basis[:found], null.basis[:found])
    assert not torch.allclose(other.basis[found:], null.basis[found:])


@given(seeds, st.integers(1, 8), st.floats(0.05, 10))
def test_threshold_rows_are_all_under_it(seed, rank, threshold):
    W = randn(8, 8, seed=seed)
    values = torch.linalg.svdvals(W)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        null = nullspace_of(W, rank, 'threshold', threshold)
    below = values[values < threshold]  # descending
    assert len(null.singular_values) == min(rank, len(below))
    torch.testing.assert_close(null.singular_values, below[:rank])


# -- bad input ----------------------------------------------------------------


@pytest.mark.parametrize('rank', [
    7, 100, 0, -1, True, 2.0, '4', None,
], ids=repr)
def test_bad_rank(rank):
    with pytest.raises(ConfigError) as caught:
        nullspace_of(randn(6, 6), rank)
    message = str(caught.value)
    assert f'adapter.rank={rank!r}' in message
    assert 'between 1 and 6' in message


@pytest.mark.parametrize('rank', [1, 6])
def test_extreme_ranks_are_fine(rank):
    assert nullspace_of(randn(6, 6), rank).basis.shape == (rank, 6)


def test_bad_selection():
    with pytest.raises(ConfigError) as caught:
        nullspace_of(randn(6, 6), 2, selection='smalest')
    message = str(caught.value)
    assert "adapter.selection='smalest'" in message
    assert "'smallest', 'threshold'" in message
    assert "Did you mean 'smallest'?" in message


@pytest.mark.parametrize('shape', [(6, ), (6, 5), (2, 6, 6)])
def test_no_matrix(shape):
    with pytest.raises(ConfigError, match='M >= D') as caught:
        left_singular_directions(randn(*shape))
    assert str(tuple(shape)) in str(caught.value)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_matrix_that_is_not_finite(value):
    W = randn(6, 6)
    W[2, 3] = value
    with pytest.raises(ConfigError, match='NaN or infinite'):
        nullspace_of(W, 2)


# -- where the energy lies ----------------------------------------------------


@pytest.mark.parametrize('share', [0.1, 0.25, 0.5])
def test_random_rows_score_the_share(share):
    directions, _ = left_singular_directions(randn(40, 40))
    safe, prob = subspace_energy(randn(20000, 40, seed=1), directions, share)
    assert safe == pytest.approx(share, rel=0.05)
    assert prob == pytest.approx(share, rel=0.05)


def test_energy_of_the_basis_itself():
    W = randn(16, 16)
    directions, _ = left_singular_directions(W)
    null = nullspace_of(W, 4).basis
    assert subspace_energy(null, directions) == pytest.approx((1, 0))
    assert subspace_energy(directions[:, :4].T, directions) == \
        pytest.approx((0, 1))
    # directions in between are neither
    assert subspace_energy(directions[:, 4:12].T, directions) == \
        pytest.approx((0, 0))
    # twice as many as count as safe
    assert subspace_energy(nullspace_of(W, 8).basis, directions)[0] == \
        pytest.approx(0.5)


@given(st.integers(2, 20), st.integers(1, 20), st.floats(0.01, 0.5), seeds)
def test_energies_are_shares(dim, rank, share, seed):
    directions, _ = left_singular_directions(randn(dim, dim, seed=seed))
    rows = randn(rank, dim, seed=seed + 1)
    safe, prob = subspace_energy(rows, directions, share)
    assert 0 <= safe <= 1 and 0 <= prob <= 1
    assert safe + prob <= 1 + 1e-12
    # neither scale nor dtype nor gradient matter
    scaled = (5 * rows).float().requires_grad_()
    assert subspace_energy(scaled, directions, share) == \
        pytest.approx((safe, prob), abs=1e-5)
    # brute force
    count = max(1, round(share * dim))
    total = sum(float(r @ r) for r in rows)
    expected = sum(float(r @ directions[:, dim - 1 - i])**2
                   for r in rows for i in range(count)) / total
    assert safe == pytest.approx(expected)


def test_halves_sum_to_all():
    directions, _ = left_singular_directions(randn(10, 10))
    assert sum(subspace_energy(randn(3, 10, seed=1), directions, 0.5)) == \
        pytest.approx(1)


def test_energy_of_nothing_is_undefined():
    directions, _ = left_singular_directions(randn(8, 8))
    assert all(math.isnan(e)
               for e in subspace_energy(torch.zeros(2, 8), directions))
