"""Null directions of whole blocks, against Jacobians written out."""
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.metrics import (differentiable, gramian_product, random_signs,
                              smallest_directions)
from mmsinger.models.features.anatomy import find_blocks, fixed_input_size
from mmsinger.models.features.taps import BlockTaps
from tiny import build, seg_vit, timm_vit, vit

F64 = torch.float64
BLOCKS = dict(
    mmpretrain=vit(),
    swiglu=vit(layer_scale_init_value=0.1,
               layer_cfgs=dict(ffn_type='swiglu_fused')),
    eva02=vit('ViTEVA02', sub_ln=True),
    beit=vit('BEiTViT', img_size=16, use_rel_pos_bias=False,
             use_shared_rel_pos_bias=True),
    mmseg=seg_vit(),
    mmseg_checkpointing=seg_vit(with_cp=True),
    timm=timm_vit('vit_tiny_patch16_224', img_size=16, reg_tokens=2),
    timm_dinov3=timm_vit('vit_small_patch16_dinov3'),
)


def block_of(cfg, size=16):
    """A block in float64, with its input (1, N, 32) for a 2 x 2 grid."""
    torch.manual_seed(0)
    backbone = build(cfg).double().requires_grad_(False)
    blocks = find_blocks(backbone, 'teacher')
    size = fixed_input_size(backbone) or (size, size)
    with torch.no_grad(), BlockTaps(blocks, [1, 2], stop=True) as taps:
        taps.run(backbone, torch.randn(1, 3, *size, dtype=F64))
    return blocks.modules[2], lambda x: taps.rerun(2, x), taps.tokens(1)


@torch.no_grad()
def jacobian(block, values, num_prefix, size=1e-5):
    """d outputs / d patch inputs, shape (N D, P, D), by differences."""
    _, count, dim = values.shape
    steps = size * torch.eye(count * dim, dtype=F64)[num_prefix * dim:]
    steps = steps.view(-1, count, dim)
    change = block(values + steps) - block(values - steps)
    return (change.flatten(1).T / (2 * size)).unflatten(1, (-1, dim))


def gramian(jacobian):
    """M = mean over patches of J_i^T J_i."""
    return torch.einsum('opd,ope->de', jacobian, jacobian) / \
        jacobian.shape[1]


@pytest.mark.parametrize('name', BLOCKS)
def test_product_for_given_signs(name):
    module, block, tokens = block_of(BLOCKS[name])
    dense = jacobian(block, tokens.values, tokens.num_prefix)
    signs = random_signs(1, tokens.patches.shape[1], seed=3)[0]
    response = torch.einsum('opd,p->od', dense, signs.double())
    expected = response.T @ response / len(signs)
    directions = torch.randn(5, 32, dtype=F64)
    with differentiable(module):
        values = gramian_product(block, tokens.values, signs, directions)
        chunked = gramian_product(block, tokens.values, signs, directions,
                                  chunk=2)
    assert torch.allclose(values, directions @ expected, rtol=1e-5,
                          atol=1e-6 * expected.abs().max())
    assert torch.allclose(chunked, values)


def test_mean_over_signs_is_the_gramian():
    """Over all 16 of 4 patches: mixed terms cancel exactly."""
    module, block, tokens = block_of(BLOCKS['mmpretrain'])
    expected = gramian(jacobian(block, tokens.values, tokens.num_prefix))
    identity = torch.eye(32, dtype=F64)
    with differentiable(module):
        products = [gramian_product(block, tokens.values,
                                    torch.tensor(signs), identity)
                    for signs in itertools.product((-1., 1.), repeat=4)]
    assert torch.allclose(sum(products) / 16, expected, atol=1e-7)
    assert not torch.allclose(products[0], expected, rtol=1e-3)


