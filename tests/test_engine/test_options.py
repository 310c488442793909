"""Overrides of a config from the command line reach what is read."""
import argparse
import os

import pytest

from mmsinger.engine.options import ConfigOptions
from mmsinger.engine.parts import check_parts
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from tiny import ROOT, SEG_CONFIG

RECIPE = os.path.join(ROOT, 'configs', 'singer_vitl_to_vits_ade20k.py')


def parse(*values):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions)
    return parser.parse_args(['--cfg-options', *values]).cfg_options


@pytest.mark.parametrize('text, value', [
    ('a.b=1', 1), ('a.b=[1,2]', [1, 2]), ('a.b=(x,None)', ('x', None)),
    ("a.b=[dict(type='EMAHook', momentum=1e-3), dict(type=mmseg.X)]",
     [dict(type='EMAHook', momentum=1e-3), dict(type='mmseg.X')]),
    ("a.b={'c': [1, dict(d=(True, None))]}", dict(c=[1, dict(d=(True, None))])),
])
def test_values(text, value):
    assert parse('k=0', text) == {'k': 0, 'a.b': value}


def test_options_given_twice():
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions)
    found = parser.parse_args([
        '--cfg-options', 'a=1', 'b=2', '--cfg-options', 'b=dict(x=1)', 'c=3'])
    assert found.cfg_options == dict(a=1, b=dict(x=1), c=3)
    assert parse('a=1', 'a=dict(x=1)', 'c=2') == dict(a=dict(x=1), c=2)


@pytest.mark.parametrize('text', ['a.b', 'a=[(1]', 'a=dict(b=', 'a=dict(1)',
                                  'a=dict(b=f(1))'])
def test_values_that_cannot_be_read(text, capsys):
    with pytest.raises(SystemExit) as end:
        parse(text)
    assert end.value.code == 2
    assert f'--cfg-options {text}: expected KEY=VALUE' in \
        capsys.readouterr().err


@pytest.mark.parametrize('option, value, copies', [
    ('teacher.checkpoint', 'other.pth', ['model.teacher.checkpoint']),
    ('student.backbone.qkv_bias', False, [
        'model.student.backbone.qkv_bias']),
    ('distiller.adapter.rank', 3, ['model.adapter.rank']),
    ('distiller.target_norm', 'standardise', ['model.target_norm']),
    ('train_pipeline.0.type', 'LoadImageFromNDArray', [
        'train_dataloader.dataset.pipeline.0.type']),
    ('test_pipeline.1.scale', 3, [
        'val_dataloader.dataset.pipeline.1.scale',
        'test_dataloader.dataset.pipeline.1.scale']),
])
def test_overrides_of_variables_reach_their_copies(option, value, copies):
    cfg = load_config(RECIPE, {option: value})
    for key in (option, *copies):
        node = cfg
        for name in key.split('.'):
            node = node[int(name) if name.isdigit() else name]
        assert node == value, key


def test_an_override_of_the_copy_itself_comes_last():
    cfg = load_config(RECIPE, {'model.teacher.checkpoint': 'mine.pth',
                               'teacher.checkpoint': 'other.pth'})
    assert cfg.model.teacher.checkpoint == 'mine.pth'


def test_what_a_changed_copy_still_has_in_common():
    """model.teacher of this config has another backbone and checkpoint."""
    cfg = load_config(SEG_CONFIG, {'teacher.prefix': 'vit.'})
    assert cfg.model.teacher.prefix == 'vit.'


@pytest.mark.parametrize('option, text', [
    ('teacher.checkpoint', 'Set model.teacher.checkpoint instead'),
    ('student.backbone.img_size', 'Set model.student.backbone.img_size'),
    ('distiller.adapter.rank', 'Set model.adapter.rank instead'),
    ('data_root', 'you mean: train_dataloader.dataset.data_root,'),
    ('a.b.c', "the config has no 'a', and nothing reads it"),
    ('custom_import.imports', "the config has no 'custom_import'"),
    ('train_dataloader.dataset.pipeline.9.type', 'Index 9 exceeds'),
])
def test_overrides_that_nothing_would_read(option, text):
    with pytest.raises(ConfigError, match='--cfg-options') as error:
        load_config(SEG_CONFIG, {option: 1})
    assert text in str(error.value)


@pytest.mark.parametrize('text, place', [
    ("teacher = dict(checkpoint='x.pth')", 'model.teacher instead'),
    ("data_root = '/mine'", 'train_dataloader.dataset.data_root, val_data'),
    ("distiller = dict(adapter=dict(rank=8))", 'Set model instead'),
    ("test_pipeline: list = []", 'test_pipeline has no effect'),
    ("drop_path_rate = 0.5", 'model.student.backbone.drop_path_rate'),
    ("data_root = '/mine'\n"
     "train_dataloader = dict(dataset=dict(data_root=data_root))", None),
    ("mine = 'CosineAnnealingLR'", None),
    ("custom_imports = dict(imports=['json'])", None),
    ("max_iters = 7\ntrain_cfg = dict(max_iters=7)", None),
    ("def count():\n    layers = 5", None),
])
def test_variables_that_nothing_would_read(tmp_path, text, place):
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = [{RECIPE!r}]\n{text}\n')
    if place is None:
        load_config(str(config))
    else:
        with pytest.raises(ConfigError, match=place):
            load_config(str(config))


def test_variables_of_a_dumped_config(tmp_path):
    cfg = load_config(RECIPE)
    cfg.dump(str(tmp_path / 'dumped.py'))
    assert load_config(str(tmp_path / 'dumped.py')).model == cfg.model


def test_variables_over_a_base_with_a_place_in_its_path(tmp_path):
    (tmp_path / 'base.py').write_text(f'_base_ = [{RECIPE!r}]\n')
    config = tmp_path / 'config.py'
    config.write_text("_base_ = ['{{ fileDirname }}/base.py']\nmine = 5\n")
    load_config(str(config))


@pytest.mark.parametrize('key', ['optim_wraper', 'param_schedulers',
                                 'log_processr', 'custom_hook'])
def test_a_misspelt_key_beside_the_inherited_one(tmp_path, key):
    config = tmp_path / 'config.py'
    config.write_text(f'_base_ = [{SEG_CONFIG!r}]\n{key} = dict()\n')
    with pytest.raises(ConfigError, match=f'{key}: nothing reads {key!r}'):
        check_parts(load_config(str(config)))


def test_a_base_alone_is_what_its_overrides_are_for():
    path = os.path.join(ROOT, 'configs', '_base_', 'teachers',
                        'vit_l16_in21k.py')
    cfg = load_config(path, {'teacher.checkpoint': 'other.pth'})
    assert cfg.teacher.checkpoint == 'other.pth'


def test_items_of_lists():
    cfg = load_config(SEG_CONFIG, {
        'custom_hooks.0.type': 'EMAHook', 'custom_hooks.0.momentum': 0.5,
        'model.layers.0': 2, 'param_scheduler.0.end': 3,
        'param_scheduler.1': dict(type='ConstantLR', factor=1.)})
    assert cfg.custom_hooks == [dict(type='EMAHook', momentum=0.5)]
    assert cfg.model.layers == (2, 3)
    assert [s.type for s in cfg.param_scheduler] == [
        'CosineAnnealingLR', 'ConstantLR']
    assert cfg.param_scheduler[0].end == 3
