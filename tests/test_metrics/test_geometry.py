"""Likeness of token sets, against loops and against what must not matter."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.metrics import (gram_distance, linear_cka, relative_l2,
                              token_cosine)

seeds = st.integers(0, 10**6)
counts = st.integers(2, 9)


def tokens(seed, patches=6, channels=5, images=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, patches, channels, generator=generator)


def rotation(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]


def cosine(u, v):
    dot = sum(x * y for x, y in zip(u, v))
    return dot / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))


def test_gram_distance_by_hand():
    a, b = tokens(0), tokens(1, channels=3)
    for image in range(2):
        total = 0.
        for i in range(6):
            for j in range(6):
                ours = cosine(a[image, i].tolist(), a[image, j].tolist())
                theirs = cosine(b[image, i].tolist(), b[image, j].tolist())
                total += (ours - theirs)**2
        assert gram_distance(a, b)[image].item() == pytest.approx(
            math.sqrt(total), rel=1e-4)


@given(seeds, counts, counts, counts)
def test_gram_distance_sees_angles_alone(seed, patches, channels, other):
    a = tokens(seed, patches, channels)
    b = tokens(seed + 1, patches, other)
    scale = tokens(seed + 2, patches, 1).abs() + 0.1
    turned = scale * a @ rotation(seed, channels)
    distance = gram_distance(a, b)
    assert torch.allclose(gram_distance(turned, b), distance, atol=1e-4)
    assert torch.allclose(gram_distance(b, a), distance)
    assert torch.allclose(gram_distance(a, turned), torch.zeros(2), atol=1e-4)
    assert (distance <= 2 * patches).all()


def test_gram_distance_of_opposite_geometries():
    """All the same against half and half opposite: 2 in half the entries."""
    same = torch.ones(1, 4, 1)
    halves = torch.tensor([1., 1., -1., -1.]).view(1, 4, 1)
    assert gram_distance(same, halves).item() == pytest.approx(
        math.sqrt(8 * 2**2))


def test_token_cosine_by_hand():
    a, b = tokens(0), tokens(1)
    for image in range(2):
        values = [cosine(u.tolist(), v.tolist())
                  for u, v in zip(a[image], b[image])]
        assert token_cosine(a, b)[image].item() == pytest.approx(
            sum(values) / 6, abs=1e-6)
    assert torch.allclose(token_cosine(a, -3 * a), -torch.ones(2))


def test_relative_l2_by_hand():
    a, b = tokens(0), tokens(1)
    for image in range(2):
        change = sum((x - y)**2 for x, y in zip(
            a[image].flatten().tolist(), b[image].flatten().tolist()))
        size = sum(x**2 for x in a[image].flatten().tolist())
        assert relative_l2(a, b)[image].item() == pytest.approx(
            math.sqrt(change / size), rel=1e-5)
    assert torch.allclose(relative_l2(a, 1.25 * a), torch.full((2, ), 0.25))


def hsic_cka(x, y):
    """By its definition with the centring matrix, for one image."""
    count = len(x)
    centre = torch.eye(count) - torch.ones(count, count) / count
    k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return torch.trace(k @ l) / torch.sqrt(
        torch.trace(k @ k) * torch.trace(l @ l))


def test_cka_by_its_definition():
    a, b = tokens(0), tokens(1, channels=3)
    values = linear_cka(a, b)
    for image in range(2):
        assert values[image].item() == pytest.approx(
            hsic_cka(a[image], b[image]).item(), abs=1e-5)


@given(seeds, counts, counts)
def test_cka_ignores_rotation_scale_and_shift(seed, patches, channels):
    a, b = tokens(seed, patches, channels), tokens(seed + 1, patches, 4)
    moved = 3 * a @ rotation(seed, channels) + tokens(seed + 2, 1, channels)
    assert torch.allclose(linear_cka(moved, b), linear_cka(a, b), atol=1e-3)
    assert torch.allclose(linear_cka(a, moved), torch.ones(2), atol=1e-4)
    assert (linear_cka(a, b) <= 1 + 1e-5).all()
    assert (linear_cka(a, b) >= 0).all()


def test_cka_sees_other_linear_maps():
    a = tokens(0, patches=50)
    stretched = a * torch.tensor([10., 1., 1., 1., 1.])
    assert (linear_cka(a, stretched) < 0.9).all()


def test_cka_of_equal_tokens_is_zero():
    assert linear_cka(torch.ones(1, 4, 3), tokens(0, 4, 3, 1)).item() == 0
    uneven = torch.full((1, 7, 3), 0.1)  # whose mean is rounded
    assert linear_cka(uneven, uneven).item() == 0
    nearly = uneven + 1e-4 * tokens(0, 7, 3, 1)
    assert linear_cka(nearly, nearly).item() == pytest.approx(1)


@pytest.mark.parametrize('function', [
    gram_distance, token_cosine, relative_l2, linear_cka])
def test_half_precision_and_autocast_lose_nothing_more(function):
    a, b = (tokens(seed).bfloat16() for seed in (0, 1))
    exact = function(a.double(), b.double()).float()
    with torch.autocast('cpu', torch.bfloat16):
        values = function(a, b)
    assert values.dtype == torch.float32
    assert torch.allclose(values, exact, rtol=1e-3)
