"""What the look at a config before building says, and where it is silent."""
import glob
import importlib
import os

import pytest
import tiny
from mmengine.config import Config

from mmsinger.compat import onedl_config_packages
from mmsinger.engine.parts import check_parts
from mmsinger.errors import ConfigError
from mmsinger.registry import arguments_of

RECIPES = sorted(path for path in glob.glob(
    os.path.join(tiny.ROOT, 'configs', '**', '*.py'), recursive=True)
    if '_base_' not in path)


def stock(package, step):
    """Some of a toolbox's own configs, whatever its version has."""
    root = os.path.dirname(importlib.import_module(package).__file__)
    paths = sorted(glob.glob(os.path.join(root, '.mim', 'configs', '*',
                                          '*.py')))
    return [path for path in paths if '_base_' not in path][::step]


@pytest.mark.parametrize('paths', [
    RECIPES, stock('mmseg', 20), stock('mmpretrain', 20)],
    ids=['ours', 'mmseg', 'mmpretrain'])
def test_no_false_alarm(paths):
    looked_at = 0
    for path in paths:
        try:
            with onedl_config_packages():
                cfg = Config.fromfile(path)
        except (ImportError, KeyError, RuntimeError):
            continue  # needs mmdet, or is broken itself
        if 'default_scope' not in cfg:
            continue
        try:
            check_parts(cfg)
        except ConfigError as error:  # what the package lacks here
            assert 'there is no package' in str(error) or \
                'dataset.type=' in str(error), (path, error)
        looked_at += 1
    assert looked_at > len(paths) * 0.8


@pytest.mark.parametrize('change, words', [
    ({'optim_wrapper.clip_grad': dict(max_norm=-1)}, 'clip_grad.max_norm=-1'),
    ({'optim_wrapper.clip_grad': dict(max_norm=0)}, 'above 0, or inf'),
    ({'optim_wrapper.paramwise_cfg.decay_rate': -0.5}, 'decay_rate=-0.5'),
    ({'optim_wrapper.paramwise_cfg.decay_rate': 'many'}, "'many'"),
    ({'optim_wrapper.paramwise_cfg.bias_lr_mult': -1.}, 'bias_lr_mult=-1'),
    ({'auto_scale_lr': dict(base_batch_size=-16)}, 'base_batch_size=-16'),
    ({'auto_scale_lr': dict(base_batch_size='x')}, "base_batch_size='x'"),
    ({'param_scheduler': [dict(type='CosineAnnealingLR', eta_min=-1.)]},
     'param_scheduler.0.eta_min=-1'),
    ({'model.student.data_preprocessor.std': [-58., 57., 57.]},
     'data_preprocessor.std.0=-58'),
    ({'model.student.data_preprocessor.mean': 5}, 'mean=5'),
    ({'model.student.data_preprocessor.mean': [float('nan'), 1., 1.]},
     'data_preprocessor.mean.0=nan'),
    ({'randomness': dict(seed=2**32)}, 'seed=4294967296'),
    ({'randomness': dict(seed='x')}, "seed='x'"),
    ({'log_level': 'LOUD'}, "log_level='LOUD' is not valid")])
def test_numbers_that_cannot_be_meant(change, words):
    cfg = Config.fromfile(tiny.SEG_CONFIG)
    cfg.merge_from_dict(change)
    with pytest.raises(ConfigError) as error:
        check_parts(cfg)
    assert words in str(error.value)


def test_numbers_that_can_be_meant():
    cfg = Config.fromfile(tiny.SEG_CONFIG)
    cfg.merge_from_dict({
        'optim_wrapper.clip_grad': dict(max_norm=float('inf')),
        'optim_wrapper.paramwise_cfg.bias_lr_mult': None,
        'randomness': dict(seed=None), 'log_level': 'WARNING'})
    check_parts(cfg)


class Base:
    def __init__(self, base=1, taken=2):
        pass


class HandsUp(Base):
    def __init__(self, own, **kwargs):
        self.read = kwargs.pop('read', None)
        super().__init__(taken=3, **kwargs)


class Elsewhere(Base):
    def __init__(self, own, **kwargs):
        self.kept = kwargs


class Swallows(Base):
    def __init__(self, own=1, **kwargs):
        super().__init__()


@pytest.mark.parametrize('cls, names, closed', [
    (HandsUp, {'own', 'read', 'base'}, True), (Elsewhere, {'own'}, False),
    (Swallows, {'own'}, True), (Base, {'base', 'taken'}, True)])
def test_what_a_class_takes(cls, names, closed):
    found = arguments_of(cls)
    assert (set(found.hints), found.closed) == (names, closed)
