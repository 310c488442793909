"""Every recipe parses, builds at full size, and takes a step when cut."""
import ast
import functools
import glob
import os
import re

import pytest
import torch
from mmengine.registry import init_default_scope

import samples
import tiny
from mmsinger.engine.prepare import load_config
from mmsinger.models.distillers import (FitNetDistiller, LogitKDDistiller,
                                        SiNGERDistiller, ViTKDDistiller)
from mmsinger.models.distillers.base import build_teacher
from mmsinger.models.teachers.frozen import FrozenClassifier, Normalisation
from mmsinger.registry import MODELS

CONFIGS = os.path.join(tiny.ROOT, 'configs')
# By task: datasets in their recipes' names
FOLDERS = {'classification': ('in1k', 'in1k-tenth'),
           'segmentation': ('ade20k', ), 'depth': ('nyu', )}
RECIPES = sorted(path for folder in FOLDERS
                 for path in glob.glob(os.path.join(CONFIGS, folder, '*.py')))
OFFICIAL = os.path.join(CONFIGS, 'classification',
                        'singer-official_vitl_to_vits_8xb64_in1k.py')
SHORT = os.path.join(CONFIGS, 'singer_vitl_to_vits_ade20k.py')
TEACHERS = sorted(glob.glob(os.path.join(CONFIGS, '_base_', 'teachers',
                                         '*.py')))
FEATURE_TEACHERS = [path for path in TEACHERS if '_cls' not in path]
CLASSIFIERS = [path for path in TEACHERS if '_cls' in path]
PAIRS = ['vitl_to_vits', 'vitl_to_vitt', 'deit3l_to_deit3b',
         'deit3s_to_deit3t', 'dinov2l_to_vits']
LOSSES = {
    'fitnet': {'distill.loss_kd'},
    'robust': {'distill.loss_kd'},
    'singer': {'distill.loss_kd', 'distill.loss_outlier',
               'distill.loss_info'},
    'vitkd': {'distill.loss_mimic', 'distill.loss_generate'},
    'logit_kd': {'distill.loss_kd'},
}
DISTILLERS = {'fitnet': FitNetDistiller, 'robust': FitNetDistiller,
              'singer': SiNGERDistiller,
              'vitkd': ViTKDDistiller, 'logit_kd': LogitKDDistiller}
# By teacher: depth, width, millions of parameters, blocks distilled
TEACHER_FACTS = {
    'vitl': (24, 1024, 303, [17, 23]),
    'deit3l': (24, 1024, 304, [17, 23]),
    'deit3s': (12, 384, 22, [8, 11]),
    'dinov2l': (24, 1024, 304, [17, 23]),
}
STUDENT_MILLIONS = {'vits': 22, 'vitt': 5.5, 'deit3b': 86, 'deit3t': 5.5,
                    'r50': 23.5, 'convnextt': 27.8, 'segformerb0': 3.3,
                    'swint': 27.5}
# Four stages instead of twelve blocks
PYRAMIDS = ('r50', 'convnextt', 'segformerb0', 'swint')

NARROW = dict(_delete_=True, embed_dims=32, num_layers=24, num_heads=4,
              feedforward_channels=64)
STUDENT_CUT = {
    'mmseg': {
        'model.student.backbone.img_size': (64, 64),
        'model.student.backbone.embed_dims': 48,
        'model.student.neck.in_channels': [48] * 4,
        'model.student.neck.out_channels': 48,
        'model.student.decode_head.in_channels': [48] * 4,
        'model.student.data_preprocessor.size': (64, 64),
    },
    'mmpretrain': {
        'model.student.backbone.img_size': 64,
        'model.student.backbone.arch': dict(
            _delete_=True, embed_dims=48, num_layers=12, num_heads=4,
            feedforward_channels=96),
    },
}
HEAD_CUT = {
    'UPerHead': {
        'model.student.decode_head.channels': 32,
        'model.student.auxiliary_head.in_channels': 48,
        'model.student.auxiliary_head.channels': 32,
    },
    'VPDDepthHead': {
        'model.student.decode_head.embed_dim': 16,
        'model.student.decode_head.feature_dim': 128,
    },
}

