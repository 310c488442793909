"""Any stock config is wrapped by one line."""
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

import samples
import tiny
from mmsinger.engine.prepare import add_required_hooks, load_config
from mmsinger.export import student_config
from mmsinger.models.distillers import SiNGERDistiller
from mmsinger.models.teachers.frozen import FrozenTeacher
from mmsinger.registry import MODELS

CONFIGS = os.path.join(tiny.ROOT, 'configs')
SEG = 'mmseg::vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py'
MAE = 'mmpretrain::vision_transformer/vit-base-p16_32xb128-mae_in1k.py'
DEIT = 'mmpretrain::deit/deit-small_4xb256_in1k.py'
STOCK = {'seg': (SEG, 'vit_l16_in21k'), 'mae': (MAE, 'vit_l16_timm'),
         'deit': (DEIT, 'deit3_l16_in1k')}

NARROW = dict(_delete_=True, embed_dims=32, num_layers=24, num_heads=4,
              feedforward_channels=64)
COMMON = {'model.teacher.checkpoint': None}
TEACHER_CUT = {
    'vit_l16_in21k': {'model.teacher.backbone.arch': NARROW},
    'deit3_l16_in1k': {'model.teacher.backbone.arch': NARROW},
    'vit_l16_timm': {'model.teacher.backbone.embed_dim': 32,
                     'model.teacher.backbone.num_heads': 4},
}
SMALL = dict(_delete_=True, embed_dims=48, num_layers=12, num_heads=4,
             feedforward_channels=96)
CLASSIFIER_CUT = {
    'model.student.backbone.arch': SMALL,
    'model.student.backbone.img_size': 64,
    'model.student.head.in_channels': 48,
}
STUDENT_CUT = {
    'seg': {
        'model.student.pretrained': None,  # a file that users have
        'model.student.backbone.img_size': (64, 64),
        'model.student.backbone.embed_dims': 48,
        'model.student.decode_head.in_channels': [48] * 4,
        'model.student.decode_head.channels': 32,
        'model.student.auxiliary_head.in_channels': 48,
        'model.student.auxiliary_head.channels': 32,
        'model.student.data_preprocessor.size': (64, 64),
    },
    'mae': CLASSIFIER_CUT,
    'deit': CLASSIFIER_CUT,
}


def wrap(folder, stock, teacher):
    """The form that the documentation gives."""
    path = folder / 'wrapped.py'
    path.write_text(f"""\
_base_ = ['{stock}', '{CONFIGS}/_base_/teachers/{teacher}.py', \
'{CONFIGS}/_base_/distillers/singer.py']
model = dict(_delete_=True, student=_base_.model, teacher=_base_.teacher,
             **_base_.distiller)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={{
    'adapters': dict(lr_mult=0.1), 'projectors': dict(lr_mult=10.)}}))
""")
    return str(path)


def load(folder, name, cut=True):
    stock, teacher = STOCK[name]
    path = wrap(folder, stock, teacher)
    options = {**COMMON, **TEACHER_CUT[teacher], **STUDENT_CUT[name]}
    return load_config(path, options if cut else None)


@pytest.mark.parametrize('name', STOCK)
def test_student_is_the_stock_model(tmp_path, name):
    before = dict(MODULE2PACKAGE)
    cfg = load(tmp_path, name, cut=False)
    assert MODULE2PACKAGE == before
    stock = tmp_path / 'stock.py'
    stock.write_text(f"_base_ = ['{STOCK[name][0]}']\n")
    plain = load_config(str(stock))
    assert cfg.model.student == plain.model
    assert cfg.model.teacher.layers == (17, 23)
    rates = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert rates.pop('adapters').lr_mult == 0.1
    assert rates.pop('projectors').lr_mult == 10
    if 'paramwise_cfg' not in plain.optim_wrapper:
        cfg.optim_wrapper.pop('paramwise_cfg')
    for key in ('train_dataloader', 'optim_wrapper', 'train_cfg',
                'param_scheduler', 'default_hooks'):
        assert cfg[key] == plain[key], key


