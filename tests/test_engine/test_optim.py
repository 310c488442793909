"""The toolboxes' own optimizer constructors see the student as a plain model;
settings without effect are said."""
import copy

import pytest
import tiny
import torch
from mmengine.config import ConfigDict
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope
from torch import nn

from mmsinger.engine import optim
from mmsinger.engine.optim import check_custom_keys
from mmsinger.engine.prepare import load_config, use_student_constructor
from mmsinger.errors import ConfigError
from mmsinger.export import student_config
from mmsinger.registry import MODELS

VIT = dict(arch=dict(embed_dims=24, num_layers=4, num_heads=2,
                     feedforward_channels=32), img_size=32, init_cfg=None)
HEADS = dict(decode_head=dict(channels=16), auxiliary_head=dict(channels=16))
SEG_VIT = dict(
    pretrained=None, neck=dict(embed_dim=24),
    backbone=dict(embed_dims=24, num_layers=4, num_heads=2, img_size=(32, 32),
                  out_indices=[0, 1, 2, 3]),
    decode_head=dict(in_channels=[24] * 4, channels=16, num_classes=3),
    auxiliary_head=dict(in_channels=24, channels=16, num_classes=3))
STOCK = {
    'mae': ('mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k',
            dict(backbone=VIT, head=dict(in_channels=24))),
    'beit': ('mmpretrain::beit/benchmarks/beit-base-p16_8xb128-coslr-100e_'
             'in1k', dict(backbone=VIT, head=dict(in_channels=24))),
    'eva': ('mmpretrain::eva/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k',
            dict(backbone=VIT, head=dict(in_channels=24))),
    'swin': ('mmpretrain::simmim/benchmarks/swin-base-w6_8xb256-coslr-100e_'
             'in1k-192px', dict(
                 backbone=dict(arch=dict(
                     embed_dims=8, depths=[2, 2, 6, 2],
                     num_heads=[1, 2, 2, 2]), init_cfg=None),
                 head=dict(in_channels=64))),
    'convnext': ('mmpretrain::spark/benchmarks/convnextv2-tiny_8xb256-coslr-'
                 '300e_in1k', dict(backbone=dict(init_cfg=None))),
    'mmseg-mae': ('mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512',
                  SEG_VIT),
    'mmseg-beit': ('mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640',
                   SEG_VIT),
    'mmseg-convnext': ('mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_'
                       'ade20k-512x512',
                       dict(backbone=dict(init_cfg=None), **HEADS)),
}


class Distiller(nn.Module):
    """What an optimizer constructor sees of one."""

    student_backbone = property(lambda self: self.student.backbone)

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.projectors = nn.ModuleDict({'3': nn.Linear(2, 3)})
        self.adapters = nn.ModuleDict({'3': nn.Linear(3, 3, bias=False)})


def groups_of(model, settings, prefix=''):
    """Each parameter's learning rate, weight decay and scale, by name, in
    the optimizer's order."""
    settings = ConfigDict(copy.deepcopy(settings))
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type=settings.pop('constructor'),
        paramwise_cfg=settings.pop('paramwise_cfg'),
        optim_wrapper_cfg=settings))(model)
    names = {id(parameter): name.replace('module.', '', 1)
             for name, parameter in model.named_parameters()}
    return [([prefix + names[id(p)] for p in group['params']], group['lr'],
             group['weight_decay'], group.get('lr_scale'))
            for group in wrapper.optimizer.param_groups]


def stock(tmp_path, name):
    base, small = STOCK[name]
    path = tmp_path / 'stock.py'
    path.write_text(f"_base_ = ['{base}.py']\n")
    cfg = load_config(str(path))
    init_default_scope(cfg.default_scope)
    small = copy.deepcopy(small)
    arch = small['backbone'].pop('arch', None)
    cfg.merge_from_dict(dict(model=small))
    if arch is not None:
        cfg.model.backbone.arch = arch
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    return cfg


@pytest.mark.parametrize('name', STOCK)
def test_groups_of_the_student_are_the_plain_models(tmp_path, name):
    cfg = stock(tmp_path, name)
    student = MODELS.build(cfg.model)
    plain = groups_of(student, cfg.optim_wrapper, prefix='student.')
    assert len({rate for _, rate, *_ in plain}) > 3
    cfg.merge_from_dict({'optim_wrapper.paramwise_cfg.custom_keys': dict(
        adapters=dict(lr_mult=0.1), projectors=dict(lr_mult=10.))})
    before = copy.deepcopy(cfg)
    cfg.model = dict(type='mmsinger.SiNGERDistiller', student=cfg.model)
    use_student_constructor(cfg)
    groups = groups_of(Distiller(student), cfg.optim_wrapper)
    assert groups[:len(plain)] == plain
    lr = cfg.optim_wrapper.optimizer.lr
    assert [(names, rate) for names, rate, *_ in groups[len(plain):]] == [
        (['projectors.3.weight'], 10 * lr), (['projectors.3.bias'], 10 * lr),
        (['adapters.3.weight'], 0.1 * lr)]
    use_student_constructor(cfg)  # once is enough
    assert student_config(cfg).optim_wrapper == before.optim_wrapper


@pytest.mark.parametrize('settings', [
    dict(constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
         paramwise_cfg=dict(layer_decay_rate=0.5)),
    dict(constructor='mmseg.LearningRateDecayOptimizerConstructor',
         paramwise_cfg=dict(decay_rate=0.5, decay_type='stage_wise',
                            num_layers=2)),
    dict(constructor='mmseg.LayerDecayOptimizerConstructor',
         paramwise_cfg=dict(layer_decay_rate=0.5, num_layers=2))],
    ids=['mmpretrain', 'mmseg', 'mmseg-old'])
