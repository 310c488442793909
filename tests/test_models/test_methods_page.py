"""The examples of docs/methods.md run as they stand there."""
import os
import re

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.models.features import anatomy
from mmsinger.models.features.anatomy import find_blocks
from mmsinger.registry import MODELS
from tiny import ROOT, vit


def blocks():
    """The fenced Python blocks of the page."""
    with open(os.path.join(ROOT, 'docs', 'methods.md')) as file:
        return re.findall(r'^```python\n(.*?)^```', file.read(),
                          re.DOTALL | re.MULTILINE)


CONFIGS = [block for block in blocks() if '_base_' in block]
CODE = [block for block in blocks() if '_base_' not in block]


@pytest.fixture(scope='module', autouse=True)
def examples():
    """Everything that the blocks define, by name, until the tests here are
    over."""
    registered = dict(MODELS.module_dict)
    names = {key: list(value) for key, value in anatomy.NAMES.items()}
    defined = {}
    for block in CODE:
        exec(compile(block, 'docs/methods.md', 'exec'), defined)
    yield defined
    for key in MODELS.module_dict.keys() - registered:
        del MODELS.module_dict[key]
    anatomy.NAMES.update(names)


def distiller(type='FitNetDistiller', teacher=None, **kwargs):
    torch.manual_seed(0)
    model = MODELS.build(dict(
        type=f'mmsinger.{type}', student=vit(), task_loss_weight=0,
        teacher=teacher or dict(backbone=vit(), layers=(1, 3)), **kwargs))
    model.init_weights()
    return model.train()


def images():
    return torch.randn(2, 3, 32, 32,
                       generator=torch.Generator().manual_seed(1))


def step(model):
    """The losses; every trained parameter gets a gradient."""
    losses = model.loss(images(), None)
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters()
                if p.requires_grad and p.grad is None]
    assert all(torch.isfinite(value) for value in losses.values())
    return {key: value.item() for key, value in losses.items()}


def length(block):
    """Lines of a block that are neither blank nor imports."""
    return len([line for line in block.splitlines()
                if line and not line.startswith(('from', 'import'))])


def test_all_blocks_are_known():
    """A new one on the page wants a test here."""
    assert len(CONFIGS) == 2 and len(CODE) == 4
    assert [length(block) for block in CODE] == pytest.approx(
        [15, 20, 15, 5], abs=10)


def test_loss():
    model = distiller(loss_kd=dict(type='mmsinger.FeatureL1Loss',
                                   loss_weight=2.))
    model.eval()
    found = step(model)['distill.loss_kd']
    targets, _ = model.make_targets(model.run_teacher(images()))
    expected = 0.
    for layer, student in model.student_tokens(images()).items():
        pred = model.projectors[str(layer)](student.values)
        expected += 2 * (pred - targets[layer].values).abs().mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


REFINE = dict(type='mmsinger.Refine', adapter=dict(rank=4))


@pytest.mark.parametrize('targets', [[], [REFINE]], ids=['plain', 'refined'])
def test_method(targets):
    model = distiller('RelationDistiller', relation_weight=3.,
                      targets=targets)
    losses = step(model)
    assert list(losses)[:2] == ['distill.loss_kd', 'distill.loss_relation']
    assert len(losses) == (4 if targets else 2)
    assert losses['distill.loss_relation'] > 0
    model.relation_weight = 1.
    assert model.loss(images(), None)['distill.loss_relation'].item() == \
        pytest.approx(losses['distill.loss_relation'] / 3, rel=1e-4)
    assert 'StudentCheckpointHook' in model.required_hooks


def test_keys_of_an_own_method_are_checked():
    with pytest.raises(ConfigError, match="model.relation_wieght.*Did you "
                       "mean 'relation_weight'"):
        distiller('RelationDistiller', relation_wieght=3.)


def test_target_step():
    model = distiller(targets=[
        dict(type='mmsinger.MaskBorder', width=1), REFINE])
    assert 'distill.loss_info' in step(model)
    targets, _ = model.make_targets(model.run_teacher(images()))
    weight = targets[3].patch_weight.unflatten(1, (4, 4))
    assert weight[:, 1:3, 1:3].all() and weight.sum() == 2 * 4
    assert (targets[3].weight[:, 0] == 1).all()  # CLS


def test_keys_of_an_own_step_are_checked():
    with pytest.raises(ConfigError, match="model.targets.0.wdith.*Did you mean "
                       "'width'"):
        distiller(targets=[dict(type='mmsinger.MaskBorder', wdith=1)])


def test_backbone_with_other_names():
    backbone = dict(type='mmsinger.TorchvisionViT', image_size=32,
                    patch_size=8, num_layers=4, num_heads=4, hidden_dim=32,
                    mlp_dim=64)
    found = find_blocks(MODELS.build(backbone), 'teacher')
    assert found.path == 'encoder.layers' and len(found) == 4
    assert (found.dim, found.in_channels, found.stride) == (32, 3, (8, 8))
    model = distiller('SiNGERDistiller', teacher=dict(
        backbone=backbone, layers=('encoder.layers.1', -1)),
        adapter=dict(rank=4, fold_norm=True))
    assert model.layers == [1, 3]
    losses = step(model)
    assert losses['distill.loss_info'] >= 0
    tokens = model.run_teacher(images()).tokens(3)
    assert tokens.grid == (4, 4) and tokens.num_prefix == 1


@pytest.mark.parametrize('block', CONFIGS, ids=['vitkd', 'targets'])
def test_configs(block, tmp_path):
    """As files beside the recipes, with models of a test's size."""
    path = tmp_path / 'mine.py'
    path.write_text(block.replace(
        "'./", f"'{os.path.join(ROOT, 'configs')}/"))
    cfg = load_config(str(path))
    init_default_scope(cfg.default_scope)
    model_cfg = cfg.model
    model_cfg.teacher = dict(backbone=vit(), layers=(1, 3))
    model_cfg.student.backbone = vit()
    model = MODELS.build(model_cfg)
    model.init_weights()
    if model.needs_calibration:
        model.calibrate([images()])
    losses = list(step(model.train()))
    if 'ViTKD' in model_cfg.type:
        assert losses == ['distill.loss_mimic', 'distill.loss_generate']
        assert model.layers == [0, 2, 3] and model.reduction == 'mean'
        assert model.mimic_weight == model.generate_weight == 1.
    else:
        assert losses == [f'distill.loss_{name}'
                          for name in ('kd', 'outlier', 'info')]
        assert [type(step).__name__ for step in model.steps] == [
            'MaskTokens', 'Refine']
        assert type(model.loss_kd).__name__ == 'FeatureSmoothL1Loss'
        keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
        assert keys.adapters == dict(lr_mult=0.1)
