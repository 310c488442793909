"""Decompositions in files: the same ones, or computed anew."""
import os

import pytest
import torch

import mmsinger.models.adapters.nullspace_cache as nullspace_cache
from mmsinger.analysis.nullspace import nullspace_energies
from mmsinger.errors import ConfigError
from mmsinger.files import cache_folder
from mmsinger.models import SiNGERDistiller
from mmsinger.models.adapters import (cached_singular_directions,
                                      left_singular_directions)
from tiny import vit

D = 256


@pytest.fixture
def computed(tmp_path, monkeypatch):
    """An empty cache, and the shapes of what was computed."""
    monkeypatch.setenv('MMSINGER_CACHE', str(tmp_path / 'cache'))
    shapes = []

    def decompose(weight):
        shapes.append(tuple(weight.shape))
        return left_singular_directions(weight)

    monkeypatch.setattr(nullspace_cache, 'left_singular_directions',
                        decompose)
    return shapes


@pytest.fixture(scope='module')
def W():
    return torch.randn(D, D, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))


def files(tmp_path):
    return [os.path.join(folder, name)
            for folder, _, names in os.walk(tmp_path) for name in names]


def test_computed_once(W, computed, tmp_path):
    expected = left_singular_directions(W)
    for weight in (W, W.clone(), W.T.contiguous().T):
        for found, value in zip(cached_singular_directions(weight), expected):
            assert found.dtype == torch.float64
            assert torch.equal(found, value)
    assert computed == [(D, D)]
    path, = files(tmp_path)
    assert os.path.dirname(path) == str(tmp_path / 'cache' / 'nullspaces')


@pytest.mark.parametrize('change', [
    lambda W: torch.nextafter(W, W + 1), lambda W: W.T, lambda W: 2 * W,
    lambda W: torch.cat([W, W], dim=1), lambda W: W.float()])
def test_another_matrix_is_another_file(W, computed, change):
    cached_singular_directions(W)
    found = cached_singular_directions(change(W))
    assert len(computed) == 2
    assert torch.equal(found[1], left_singular_directions(change(W))[1])


def test_another_algorithm_is_another_file(W, computed, monkeypatch):
    cached_singular_directions(W)
    monkeypatch.setattr(nullspace_cache, 'VERSION', 0)
    cached_singular_directions(W)
    assert len(computed) == 2


def no_tensors(path):
    torch.save(dict(directions='x', values=3, check=''), path)


def other_size(path):
    torch.save(dict(directions=torch.eye(2), values=torch.ones(2), check=''),
               path)


def other_value(path):
    content = torch.load(path, weights_only=True)
    content['directions'][7, 9] += 1e-12
    torch.save(content, path)


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path):
    os.truncate(path, 0)


def text(path):
    with open(path, 'w') as file:
        file.write('no such thing')


def code(path):
    torch.save(dict(directions=print), path)


@pytest.mark.parametrize('damage', [
    no_tensors, other_size, other_value, cut, empty, text, code])
def test_damaged_files_are_replaced(W, computed, tmp_path, damage):
    expected = cached_singular_directions(W)
    path, = files(tmp_path)
    damage(path)
    for _ in range(2):
        found = cached_singular_directions(W)
        assert torch.equal(found[0], expected[0])
    assert len(computed) == 2  # mended
    assert files(tmp_path) == [path]


def test_interrupted_writing_leaves_nothing(W, computed, tmp_path,
                                            monkeypatch):

    def save(content, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', save)
        with pytest.raises(KeyboardInterrupt):
            cached_singular_directions(W)
    assert not files(tmp_path)


@pytest.mark.parametrize('error', [OSError(28, 'No space left'),
                                   RuntimeError('unexpected pos')])
def test_a_full_disk_is_no_error(W, computed, tmp_path, monkeypatch, error):

    def save(content, path):
        raise error

    monkeypatch.setattr(torch, 'save', save)
    for _ in range(2):
        assert cached_singular_directions(W)[0].shape == (D, D)
    assert len(computed) == 2
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_made_is_no_error(W, computed, tmp_path,
                                                  monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('MMSINGER_CACHE', str(tmp_path / 'file' / 'cache'))
    for _ in range(2):
        assert cached_singular_directions(W)[0].shape == (D, D)
    assert len(computed) == 2


def test_small_matrices_have_no_file(W, computed, tmp_path):
    for _ in range(2):
        cached_singular_directions(W[:D - 1])
    assert len(computed) == 2
    assert not files(tmp_path)


def test_it_can_be_switched_off(W, computed, tmp_path, monkeypatch):
    monkeypatch.setenv('MMSINGER_CACHE', '')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for _ in range(2):
        cached_singular_directions(W)
    assert len(computed) == 2
    assert not files(tmp_path)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv('MMSINGER_CACHE', '/a')
    monkeypatch.setenv('XDG_CACHE_HOME', '/b')
    monkeypatch.setenv('HOME', '/c')
    assert cache_folder() == '/a'
    monkeypatch.delenv('MMSINGER_CACHE')
    assert cache_folder() == os.path.join('/b', 'mmsinger')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_folder() == os.path.join('/c', '.cache', 'mmsinger')


def test_bad_matrices_are_refused_as_ever(computed, tmp_path):
    for weight in (torch.ones(D + 1, D), torch.full((D, D), float('nan'))):
        with pytest.raises(ConfigError):
            cached_singular_directions(weight)
    assert not files(tmp_path)


def test_the_distiller_uses_it(computed):
    """At the start, at the next start, and when energies are measured."""
    arch = dict(embed_dims=D, num_layers=2, num_heads=4,
                feedforward_channels=2 * D)
    infos = []
    for _ in range(2):
        torch.manual_seed(0)
        model = SiNGERDistiller(
            student=vit(), task_loss_weight=0,
            teacher=dict(backbone=vit(arch=arch), layers=(0, 1)))
        model.init_weights()
        infos.append(model.initialise_adapters())
        energies = nullspace_energies(model)
        for info in infos[-1]:
            found = energies[str(info['layer'])]
            assert found['block'] == info['block']
            assert found['up']['e_safe'] == info['e_safe']
    assert infos[0][0]['e_safe'] == infos[1][0]['e_safe']
    # both layers start from block 1: the one before it, and itself as the last
    assert computed == [(D, D)]
