"""Norm statistics and norm growth inside blocks."""
import functools
import statistics

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.analysis.block_norms import BlockNorms
from mmsinger.metrics import (norm_statistics, quantile_outliers,
                              robust_outliers, token_norms)
from mmsinger.models.features.anatomy import find_blocks, fixed_input_size
from mmsinger.models.features.taps import BlockTaps
from tiny import build, seg_vit, timm_vit, vit


def some_norms(seed=0, images=3, patches=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, patches, generator=generator) * 5 + 1


def test_token_norms_by_hand():
    tokens = torch.randn(2, 3, 4)
    values = token_norms(tokens.half())
    assert values.dtype == torch.float32
    for image in range(2):
        for patch in range(3):
            assert values[image, patch].item() == pytest.approx(
                sum(x**2 for x in tokens[image, patch].tolist())**0.5,
                rel=1e-2)


def test_statistics_against_scipy():
    norms = some_norms() ** 3
    result = norm_statistics(norms)
    for image, row in enumerate(norms.double().numpy()):
        expected = dict(
            median=statistics.median(row), p95=np.quantile(row, 0.95),
            p99=np.quantile(row, 0.99),
            max_over_median=row.max() / statistics.median(row),
            kurtosis=scipy.stats.kurtosis(row, fisher=False))
        for name, value in expected.items():
            assert getattr(result, name)[image].item() == pytest.approx(
                value, rel=1e-4), name


@given(st.integers(0, 10**6), st.floats(0.1, 100))
def test_statistics_of_scaled_norms(seed, scale):
    norms = some_norms(seed)
    plain, scaled = norm_statistics(norms), norm_statistics(scale * norms)
    for name in ('median', 'p95', 'p99'):
        assert torch.allclose(getattr(scaled, name),
                              scale * getattr(plain, name), rtol=1e-4)
    for name in ('max_over_median', 'kurtosis'):
        assert torch.allclose(getattr(scaled, name), getattr(plain, name),
                              rtol=1e-3)


def test_kurtosis_of_equal_norms_is_undefined():
    assert norm_statistics(torch.ones(1, 4)).kurtosis.isnan().all()


def test_quantile_outliers_by_hand():
    norms = some_norms()
    outliers = quantile_outliers(norms, 0.9)
    for row, found in zip(norms.numpy(), outliers.numpy()):
        assert (found == (row > np.quantile(row, 0.9))).all()
    assert (outliers.sum(1) == 4).all()  # 10 % of 40


def test_robust_outliers_by_hand():
    norms = some_norms()
    norms[1, 7] = 40.
    for row, found in zip(norms.numpy(), robust_outliers(norms, 3.)):
        median = np.median(row)
        mad = np.median(np.abs(row - median))
        expected = row > median + 3 * 1.4826 * mad
        assert (found.numpy() == expected).all()


@given(st.integers(0, 10**6), st.integers(0, 15))
def test_robust_outliers_are_those_planted(seed, planted):
    """Up to nearly half of the tokens; a quantile finds always as many."""
    norms = some_norms(seed, images=1)
    norms[0, :planted] = 1000.
    expected = torch.arange(40)[None] < planted
    assert torch.equal(robust_outliers(norms, 6.), expected)
    assert quantile_outliers(norms, 0.95).sum() <= 2


# -- inside blocks -----------------------------------------------------------

FAMILIES = dict(
    mmpretrain=vit(),
    layer_scale=vit(layer_scale_init_value=0.1),
    swiglu=vit(layer_scale_init_value=0.1,
               layer_cfgs=dict(ffn_type='swiglu_fused')),
    eva02=vit('ViTEVA02', sub_ln=True),
    beit=vit('BEiTViT'),
    mmseg=seg_vit(),
    timm=timm_vit('vit_tiny_patch16_224', reg_tokens=2, init_values=0.1),
    timm_eva02=timm_vit('eva02_tiny_patch14_224'),
    timm_post_norm=timm_vit('vit_relpos_base_patch16_rpn_224'),
)
LAYER = 2


