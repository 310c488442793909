"""Token layout and resampling between grids."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.models.distillers.feature import evenly_spaced
from mmsinger.models.features.tokens import (Padding, Tokens, align_tokens,
                                             resample_patches)
from tiny import randn

sizes = st.integers(1, 9)
grids = st.tuples(sizes, sizes)


def tokens(num_prefix, grid, channels=5, seed=0):
    return Tokens(
        randn(2, num_prefix + grid[0] * grid[1], channels, seed=seed), grid)


def ramp(grid):
    """Tokens whose two channels are the patch centre's y and x in [0, 1]."""
    rows = (torch.arange(grid[0]) + 0.5) / grid[0]
    columns = (torch.arange(grid[1]) + 0.5) / grid[1]
    return torch.stack(torch.meshgrid(rows, columns, indexing='ij'),
                       dim=-1).flatten(0, 1)[None]


# -- layout -------------------------------------------------------------------


@given(st.integers(0, 5), grids)
def test_prefix_and_patches(num_prefix, grid):
    t = tokens(num_prefix, grid)
    assert t.num_prefix == num_prefix
    assert t.prefix.shape == (2, num_prefix, 5)
    assert t.patches.shape == (2, grid[0] * grid[1], 5)
    assert torch.equal(torch.cat([t.prefix, t.patches], dim=1), t.values)


@given(st.integers(0, 5), grids)
def test_with_patches_changes_the_patches_alone(num_prefix, grid):
    t = tokens(num_prefix, grid)
    before = t.values.clone()
    changed = t.with_patches(t.patches + 1)
    assert torch.equal(changed.prefix, t.prefix)
    assert torch.equal(changed.patches, t.patches + 1)
    assert changed.grid == grid and changed.num_prefix == num_prefix
    assert torch.equal(t.values, before)


# -- resampling ---------------------------------------------------------------


@given(grids)
def test_same_grid_is_the_identity(grid):
    patches = randn(2, grid[0] * grid[1], 5)
    assert resample_patches(patches, grid, grid) is patches
    assert resample_patches(patches, list(grid), grid) is patches


@given(grids, grids)
def test_constants_are_kept(grid, target):
    value = randn(2, 1, 5)
    patches = value.expand(2, grid[0] * grid[1], 5)
    resampled = resample_patches(patches, grid, target)
    assert resampled.shape == (2, target[0] * target[1], 5)
    torch.testing.assert_close(resampled, value.expand_as(resampled))


@given(grids, grids)
def test_values_stay_in_range(grid, target):
    patches = randn(2, grid[0] * grid[1], 5)
    resampled = resample_patches(patches, grid, target)
    assert resampled.max() <= patches.max() + 1e-5
    assert resampled.min() >= patches.min() - 1e-5