@pytest.mark.parametrize('name', STOCK)
def test_wrapped_config_trains(tmp_path, name):
    cfg = load(tmp_path, name)
    add_required_hooks_in_scope(cfg)
    model = samples.build(cfg)
    assert isinstance(model, SiNGERDistiller)
    assert isinstance(model.teacher, FrozenTeacher)
    assert model.student_layers == [8, 11]
    data = model.data_preprocessor(samples.batch(cfg), True)
    names = {name for name in model(**data, mode='loss') if 'loss' in name}
    distilled = {'distill.loss_kd', 'distill.loss_outlier',
                 'distill.loss_info'}
    assert distilled < names
    assert not any(name.startswith('distill.') for name in names - distilled)
    losses, moved, _ = samples.one_step(model, cfg)
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert all(moved[part] > 0
               for part in ('student', 'projectors', 'adapters'))


def add_required_hooks_in_scope(cfg):
    from mmengine.registry import init_default_scope
    init_default_scope(cfg.default_scope)
    add_required_hooks(cfg)


@pytest.mark.parametrize('name', STOCK)
def test_the_hooks_that_it_needs_are_added(tmp_path, name):
    cfg = load(tmp_path, name)
    own = [hook.type for hook in cfg.get('custom_hooks') or []]
    add_required_hooks_in_scope(cfg)
    types = [hook.type for hook in cfg.custom_hooks]
    assert types[:len(own)] == own
    assert set(types[len(own):]) == {
        f'mmsinger.{hook}' for hook in SiNGERDistiller.required_hooks}
    add_required_hooks(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == types  # once is enough


def test_the_stock_hooks_stay(tmp_path):
    cfg = load(tmp_path, 'mae')
    add_required_hooks_in_scope(cfg)
    assert cfg.custom_hooks[0].type == 'EMAHook'


def test_the_distillers_preprocessor_goes_to_the_plain_student(tmp_path):
    cfg = load(tmp_path, 'mae')
    cfg.pop('data_preprocessor', None)
    cfg.model.student.pop('data_preprocessor', None)
    cfg.model.data_preprocessor = dict(mean=[1., 2., 3.], std=[4.] * 3,
                                       to_rgb=True)
    plain = samples.build(student_config(cfg)).data_preprocessor
    expected = samples.build(cfg).data_preprocessor
    assert torch.equal(plain.mean, expected.mean)
    assert plain.mean.flatten().tolist() == [1., 2., 3.]
    # nothing of a whole model goes to a backbone alone
    cfg.model.student = dict(cfg.model.student.backbone,
                             type='mmpretrain.VisionTransformer')
    assert 'data_preprocessor' not in student_config(cfg).model


@pytest.mark.parametrize('name', STOCK)
def test_the_plain_student_config_is_the_stock_one(tmp_path, name):
    """What is dumped as NAME_student.py builds without mmsinger."""
    cfg = load(tmp_path, name)
    add_required_hooks_in_scope(cfg)
    plain = student_config(cfg)
    assert 'mmsinger' not in plain.pretty_text.replace(str(tmp_path), '')
    model_cfg = plain.model.copy()
    if plain.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', plain.data_preprocessor)
    student = MODELS.build(model_cfg)
    model = samples.build(cfg)
    student.load_state_dict(model.student.state_dict(), strict=True)


@pytest.mark.parametrize('data, kept', [
    ('mmsinger.NYUMatDataset', ['mmsinger', 'json']),
    ('CustomDataset', ['json'])])
def test_the_plain_student_config_keeps_what_its_data_need(data, kept):
    cfg = Config(dict(
        model=dict(type='mmsinger.FitNetDistiller',
                   student=dict(type='ImageClassifier')),
        train_dataloader=dict(dataset=dict(type=data)),
        default_hooks=dict(
            checkpoint=dict(type='mmsinger.SafeCheckpointHook'),
            timer=dict(type='IterTimerHook')),
        custom_imports=dict(imports=['mmsinger', 'json'])))
    plain = student_config(cfg)
    assert plain.custom_imports.imports == kept
    assert list(plain.default_hooks) == ['timer']