def test_a_toolbox_of_its_own_is_told_what_to_do(settings):
    """Under a host's own train.py nothing has prepared the config."""
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.optim_wrapper.update(settings)
    init_default_scope('mmseg')
    cfg.model.teacher.checkpoint = None
    with pytest.raises(ConfigError, match='StudentFirstConstructor'):
        groups_of(MODELS.build(cfg.model), cfg.optim_wrapper)


def test_in_a_wrapper_for_several_processes(tmp_path):
    cfg = stock(tmp_path, 'mae')
    student = MODELS.build(cfg.model)
    cfg.model = dict(type='mmsinger.SiNGERDistiller', student=cfg.model)
    use_student_constructor(cfg)
    alone = Distiller(student)
    expected = groups_of(alone, cfg.optim_wrapper)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = MMDistributedDataParallel(alone)
        assert groups_of(wrapped, cfg.optim_wrapper) == expected
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('settings', [
    dict(constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
         paramwise_cfg=dict(layer_decay_rate=0.5)),
    dict(constructor='mmseg.LayerDecayOptimizerConstructor',
         paramwise_cfg=dict(num_layers=2, layer_decay_rate=0.5))],
    ids=['mmpretrain', 'mmseg'])
def test_a_backbone_that_the_constructor_does_not_know(settings):
    cfg = load_config(tiny.SEG_CONFIG)
    init_default_scope('mmseg')
    cfg.optim_wrapper.update(settings)
    use_student_constructor(cfg)
    cfg.model.student.backbone.init_cfg = None
    cfg.model.student.pretrained = None
    groups = groups_of(Distiller(MODELS.build(cfg.model.student)),
                       cfg.optim_wrapper)
    scale = {name: scale for names, _, _, scale in groups for name in names}
    assert scale['student.backbone.patch_embed.projection.weight'] == 0.125
    assert scale['student.backbone.layers.0.ln1.weight'] == 0.25
    assert scale['student.backbone.layers.1.ln1.weight'] == 0.5
    assert scale['student.decode_head.conv_seg.weight'] == 1
    assert scale['projectors.3.weight'] is None


def test_parameters_of_the_distiller_itself(tmp_path):
    cfg = stock(tmp_path, 'mae')
    model = Distiller(MODELS.build(cfg.model))
    model.temperature = nn.Parameter(torch.ones(()))
    cfg.model = dict(type='mmsinger.SiNGERDistiller', student=cfg.model)
    use_student_constructor(cfg)
    groups = groups_of(model, cfg.optim_wrapper)
    assert sum(names == ['temperature'] for names, *_ in groups) == 1


@pytest.mark.parametrize('given, warned', [(2, False), (12, True)])
def test_another_number_of_layers_than_the_student_has(given, warned,
                                                       monkeypatch):
    said = []
    monkeypatch.setattr(optim, 'print_log',
                        lambda text, **kwargs: said.append(text))
    cfg = load_config(tiny.SEG_CONFIG)
    init_default_scope('mmseg')
    cfg.optim_wrapper.update(
        constructor='mmseg.LayerDecayOptimizerConstructor',
        paramwise_cfg=dict(num_layers=given, layer_decay_rate=0.5))
    use_student_constructor(cfg)
    cfg.model.student.backbone.init_cfg = None
    cfg.model.student.pretrained = None
    groups_of(Distiller(MODELS.build(cfg.model.student)), cfg.optim_wrapper)
    assert warned == any(f'num_layers={given}, but the student' in text
                         and 'Set num_layers=2.' in text for text in said)


def test_a_backbone_without_blocks(tmp_path):
    cfg = stock(tmp_path, 'mmseg-convnext')
    cfg.model.backbone = dict(type='ResNetV1c', depth=18)
    cfg.model.decode_head.in_channels = [64, 128, 256, 512]
    cfg.model.auxiliary_head.in_channels = 256
    student = MODELS.build(cfg.model)
    cfg.model = dict(type='mmsinger.SiNGERDistiller', student=cfg.model)
    use_student_constructor(cfg)
    with pytest.raises(ConfigError, match='does not know a ResNetV1c'):
        groups_of(Distiller(student), cfg.optim_wrapper)


def test_a_key_with_the_students_name():
    """As it is called without a constructor of its own."""
    student = nn.ModuleDict({'backbone': nn.Linear(1, 1)})
    build = optim.StudentFirstConstructor(
        dict(optimizer=dict(type='SGD', lr=1.)), dict(
            student_constructor='DefaultOptimWrapperConstructor',
            custom_keys={'student.backbone': dict(lr_mult=0.5),
                         'adapters': dict(lr_mult=0.1)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, 'student_backbone', student['backbone'])
        groups = build(Distiller(student)).optimizer.param_groups
    assert [group['lr'] for group in groups] == [0.5, 0.5, 1., 1., 0.1]


def test_keys_without_effect(monkeypatch):
    said = []
    monkeypatch.setattr(optim, 'print_log',
                        lambda text, **kwargs: said.append(text))
    model = nn.ModuleDict({'adapters': nn.Linear(1, 1)})
    check_custom_keys(model, {
        'norm': dict(), '.weight': dict(), 'adapters': dict()})
    assert len(said) == 1 and "'norm' are in the name of no" in said[0]
    check_custom_keys(model, {'.adapters': dict(), 'adapters.w': dict()})
    assert len(said) == 2 and "'.adapters' are in the name of no" in said[1]
    check_custom_keys(nn.ModuleDict(), {'adapters': dict()})
    assert len(said) == 2  # FitNet on SiNGER's schedule
    with pytest.raises(ConfigError, match="'adaptors'.*Did you mean 'adapt"):
        check_custom_keys(model, {'adaptors': dict()})