PYRAMID_CUT = {
    'r50': {'model.student.backbone.depth': 18},
    'convnextt': {'model.student.backbone.arch': 'atto'},
    **{student: {'model.student.data_preprocessor.size': (64, 64)}
       for student in ('segformerb0', 'swint')},
}


def name_of(path):
    return os.path.splitext(os.path.basename(path))[0]


def words_of(path):
    """Method, teacher, student, GPUs, images on each and data, from a
    recipe's name."""
    return re.fullmatch(
        r'([a-z_-]+)_([a-z0-9]+)_to_([a-z0-9]+)_(\d+)xb(\d+)_([a-z0-9-]+)',
        name_of(path)).groups()


def parts_of(path):
    """Method, teacher, student and data set, without variants of these."""
    method, teacher, student, _, _, data = words_of(path)
    return method.split('-')[0], teacher, student, data.split('-')[0]


def recipes(*methods):
    return [path for path in RECIPES if parts_of(path)[0] in methods]


def load(path, options=None):
    cfg = load_config(path, options)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return cfg


def test_all_pairs_and_tasks_are_there():
    there = {(method, f'{teacher}_to_{student}', data) for
             method, teacher, student, _, _, data in map(words_of, RECIPES)}
    wanted = {(method, pair, 'in1k')
              for method in (*LOSSES, 'none') for pair in PAIRS
              if method != 'robust'}
    # DINOv2 has no classifier, and its student is that of vitl_to_vits
    wanted -= {(method, 'dinov2l_to_vits', 'in1k')
               for method in ('logit_kd', 'none')}
    wanted |= {('singer', pair, 'in1k')
               for pair in ('vitl_to_r50', 'vitl_to_convnextt')}
    wanted |= {(method, 'vitl_to_vits', data)
               for method in ('fitnet', 'singer') for data in ('ade20k', 'nyu')}
    wanted |= {('robust', 'vitl_to_vits', data) for data in ('in1k', 'ade20k')}
    wanted |= {('robust', 'dinov2l_to_vits', 'in1k'),
               ('singer-official', 'vitl_to_vits', 'in1k'),
               ('singer', 'vitl_to_vitt', 'in1k-tenth'),
               ('singer', 'dinov2l_to_segformerb0', 'ade20k'),
               ('singer', 'dinov2l_to_swint', 'ade20k')}
    assert there == wanted


@pytest.mark.parametrize('path', RECIPES, ids=name_of)
def test_names_are_true(path):
    folder = os.path.basename(os.path.dirname(path))
    method, _, _, gpus, images, data = words_of(path)
    assert data in FOLDERS[folder]
    cfg = load(path)
    assert cfg.train_dataloader.batch_size == int(images)
    assert cfg.auto_scale_lr.base_batch_size == int(gpus) * int(images)
    base = f"'../_base_/distillers/{method.replace('-', '_')}.py'"
    with open(path) as file:
        assert method == 'none' or base in file.read()


@pytest.mark.parametrize('folder', FOLDERS)
def test_each_recipe_stands_in_its_folders_table(folder):
    with open(os.path.join(CONFIGS, folder, 'README.md')) as file:
        text = file.read()
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in text.splitlines() if line.startswith('| [')]
    found = {name_of(path): words_of(path) for path in RECIPES
             if os.path.dirname(path).endswith(folder)}
    assert sorted(row[0] for row in rows) == sorted(
        f'[{name}]({name}.py)' for name in found)
    titles = {}  # of a teacher or student: one, whatever the recipe
    for link, *cells in rows:
        _, teacher, student, gpus, images, _ = found[link[1:link.index(']')]]
        assert cells[3] == f'{gpus} x {images}'
        if cells[0] != '-':
            assert titles.setdefault(teacher, cells[0]) == cells[0]
        assert titles.setdefault(student, cells[1]) == cells[1]
    assert len(set(titles.values())) == len(titles)
    for command in re.findall(r'configs/\S+\.py', text):
        assert os.path.isfile(os.path.join(tiny.ROOT, command))