@given(grids, grids)
def test_resampling_is_linear(grid, target):
    first = randn(1, grid[0] * grid[1], 5)
    second = randn(1, grid[0] * grid[1], 5, seed=1)
    torch.testing.assert_close(
        resample_patches(2 * first - second, grid, target),
        2 * resample_patches(first, grid, target)
        - resample_patches(second, grid, target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('grid, target', [
    ((16, 16), (14, 14)), ((14, 14), (16, 16)), ((8, 12), (6, 20)),
    ((12, 8), (20, 6)), ((8, 8), (4, 4)),
])
def test_positions_in_the_image_are_kept(grid, target):
    """Patch centres map to patch centres; rows and columns do not swap."""
    expected = ramp(target).unflatten(1, target)
    resampled = resample_patches(ramp(grid), grid, target
                                 ).unflatten(1, target)
    # edges are clamped to the outermost centres, by half a patch at most
    error = (resampled - expected).abs()
    assert error.amax(dim=(0, 1, 2))[0] <= 0.5 / min(grid[0], target[0]) + 1e-5
    assert error.amax(dim=(0, 1, 2))[1] <= 0.5 / min(grid[1], target[1]) + 1e-5
    middle = slice(2, -2)  # empty for the smallest target
    torch.testing.assert_close(resampled[:, middle, middle],
                               expected[:, middle, middle], rtol=0, atol=1e-2)


def test_fewer_patches_average_instead_of_skipping():
    """A chessboard halved twice is grey: without antialiasing, some of the
    patches would not count at all."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12),
                                   indexing='ij')
    board = ((rows + columns) % 2).float().flatten()[None, :, None]
    for target in ((3, 3), (3, 12), (4, 6)):
        resampled = resample_patches(board, (12, 12), target)
        assert (resampled - 0.5).abs().max() < 0.12
    spike = torch.zeros(1, 144, 1)
    for index in range(144):
        spike.zero_()[0, index] = 1
        assert resample_patches(spike, (12, 12), (4, 4)).max() > 0.01


def test_more_patches_interpolate_without_blur():
    patches = randn(1, 9, 2)
    resampled = resample_patches(patches, (3, 3), (9, 9)).unflatten(1, (9, 9))
    # centres of the old patches coincide with every third new one
    torch.testing.assert_close(resampled[:, 1::3, 1::3],
                               patches.unflatten(1, (3, 3)))


@pytest.mark.parametrize('target', [(2, 3), (8, 12), (2, 12)])
@pytest.mark.parametrize('dtype', [
    torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('autocast', [False, True])
def test_any_precision(target, dtype, autocast):
    patches = randn(2, 24, 5)
    exact = resample_patches(patches, (4, 6), target)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        resampled = resample_patches(patches.to(dtype), (4, 6), target)
    assert resampled.dtype == dtype
    torch.testing.assert_close(resampled.float(), exact, rtol=2e-2, atol=2e-2)


def test_gradient_flows_through():
    patches = randn(2, 24, 5).requires_grad_()
    resample_patches(patches, (4, 6), (3, 7)).sum().backward()
    # every patch counts; in sum as much as there are new ones
    assert (patches.grad > 0).all()
    assert patches.grad.sum().item() == pytest.approx(2 * 5 * 21, rel=1e-4)


# -- aligning two models ------------------------------------------------------

# (student's prefix, teacher's prefix) -> how many are compared
SHARED = {
    (s, t): s if s == t else min(s, t, 1)
    for s in range(6) for t in range(6)
}


def test_table_of_shared_prefixes():
    assert SHARED[0, 0] == 0 and SHARED[1, 1] == 1 and SHARED[5, 5] == 5
    assert SHARED[1, 5] == SHARED[5, 1] == 1  # CLS alone
    assert SHARED[0, 1] == SHARED[5, 0] == 0
    assert SHARED[2, 5] == 1  # a DeiT distillation token is no register


@pytest.mark.parametrize('grid', [(4, 6), (3, 7), (2, 3)])
@pytest.mark.parametrize('prefixes', SHARED, ids=str)
def test_align_tokens(prefixes, grid):
    student = tokens(prefixes[0], grid, 5)
    teacher = tokens(prefixes[1], (4, 6), 7, seed=1)
    shared = SHARED[prefixes]
    first, second = align_tokens(student, teacher)

    assert first.grid == second.grid == (4, 6)
    assert first.num_prefix == second.num_prefix == shared
    assert first.values.shape == (2, shared + 24, 5)
    assert second.values.shape == (2, shared + 24, 7)
    # CLS stays first, and the teacher's patches are untouched
    assert torch.equal(first.prefix, student.prefix[:, :shared])
    assert torch.equal(second.prefix, teacher.prefix[:, :shared])
    assert torch.equal(second.patches, teacher.patches)
    assert torch.equal(first.patches,
                       resample_patches(student.patches, grid, (4, 6)))


def test_aligned_tokens_pass_as_they_are():
    student, teacher = tokens(1, (4, 6)), tokens(1, (4, 6), 7)
    first, second = align_tokens(student, teacher)
    assert first is student and second is teacher


@given(st.integers(0, 3), st.integers(0, 3), grids, grids)
def test_aligned_shapes_for_any_grids(s, t, grid, target):
    first, second = align_tokens(tokens(s, grid), tokens(t, target, 7))
    assert first.values.shape[:2] == second.values.shape[:2]
    assert first.grid == second.grid == target


@pytest.mark.parametrize('grid', [(32, 32), (64, 64), (16, 16), (32, 64),
                                  (37, 37), (14, 14)])
def test_calibration_comes_to_all_columns(grid):
    rows, columns = grid
    chosen = evenly_spaced(rows * columns, 64)
    assert len(set(chosen.tolist())) == 64
    assert chosen[0] == 0 and chosen[-1] == rows * columns - 1
    assert len(set((chosen % columns).tolist())) >= min(columns, 64) * 0.6
    assert len(set((chosen // columns).tolist())) >= min(rows, 64) * 0.9
    assert torch.equal(evenly_spaced(50, 64), torch.arange(50))


def test_the_edge_of_padding_counts_by_its_share():
    """Once, though both models have it."""
    padding = Padding([(0, 32, 0, 32), (0, 20, 0, 32)], (32, 32))
    ours, theirs = (padding.weigh(Tokens(torch.randn(2, 5, 8), (2, 2)))
                    for _ in range(2))
    _, target = align_tokens(ours, theirs)
    assert torch.equal(target.patch_weight, torch.tensor(
        [[1., 1, 1, 1], [1, 1, 0.25, 0.25]]))


def test_registers_alone_have_no_counterpart():
    ours, theirs = (Tokens(torch.randn(2, 4 + count, 8), (2, 2),
                           has_cls=False) for count in (1, 4))
    student, teacher = align_tokens(ours, theirs)
    assert student.num_prefix == teacher.num_prefix == 0