@functools.lru_cache(None)
def recorded(name):
    """A backbone, its input and output of one block, and the block's
    inflation."""
    torch.manual_seed(0)
    backbone = build(FAMILIES[name])
    blocks = find_blocks(backbone, 'teacher')
    size = fixed_input_size(backbone) or (32, 48)
    with torch.no_grad(), BlockNorms(blocks, [LAYER]) as norms, \
            BlockTaps(blocks, [LAYER - 1, LAYER]) as taps:
        taps.run(backbone, torch.randn(2, 3, *size))
    return blocks, taps, norms.inflation(LAYER)


def ffn_of(block):
    return getattr(block, 'ffn', None) or block.mlp


def linears(block):
    return [m for m in ffn_of(block).modules()
            if isinstance(m, torch.nn.Linear)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return recorded(request.param)


@torch.no_grad()
def test_growth_is_what_attention_and_ffn_add(family):
    """With an FFN that adds nothing the block is its attention half (a norm
    after the FFN still adds its bias)."""
    blocks, taps, inflation = family
    before, after = (taps.tokens(i).values for i in (LAYER - 1, LAYER))
    handle = linears(blocks.modules[LAYER])[-1].register_forward_hook(
        lambda module, args, output: torch.zeros_like(output))
    middle = taps.rerun(LAYER, before)
    if blocks is recorded('timm_post_norm')[0]:
        middle = middle - blocks.modules[LAYER].norm2.bias
    handle.remove()
    norms = [tokens.norm(dim=-1) for tokens in (before, middle, after)]
    assert torch.allclose(inflation.delta_sa, norms[1] / norms[0] - 1,
                          atol=1e-4)
    assert torch.allclose(inflation.delta_ffn, norms[2] / norms[1] - 1,
                          atol=1e-4)
    assert inflation.delta_sa.abs().min() > 1e-6


@torch.no_grad()
def test_gains_of_the_ffn(family):
    """From what passes through it, kept by wrapping its modules."""
    blocks, taps, inflation = family
    block = blocks.modules[LAYER]
    seen = {}
    keep = [
        ffn_of(block).register_forward_pre_hook(
            lambda module, args: seen.update(x=args[0])),
        linears(block)[-1].register_forward_hook(
            lambda module, args, output: seen.update(h=args[0], y=output)),
    ]
    taps.rerun(LAYER, taps.tokens(LAYER - 1).values)
    for handle in keep:
        handle.remove()
    x, h, y = (seen[key].norm(dim=-1) for key in 'xhy')
    assert torch.allclose(inflation.g_ffn1, h / x, rtol=1e-4)
    assert torch.allclose(inflation.g_ffn2, y / h, rtol=1e-4)
    assert torch.allclose(inflation.g_ffn1 * inflation.g_ffn2, y / x,
                          rtol=1e-4)


@torch.no_grad()
def test_gains_of_a_plain_mlp_by_its_formula():
    blocks, taps, inflation = recorded('mmpretrain')
    block = blocks.modules[LAYER]
    before = taps.tokens(LAYER - 1).values
    x = block.ln2(before + block.attn(block.ln1(before)))
    first, last = linears(block)
    h = torch.nn.functional.gelu(x @ first.weight.T + first.bias)
    y = h @ last.weight.T + last.bias
    x, h, y = (values.norm(dim=-1) for values in (x, h, y))
    assert torch.allclose(inflation.g_ffn1, h / x, rtol=1e-4)
    assert torch.allclose(inflation.g_ffn2, y / h, rtol=1e-4)


def test_hooks_are_removed_and_a_second_pass_replaces_the_first():
    torch.manual_seed(0)
    backbone = build(vit())
    blocks = find_blocks(backbone, 'teacher')
    images = torch.randn(2, 1, 3, 32, 32)
    norms = BlockNorms(blocks, range(4))
    results = []
    for batch in (images[0], images[1], images[0]):
        with torch.no_grad(), norms:
            backbone(batch)
        results.append(norms.inflation(0))
    assert not torch.equal(results[0].delta_sa, results[1].delta_sa)
    for first, third in zip(results[0], results[2]):
        assert torch.equal(first, third)
    assert not any(m._forward_hooks or m._forward_pre_hooks
                   for m in backbone.modules())