def test_eigenvalues_are_the_effect_of_small_steps():
    """E(u) from finite differences, one patch at a time."""
    module, block, tokens = block_of(BLOCKS['mmseg'])
    matrix = gramian(jacobian(block, tokens.values, tokens.num_prefix))
    directions, values = smallest_directions(lambda u: u @ matrix, 32, 3)
    with torch.no_grad():
        for u, value in zip(directions, values):
            effects = []
            for i in range(tokens.num_prefix, tokens.values.shape[1]):
                step = torch.zeros_like(tokens.values)
                step[0, i] = 1e-5 * u
                change = block(tokens.values + step) - \
                    block(tokens.values - step)
                effects.append((change / 2e-5).square().sum())
            assert (sum(effects) / 4).item() == pytest.approx(
                value.item(), rel=1e-5)


def test_signs():
    signs = random_signs(50, 40, seed=1)
    assert signs.shape == (50, 40) and set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.mean().item()) < 0.1
    assert torch.equal(signs, random_signs(50, 40, seed=1))
    assert not torch.equal(signs, random_signs(50, 40, seed=2))


def test_differentiable_keeps_values_and_puts_settings_back():
    backbone = build(seg_vit(with_cp=True))
    block = backbone.layers[1]
    values = torch.randn(1, 5, 32, requires_grad=True)
    before = block(values)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyboardInterrupt):
        with differentiable(block):
            assert not block.with_cp
            assert not torch.backends.mha.get_fastpath_enabled()
            assert torch.allclose(block(values), before, atol=1e-5)
            raise KeyboardInterrupt
    assert block.with_cp
    assert torch.backends.mha.get_fastpath_enabled() == fast


# -- smallest eigenvectors ---------------------------------------------------


def random_gramian(seed, dim, rows):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rows, dim, generator=generator, dtype=F64)
    return factor.T @ factor


@given(st.integers(0, 10**6), st.integers(2, 20), st.data())
def test_exact_with_as_many_products_as_channels(seed, dim, data):
    rank = data.draw(st.integers(1, dim))
    matrix = random_gramian(seed, dim, 2 * dim)
    asked = []

    def product(rows):
        asked.append(len(rows))
        return rows @ matrix

    directions, values = smallest_directions(product, dim, rank, seed=seed)
    assert sum(asked) == dim
    expected = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(values, expected[:rank], atol=1e-9 * expected[-1])
    assert torch.allclose(directions @ directions.T,
                          torch.eye(rank, dtype=F64), atol=1e-9)
    residual = directions @ matrix - values[:, None] * directions
    assert residual.abs().max() < 1e-8 * expected[-1]


@pytest.mark.parametrize('matrix', [
    torch.eye(12, dtype=F64), torch.zeros(12, 12, dtype=F64),
    random_gramian(0, 12, 3), torch.diag(torch.tensor(
        [0.] * 6 + [1.] * 6, dtype=F64))],
    ids=['identity', 'zero', 'rank 3', 'projection'])
def test_start_that_products_add_nothing_to(matrix):
    directions, values = smallest_directions(lambda u: u @ matrix, 12, 5)
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix)[:5],
                          atol=1e-9)
    assert torch.allclose(directions @ directions.T,
                          torch.eye(5, dtype=F64), atol=1e-9)
    assert torch.allclose(directions @ matrix, values[:, None] * directions,
                          atol=1e-8)


def test_fewer_products_find_what_stands_apart():
    """Never below the true eigenvalues; close where they are isolated."""
    basis = torch.linalg.qr(random_gramian(0, 60, 60))[0]
    spectrum = torch.cat([torch.full((4, ), 1e-3, dtype=F64),
                          torch.linspace(1, 2, 56, dtype=F64)])
    matrix = basis @ torch.diag(spectrum) @ basis.T
    error = {}
    for products in (4, 12, 40):
        directions, values = smallest_directions(
            lambda u: u @ matrix, 60, 4, products)
        assert (values >= spectrum[:4] - 1e-9).all()
        error[products] = (values - spectrum[:4]).max().item()
    assert error[4] > error[12] > error[40]
    assert error[4] > 0.5 and error[40] < 1e-6
    overlap = (directions @ basis[:, :4]).square().sum(dim=1)
    assert (overlap > 1 - 1e-6).all()


def test_fewer_products_than_directions_are_as_many():
    matrix = random_gramian(0, 10, 20)
    directions, values = smallest_directions(lambda u: u @ matrix, 10, 4, 1)
    assert directions.shape == (4, 10) and values.shape == (4, )