def test_short_name_of_the_readmes_recipe():
    cfg, recipe = load(SHORT), load(os.path.join(
        CONFIGS, 'segmentation', 'singer_vitl_to_vits_1xb16_ade20k.py'))
    cfg.pop('work_dir'), recipe.pop('work_dir')
    assert cfg.to_dict() == recipe.to_dict()


@pytest.mark.parametrize('path', RECIPES, ids=name_of)
def test_recipe_is_short(path):
    with open(path) as file:
        lines = file.read().splitlines()
    assert len(lines) <= 25
    assert lines[0].startswith('#')


def body(path):
    """A recipe without its comment and its ``_base_``."""
    with open(path) as file:
        tree = ast.parse(file.read())
    assert tree.body[0].targets[0].id == '_base_'
    return [ast.dump(node) for node in tree.body[1:]]


@pytest.mark.parametrize('task', ['in1k', 'ade20k', 'nyu'])
def test_siblings_differ_in_their_bases_alone(task):
    for methods in (LOSSES, ['none']):
        bodies = [body(path) for path in recipes(*methods)
                  if parts_of(path)[3] == task]
        assert all(other == bodies[0] for other in bodies[1:])
    assert len([path for path in recipes(*LOSSES)
                if parts_of(path)[3] == task]) > 1


@pytest.mark.parametrize(
    'path', recipes('fitnet', 'robust', 'singer', 'vitkd'), ids=name_of)
def test_feature_recipe_builds_at_full_size(path, monkeypatch):
    cfg = load(path)
    method, teacher, student, _ = parts_of(path)
    # mmseg's ViT calls item() on a linspace, which a meta tensor has not
    monkeypatch.setattr(torch, 'linspace', functools.partial(
        torch.linspace, device='cpu'))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model) is DISTILLERS[method]
    depth, dim, millions, layers = TEACHER_FACTS[teacher]
    assert len(model.teacher.blocks) == depth
    assert model.teacher.blocks.dim == dim
    assert count(model.teacher) == pytest.approx(millions, rel=0.03)
    if method == 'vitkd':
        assert model.layers == [0, 1, depth - 1]
        assert model.student_layers == [0, 1, 11]
        assert (model.mimic_weight, model.generate_weight) == (3e-5, 3e-6)
    else:
        assert model.layers == layers
        assert model.student_layers == (
            [2, 3] if student in PYRAMIDS else [8, 11])
    assert count(model.student_backbone) == pytest.approx(
        STUDENT_MILLIONS[student], rel=0.06)
    assert model.student_backbone is not model.student


@pytest.mark.parametrize('path', recipes('logit_kd'), ids=name_of)
def test_logit_recipe_builds_at_full_size(path):
    cfg = load(path)
    _, teacher, student, _ = parts_of(path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model) is LogitKDDistiller
    depth, dim, millions, _ = TEACHER_FACTS[teacher]
    backbone = model.teacher.model.backbone
    assert (len(backbone.layers), backbone.embed_dims) == (depth, dim)
    assert count(model.teacher) == pytest.approx(millions, rel=0.03)
    assert count(model.student_backbone) == pytest.approx(
        STUDENT_MILLIONS[student], rel=0.06)
    assert cfg.val_evaluator.type == 'Accuracy'


