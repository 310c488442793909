import json
import os
import sys

import explained_variance
import pytest
import tiny
import torch
from explained_variance import explained, features

from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator).double()


@pytest.mark.parametrize('map_of, least, most', [
    (lambda x: 5 * x @ draw(12, 2)[:, :4] + 3, 0.99, 1.),  # all of it
    (lambda x: torch.cat([x[:, :2], draw(len(x), len(x))[:, :2]], 1),
     0.45, 0.55),  # half of it
    (lambda x: draw(len(x), len(x)), -0.1, 0.1),  # nothing
])
def test_share_that_is_known(map_of, least, most):
    train, test = draw(2000, 0), draw(1000, 1)
    assert least <= explained(train, map_of(train), test, map_of(test)) <= most


def test_scale_does_not_count():
    train, test = draw(200, 0), draw(100, 1)
    target, target_test = train[:, :5] ** 3, test[:, :5] ** 3
    expected = explained(train, target, test, target_test)
    assert explained(1e4 * train - 7, target / 9, 1e4 * test - 7,
                     target_test / 9) == pytest.approx(expected)
    constant = torch.zeros(200, 1).double(), torch.zeros(100, 1).double()
    assert explained(torch.cat([train, constant[0]], 1), target,
                     torch.cat([test, constant[1]], 1), target_test) == \
        pytest.approx(expected)


def test_channels_that_are_constant_in_training_do_not_count():
    train, test = draw(200, 0), draw(100, 1)
    dead, alive = torch.zeros(200, 1).double(), torch.zeros(100, 1).double()
    alive[3] = 1e-3
    assert explained(train, torch.cat([train[:, :5], dead], 1), test,
                     torch.cat([test[:, :5], alive], 1)) == pytest.approx(
        explained(train, train[:, :5], test, test[:, :5]))


@pytest.mark.parametrize('train, test', [(1, 5), (5, 1)])
def test_single_images_are_refused(train, test):
    with pytest.raises(ConfigError, match=f'{train} training and {test} test'):
        explained(draw(train, 0), draw(train, 0), draw(test, 1),
                  draw(test, 1))


def test_the_share_is_written(monkeypatch, tmp_path, capsys):
    tasks = os.path.join(tiny.ROOT, 'configs', 'linear_eval')
    out = tmp_path / 'metrics.json'
    monkeypatch.setattr(sys, 'argv', [
        'x', os.path.join(tasks, 'cls_mean_digits.py'),
        os.path.join(tiny.ROOT, 'configs/digits/fitnet_vitl_to_vits.py'),
        'student.pth', os.path.join(
            tiny.ROOT, 'configs/_base_/teachers/digits.py'),
        '--out', str(out)])
    monkeypatch.setattr(
        explained_variance, 'evaluation_config',
        lambda task, source, *args, teacher=False: teacher)
    monkeypatch.setattr(
        explained_variance, 'features',
        lambda teacher: [draw(200, 0)[:, :6 - 3 * teacher],
                         draw(100, 1)[:, :6 - 3 * teacher]])
    explained_variance.main()
    share = json.loads(out.read_text())['explained_variance']
    assert 99 < share <= 100
    assert f'100 images: {share:.1f} %' in capsys.readouterr().out


@pytest.mark.parametrize('task', ['seg_digits', 'depth_digits', 'knn_digits'])
def test_tasks_without_one_feature_an_image_are_refused(task):
    with pytest.raises(ConfigError, match='Take a classification'):
        features(load_config(os.path.join(
            tiny.ROOT, 'configs', 'linear_eval', f'{task}.py')))
