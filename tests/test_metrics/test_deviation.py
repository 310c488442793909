"""Steps inside a subspace and what they change."""
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.metrics import (linear_cka, output_deviation, perturb_along,
                              relative_l2, token_cosine)
from mmsinger.metrics.subspaces import orthonormal_rows


def test_perturbation_by_hand():
    patches, coefficients = torch.randn(2, 3, 6), torch.randn(2, 3, 2)
    directions = orthonormal_rows(torch.randn(2, 6))
    moved = perturb_along(patches, directions, coefficients, 0.3)
    for image in range(2):
        for i in range(3):
            f, c = patches[image, i], coefficients[image, i]
            step = c[0] * directions[0] + c[1] * directions[1]
            expected = f + 0.3 * f.norm() * step / c.norm()
            assert torch.allclose(moved[image, i], expected, atol=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 2))
def test_steps_are_as_long_in_every_subspace(seed, rank, strength):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 4, 8, generator=generator)
    coefficients = torch.randn(2, 4, rank, generator=generator)
    directions = orthonormal_rows(torch.randn(rank, 8, generator=generator))
    step = perturb_along(patches, directions, coefficients, strength) - patches
    assert torch.allclose(step.norm(dim=-1), strength * patches.norm(dim=-1),
                          rtol=1e-3)
    outside = step - step @ directions.T @ directions
    assert outside.abs().max() < 1e-4


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_orthonormal_rows(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, 8, generator=generator, dtype=torch.float64)
    basis = orthonormal_rows(rows)
    assert torch.allclose(basis @ basis.T,
                          torch.eye(rank, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(rows @ basis.T @ basis, rows, atol=1e-8)


def test_deviation_fields():
    original, changed = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    result = output_deviation(original, changed)
    assert torch.equal(result.relative_l2, relative_l2(original, changed))
    assert torch.equal(result.cosine, token_cosine(original, changed))
    assert torch.equal(result.cka, linear_cka(original, changed))
    same = output_deviation(original, original)
    assert [round(v[0].item(), 5) for v in same] == [0, 1, 1]


def test_a_direction_that_a_linear_map_does_not_see():
    weight = torch.randn(6, 6, dtype=torch.float64)
    weight[0] = 0  # row vectors: f W does not see the first channel
    patches = torch.randn(2, 4, 6, dtype=torch.float64)
    coefficients = torch.ones(2, 4, 1)
    null, seen = torch.eye(6)[:1], torch.eye(6)[1:2]
    results = [output_deviation(patches @ weight, perturb_along(
        patches, rows, coefficients, 0.3) @ weight) for rows in (null, seen)]
    assert results[0].relative_l2.max() < 1e-9
    assert math.isclose(results[0].cosine.min().item(), 1., abs_tol=1e-9)
    assert results[1].relative_l2.min() > 0.01