@pytest.mark.parametrize('path', recipes('none'), ids=name_of)
def test_plain_recipe_is_the_student_of_its_pair(path):
    """… with the head that logit distillation gives it, and no more."""
    cfg = load(path)
    sibling = load(path.replace('none_', 'logit_kd_'))
    assert cfg.model == sibling.model.student
    for key in ('train_dataloader', 'val_dataloader', 'optim_wrapper',
                'param_scheduler', 'train_cfg'):
        assert cfg[key] == sibling[key], key
    assert cfg.model.backbone == load(path.replace(
        'none_', 'singer_')).model.student.backbone
    cfg.merge_from_dict({
        'model.backbone.img_size': 64, 'model.head.in_channels': 48,
        'model.backbone.arch': dict(NARROW, embed_dims=48, num_layers=2)})
    model = MODELS.build(cfg.model).train()
    data = model.data_preprocessor(samples.batch(cfg), True)
    losses = model(**data, mode='loss')
    assert torch.isfinite(losses['loss'])


def count(model):
    """Millions of parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def cut(path):
    """A recipe with its models cut through options; depth and layers
    stay."""
    plain = load_config(path)
    method, teacher, student, _ = parts_of(path)
    part = 'model.teacher'
    options = {}
    if method == 'logit_kd':
        part = 'model.teacher.model'
        options = {f'{part}.head.in_channels': 32,
                   f'{part}.backbone.img_size': 64,
                   'model.teacher.input_size': 64,
                   'model.student.head.in_channels': 48}
    options = {
        **options,
        f'{part}.backbone.arch': dict(
            NARROW, num_layers=TEACHER_FACTS[teacher][0]),
        'model.teacher.checkpoint': None,
        **PYRAMID_CUT.get(student, STUDENT_CUT[plain.default_scope])}
    if method == 'singer':
        options['model.adapter.rank'] = 8
    head = plain.model.student.get('decode_head')
    if head is not None and student not in PYRAMIDS:
        options.update(HEAD_CUT[head.type])
    return load(path, options)


@pytest.mark.parametrize('path', recipes(*LOSSES), ids=name_of)
def test_recipe_takes_a_step(path):
    cfg = cut(path)
    with_task = cfg.model.get('task_loss_weight', 1) > 0
    model = samples.build(cfg)
    losses, moved, optimizer = samples.one_step(model, cfg)
    distilled = {name for name in losses if name.startswith('distill.')}
    assert distilled == LOSSES[parts_of(path)[0]]
    own = {name for name in losses
           if 'loss' in name and name not in distilled} - {'loss'}
    assert bool(own) == with_task
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert {'student'} | ({'projectors'} if hasattr(model, 'projectors')
                          else set()) <= set(moved)
    assert all(moved[part] > 0 for part in moved)
    if not hasattr(model, 'adapters'):
        return
    base = cfg.optim_wrapper.optimizer.lr
    factor = cfg.optim_wrapper.paramwise_cfg.custom_keys.adapters.lr_mult
    rates = {id(p): group['lr'] for group in optimizer.param_groups
             for p in group['params']}
    for parameter in model.adapters.parameters():
        assert rates[id(parameter)] == pytest.approx(base * factor)


def test_ade20k_recipe_has_the_papers_method():
    model = load(SHORT).model
    assert model.teacher.layers == (17, 23)
    assert (model.adapter.rank, model.adapter.init) == (16, 'nullspace')
    assert (model.loss_outlier.quantile, model.loss_outlier.loss_weight) == \
        (0.95, 0.01)
    assert model.loss_info.loss_weight == 1.0


@pytest.mark.parametrize(
    'path', [path for path in recipes(*LOSSES)
             if words_of(path)[-1] == 'in1k'], ids=name_of)
def test_pretraining_is_the_papers(path):
    cfg = load(path)
    check_pretraining(cfg)
    assert cfg.model.task_loss_weight == 0


def check_pretraining(cfg):
    assert cfg.train_cfg.max_epochs == 100
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == \
        ('AdamW', 1e-3, 1e-4)
    assert cfg.optim_wrapper.clip_grad.max_norm > 0
    warmup, cosine = cfg.param_scheduler
    assert (warmup.type, warmup.end) == ('LinearLR', 5)
    assert (cosine.type, cosine.begin, cosine.end, cosine.eta_min) == \
        ('CosineAnnealingLR', 5, 100, 1e-7)
    assert cfg.auto_scale_lr.base_batch_size == 512
    assert cfg.train_dataloader.dataset.type == 'ImageNet'


def test_official_preset():
    cfg = cut(OFFICIAL)
    check_pretraining(cfg)
    model = MODELS.build(cfg.model)
    assert model.refinement.adapter_cfg['selection'] == 'threshold'
    assert model.refinement.adapter_cfg['threshold'] == 0.05
    assert model.loss_outlier.quantile == 0.97
    assert model.loss_outlier.loss_weight == 0.01
    assert model.loss_kd.loss_weight == 1.0
    assert model.loss_info.loss_weight == 1.0
    assert (model.loss_info.intermediate, model.loss_info.last) == \
        ('mse', 'previous')
    assert model.task_loss_weight == 0
    assert model.refinement.last_layer == 23
    assert model.student_layers == [8, 11]
    assert model.tapped_teacher_layers == [17, 18, 23]


def test_official_preset_has_the_official_rank():
    cfg = load(OFFICIAL)
    assert cfg.model.adapter.rank == 64
    assert cfg.model.layer_map == 'official'


@pytest.mark.parametrize('path', FEATURE_TEACHERS, ids=name_of)
def test_teacher_base_builds_and_runs(path):
    init_default_scope('mmseg')  # its types must name their scope
    cfg = load_config(path)
    assert cfg.teacher.checkpoint
    with torch.device('meta'):
        full = build_teacher(cfg.teacher)
    depth = len(full.blocks)
    backbone = cfg.teacher.backbone
    if backbone.type == 'mmsinger.PlantedArtifacts':
        backbone = backbone.backbone
    if backbone.type.endswith('TIMMBackbone'):
        backbone.update(embed_dim=32, num_heads=4)
    else:
        if 'conv_type' not in backbone.get('patch_cfg', {}):
            backbone.img_size = 4 * backbone.patch_size
        backbone.arch = dict(NARROW, num_layers=depth)
    cfg.teacher.checkpoint = None
    teacher = build_teacher(cfg.teacher)
    assert len(teacher.blocks) == depth
    layers = [depth // 2, depth - 1]
    taps = teacher(torch.randn(2, 3, 56, 56), layers,
                   Normalisation(None, None))
    for layer in layers:
        values, grid, *_ = taps.tokens(layer)
        assert values.shape == (2, 1 + grid[0] * grid[1], 32)
        assert torch.isfinite(values).all()
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize('path', CLASSIFIERS, ids=name_of)
def test_classifier_base_builds_and_runs(path):
    init_default_scope('mmpretrain')
    cfg = load_config(path)
    assert cfg.teacher.checkpoint
    cfg.merge_from_dict({
        'teacher.model.backbone.arch': dict(NARROW, num_layers=2),
        'teacher.model.head.in_channels': 32})
    cfg.teacher.update(checkpoint=None, input_size=64)
    cfg.teacher.model.backbone.img_size = 64
    teacher = build_teacher(cfg.teacher, FrozenClassifier)
    logits = teacher(torch.randn(2, 3, 32, 32), Normalisation(None, None))
    assert logits.shape == (2, 1000)
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())


def test_both_planted_digit_teachers_are_one():
    """To distil from, and with the head whose own predictions are tested."""
    distilled = load_config(os.path.join(
        CONFIGS, '_base_', 'teachers', 'digits_planted.py'))
    tested = load_config(os.path.join(CONFIGS, 'digits', 'planted_teacher.py'))
    ours, theirs = (dict(cfg) for cfg in (
        distilled.teacher.backbone, tested.model.backbone))
    for backbone in (ours, theirs):
        backbone.pop('backbone')
    assert ours == theirs
