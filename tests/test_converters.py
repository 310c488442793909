"""Converted checkpoints against the libraries that they come from."""
import argparse
import hashlib
import math
import os
import re

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import init_default_scope
from safetensors.torch import save_file

import forked
import tiny
from mmsinger.checkpoint import load_checkpoint
from mmsinger.converters import convert, convert_checkpoint, detect
from mmsinger.converters.positions import resample, split_positions
from mmsinger.errors import ConfigError
from mmsinger.models import FrozenTeacher
from mmsinger.models.teachers.frozen import FrozenClassifier, Normalisation
from mmsinger.registry import MODELS

HEADS = 4
SMALL = dict(embed_dim=32, depth=2, num_heads=HEADS, num_classes=3)
# family of models -> timm's name, what to shrink, image size, arguments
MODELS_OF_TIMM = {
    'augreg-s': ('vit_small_patch16_224', dict(), 64, dict()),
    'augreg-l-384': ('vit_large_patch16_384', dict(), 96, dict()),
    'augreg-h14': ('vit_huge_patch14_224', dict(), 42, dict()),
    'deit3': ('deit3_small_patch16_224', dict(), 64, dict()),
    'clip-openai': ('vit_base_patch16_clip_quickgelu_224', dict(), 64,
                    dict(act='quickgelu')),
    'clip-laion': ('vit_base_patch16_clip_224', dict(), 64,
                   dict(act='gelu')),
    'dinov2': ('vit_small_patch14_dinov2', dict(), 70, dict()),
    'dinov2-reg': ('vit_small_patch14_reg4_dinov2', dict(), 70, dict()),
    'dinov2-giant': ('vit_giant_patch14_dinov2', dict(embed_dim=48), 70,
                     dict()),
    'dinov2-giant-reg': ('vit_giant_patch14_reg4_dinov2',
                         dict(embed_dim=48), 42, dict()),
    'no-qkv-bias': ('vit_small_patch16_224', dict(qkv_bias=False), 64,
                    dict()),
    'average-pool': ('vit_small_patch16_224', dict(global_pool='avg'), 64,
                     dict()),
    'grey': ('vit_small_patch16_224', dict(in_chans=1), 64, dict()),
}


def timm_model(case, img_size=None):
    """A small timm model of a family; no parameter is a special case."""
    name, kwargs, size, _ = MODELS_OF_TIMM[case]
    model = timm.create_model(
        name, **{**SMALL, **kwargs, 'img_size': img_size or size})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def resized(model, case, img_size):
    """The same timm model for another size, resampled by timm."""
    other = timm_model(case, img_size)
    weights = timm.models.vision_transformer.checkpoint_filter_fn(
        model.state_dict(), other)
    other.load_state_dict(weights)
    return other


def converted(weights, **kwargs):
    """The conversion, and the backbone built from its config."""
    kwargs.setdefault('num_heads', HEADS)
    result = convert(weights, **kwargs)
    return result, loaded(result)


def loaded(result):
    """The backbone of a conversion."""
    backbone = MODELS.build(dict(result.backbone))
    backbone.load_state_dict(result.weights)
    backbone.eval()
    return backbone


@torch.no_grad()
def assert_same_features(backbone, model, images):
    """All tokens: last block, and after the final norm."""
    blocks = {}
    for name, modules in (('ours', backbone.layers), ('timm', model.blocks)):
        modules[-1].register_forward_hook(
            lambda module, args, output, name=name: blocks.update(
                {name: output}))
    normed, = backbone(images)
    expected = model.forward_features(images)
    for ours, theirs in ((blocks['ours'], blocks['timm']),
                         (normed, expected)):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().clamp(min=1)
        assert (ours - theirs).abs().max() / scale < 1e-5


@pytest.mark.parametrize('case', MODELS_OF_TIMM)
def test_same_output_as_timm(case):
    model = timm_model(case)
    _, kwargs, size, args = MODELS_OF_TIMM[case]
    result, backbone = converted(model.state_dict(), **args)
    assert result.family == 'timm'
    assert result.backbone['img_size'] == size
    channels = kwargs.get('in_chans', 3)
    assert_same_features(backbone, model,
                         torch.randn(2, channels, size, size))


@pytest.mark.parametrize('case, size', [
    ('augreg-s', 128), ('augreg-l-384', 48), ('deit3', 96),
    ('clip-openai', 32), ('dinov2', 42), ('dinov2-reg', 112),
    ('augreg-s', (32, 80))])
def test_same_output_as_timm_at_another_size(case, size):
    model = timm_model(case)
    result, backbone = converted(model.state_dict(), img_size=size,
                                 **MODELS_OF_TIMM[case][3])
    assert result.backbone['img_size'] == size
    height, width = size if isinstance(size, tuple) else (size, size)
    assert_same_features(backbone, resized(model, case, size),
                         torch.randn(2, 3, height, width))


@pytest.mark.parametrize('size', [64, 96])
def test_model_without_class_token_needs_a_config(size):
    name = 'vit_large_patch16_siglip_gap_512'  # GELU in its tanh form
    model, other = (timm.create_model(
        name, **SMALL, img_size=s).eval() for s in (64, size))
    other.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(
        model.state_dict(), other))
    assert 'no class token' in message(model.state_dict())
    arch = dict(embed_dims=32, num_layers=2, num_heads=HEADS,
                feedforward_channels=128)
    _, backbone = converted(
        model.state_dict(), num_heads=None, img_size=size, backbone=dict(
            type='mmpretrain.VisionTransformer', arch=arch, patch_size=16,
            with_cls_token=False, out_type='raw', final_norm='norm.weight'
            in model.state_dict(), layer_cfgs=dict(
                act_cfg=dict(type='GELU', approximate='tanh'))))
    assert_same_features(backbone, other, torch.randn(2, 3, size, size))


# -- DINOv2, UNIC and SiNGER: their layouts, made from timm's models


def dinov2_layout(model, chunked=False):
    """The official names for the weights of one of timm's DINOv2 models."""
    weights = dict(model.state_dict())
    gated = hasattr(model.blocks[0].mlp, 'gate_last')
    official = {'mask_token': torch.randn(1, model.embed_dim)}
    for key, value in weights.items():
        if key.startswith('head.'):
            continue
        if gated:
            key = key.replace('mlp.fc1', 'mlp.w12').replace(
                'mlp.fc2', 'mlp.w3')
        if chunked:
            key = re.sub(r'^blocks\.', 'blocks.0.', key)
        official[key] = value
    if 'reg_token' in official:
        official['register_tokens'] = official.pop('reg_token')
        # timm has added the class token's position to it
        position = torch.randn(1, 1, model.embed_dim)
        official['cls_token'] = official['cls_token'] - position
        official['pos_embed'] = torch.cat(
            [position, official['pos_embed']], dim=1)
    return official


def unic_layout(model):
    """UNIC: a DINOv2 encoder without LayerScale, in one chunk, in DDP."""
    weights = {f'module.encoder.{key}': value for key, value in
               dinov2_layout(model, chunked=True).items()}
    for i in range(2):
        weights[f'module.lp.heads.dino.cls.{i}.layers.0.weight'] = \
            torch.randn(8, 32)
    return weights


def singer_layout(model):
    """The whole distiller of the official code, in DDP."""
    weights = {f'module.student.{key}': value
               for key, value in model.state_dict().items()}
    for key in ('teacher.cls_token', 'adapter_dict.adapter_001.fc1.weight',
                'singer_dict.017.W_d'):
        weights[f'module.{key}'] = torch.randn(4, 4)
    return weights


DINOV2 = [c for c in MODELS_OF_TIMM if c.startswith('dinov2')]


@pytest.mark.parametrize('chunked', [False, True])
@pytest.mark.parametrize('case', DINOV2)
def test_official_dinov2(case, chunked):
    model = timm_model(case)
    weights = dinov2_layout(model, chunked)
    result, backbone = converted(weights)
    assert result.family == 'dinov2'
    size = MODELS_OF_TIMM[case][2]
    assert_same_features(backbone, model, torch.randn(2, 3, size, size))
    dropped = [e.source for e in result.entries if not e.target]
    assert dropped == ['mask_token']
    # timm's own reader of that layout agrees
    again = timm.models.vision_transformer.checkpoint_filter_fn(
        dinov2_layout(model), model)
    for key, value in again.items():
        assert torch.allclose(value, model.state_dict()[key], atol=1e-6)


def test_registers_resample_as_in_timm():
    model = timm_model('dinov2-reg')
    _, backbone = converted(dinov2_layout(model), img_size=42)
    assert_same_features(backbone, resized(model, 'dinov2-reg', 42),
                         torch.randn(2, 3, 42, 42))


def cubic(distance):
    """The kernel of bicubic interpolation with a = -3/4."""
    x, a = abs(distance), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.


def bicubic_matrix(old, new, scale):
    """(new, old): interpolation of a row, its border repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        position = (i + 0.5) / scale - 0.5
        for j in range(math.floor(position) - 1, math.floor(position) + 3):
            matrix[i, min(max(j, 0), old - 1)] += cubic(position - j)
    return matrix


@pytest.mark.parametrize('family', ['dinov2', 'unic'])
@given(old=st.integers(2, 20), rows=st.integers(1, 24),
       columns=st.integers(1, 24))
def test_dinov2_interpolates_with_an_offset(family, old, rows, columns):
    if (rows, columns) == (old, old):
        rows += 1
    patches = torch.randn(1, old * old, 2)
    ours = resample(patches, (old, old), (rows, columns), family, False)
    along = [bicubic_matrix(old, new, (new + 0.1) / old)
             for new in (rows, columns)]
    expected = np.einsum('ij,jkc,lk->ilc', along[0],
                         patches[0].reshape(old, old, 2).numpy(), along[1])
    np.testing.assert_allclose(
        ours[0].reshape(rows, columns, 2).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize('layout, case', [
    (dinov2_layout, 'dinov2'), (unic_layout, 'augreg-s')])
def test_position_embeddings_of_dinov2_at_another_size(layout, case):
    weights = {k.replace('module.', ''): v
               for k, v in layout(timm_model(case)).items()}
    before, after = (convert(weights, num_heads=HEADS, img_size=size)
                     .weights['pos_embed'] for size in (None, 112))
    old, new = (math.isqrt(p.shape[1] - 1) for p in (before, after))
    matrix = bicubic_matrix(old, new, (new + 0.1) / old)
    expected = np.einsum('ij,jkc,lk->ilc', matrix, before[0, 1:].reshape(
        old, old, 32).numpy(), matrix)
    np.testing.assert_allclose(after[0, 1:].reshape(new, new, 32).numpy(),
                               expected, atol=1e-5)
    assert torch.equal(after[:, 0], before[:, 0])


def test_dinov2_and_timm_differ_where_resampled():
    patches = torch.randn(1, 25, 4)
    different = [resample(patches, (5, 5), (3, 3), family, registers)
                 for family, registers in (('timm', False),
                                           ('dinov2', False))]
    assert not torch.allclose(*different, atol=1e-2)
    assert torch.equal(
        resample(patches, (5, 5), (3, 3), 'dinov2', True), different[0])
    for family in ('timm', 'dinov2'):
        assert resample(patches, (5, 5), (5, 5), family, False) is patches


@given(side=st.integers(1, 40), prefix=st.sampled_from([0, 1]))
def test_class_token_and_grid_are_told_apart(side, prefix):
    if side * side + prefix == 1:
        prefix = 0
    pos = torch.zeros(1, side * side + prefix, 1)
    first, patches, grid = split_positions(pos, (0, 1))
    assert (first.shape[1], patches.shape[1]) == (prefix, side * side)
    assert grid == (side, side)


def test_unic_file_with_its_arguments(tmp_path):
    """Saved with the parsed arguments, a schedule and an optimizer."""
    model = timm_model('augreg-s')
    path = str(tmp_path / 'unic.pth')
    torch.save(dict(
        model=unic_layout(model), epoch=200, optimizer=dict(state={}),
        args=argparse.Namespace(arch='vit_large', lr_schedule=np.zeros(3)),
    ), path)
    out = str(tmp_path / 'out.pth')
    result = convert_checkpoint(path, out, num_heads=HEADS)
    assert result.family == 'unic'
    assert 'layer_scale_init_value' not in result.backbone
    dropped = {e.source: e.action for e in result.entries if not e.target}
    assert sorted(dropped) == [
        'encoder.mask_token', 'lp.heads.dino.cls.0.layers.0.weight',
        'lp.heads.dino.cls.1.layers.0.weight']
    assert "projectors to UNIC's teachers" in dropped[
        'lp.heads.dino.cls.0.layers.0.weight']
    assert_same_features(loaded(result), model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('case', ['augreg-s', 'deit3', 'dinov2'])
def test_singer_student(tmp_path, case):
    """The student alone (timm's layout, no extension), and the whole."""
    model = timm_model(case)
    size = MODELS_OF_TIMM[case][2]
    whole, student = tmp_path / 'best', tmp_path / 'student_best'
    torch.save(dict(model=singer_layout(model), epoch=100,
                    best_acc=np.float64(1.)), whole)
    torch.save(dict(model=model.state_dict()), student)
    for path, family in ((whole, 'auto'), (student, 'auto'),
                         (student, 'singer')):
        result = convert_checkpoint(str(path), str(tmp_path / 'out.pth'),
                                    family=family, num_heads=HEADS)
        assert result.family == (
            'singer' if path is whole or family == 'singer' else 'timm')
        assert_same_features(loaded(result), model,
                             torch.randn(1, 3, size, size))


# -- transformers

VIT_NAMES = [
    ('cls_token', 'embeddings.cls_token'),
    ('pos_embed', 'embeddings.position_embeddings'),
    ('reg_token', 'embeddings.register_tokens'),
    ('patch_embed.proj', 'embeddings.patch_embeddings.projection'),
    (r'blocks\.(\d+)', r'encoder.layer.\1'),
    ('attn.proj', 'attention.output.dense'),
    (r'^norm\.', 'layernorm.'),
    (r'attn\.q\b', 'attention.attention.query'),
    (r'attn\.k\b', 'attention.attention.key'),
    (r'attn\.v\b', 'attention.attention.value')]
CLIP_NAMES = [
    ('cls_token', 'embeddings.class_embedding'),
    ('pos_embed', 'embeddings.position_embedding.weight'),
    ('patch_embed.proj', 'embeddings.patch_embedding'),
    (r'blocks\.(\d+)', r'encoder.layers.\1'),
    (r'\bnorm_pre', 'pre_layrnorm'), (r'\.norm(\d)', r'.layer_norm\1'),
    (r'^norm\.', 'post_layernorm.'), ('attn.proj', 'self_attn.out_proj'),
    (r'attn\.([qkv])\b', r'self_attn.\1_proj')]
HF_NAMES = dict(
    hf_vit=VIT_NAMES + [
        ('norm1', 'layernorm_before'), ('norm2', 'layernorm_after'),
        ('mlp.fc1', 'intermediate.dense'), ('mlp.fc2', 'output.dense'),
        (r'^head\.', 'classifier.')],
    hf_dinov2=VIT_NAMES + [(r'ls(\d)\.gamma', r'layer_scale\1.lambda1')],
    hf_clip=CLIP_NAMES, hf_siglip=CLIP_NAMES)


def hf_layout(model, family, wrapper=''):
    """transformers' names for the weights of one of timm's models."""
    weights = {}
    if family == 'hf_dinov2':  # the layout is the same but for the names
        source = {k: v for k, v in dinov2_layout(model).items()
                  if k != 'mask_token'}
        weights[f'{wrapper}embeddings.mask_token'] = torch.randn(1, 32)
    else:
        source = dict(model.state_dict())
    for key, value in source.items():
        if key.startswith('head.') and family != 'hf_vit':
            continue
        parts = {key: value}
        if 'qkv' in key:
            parts = {key.replace('qkv', letter): part for letter, part in
                     zip('qkv', value.chunk(3))}
        for name, part in parts.items():
            for pattern, replacement in HF_NAMES[family]:
                name = re.sub(pattern, replacement, name)
            name = name.replace('mlp.w12', 'mlp.weights_in').replace(
                'mlp.w3', 'mlp.weights_out').replace(
                'register_tokens', 'embeddings.register_tokens').replace(
                'embeddings.embeddings.', 'embeddings.')
            if 'class_embedding' in name:
                part = part.flatten()
            elif 'position_embedding.' in name:
                part = part[0]
            outside = name.startswith('classifier.')
            weights[name if outside else wrapper + name] = part
    return weights


@pytest.mark.parametrize('family, case, wrapper', [
    ('hf_vit', 'augreg-s', ''), ('hf_vit', 'augreg-s', 'vit.'),
    ('hf_dinov2', 'dinov2', 'dinov2.'), ('hf_dinov2', 'dinov2-reg', ''),
    ('hf_dinov2', 'dinov2-giant', ''),
    ('hf_clip', 'clip-openai', 'vision_model.')])
def test_transformers(family, case, wrapper):
    model = timm_model(case)
    weights = hf_layout(model, family, wrapper)
    if family == 'hf_clip':  # of the whole of CLIP
        weights.update({'text_model.final_layer_norm.weight': torch.ones(3),
                        'logit_scale': torch.ones(())})
    result, backbone = converted(weights, **MODELS_OF_TIMM[case][3])
    assert result.family == family
    size = MODELS_OF_TIMM[case][2]
    assert_same_features(backbone, model, torch.randn(2, 3, size, size))
    joined = [e for e in result.entries if e.action == 'joined']
    assert len(joined) == 2 * 2 * 3 and {e.target for e in joined} == {
        f'layers.{i}.attn.qkv.{leaf}' for i in (0, 1)
        for leaf in ('weight', 'bias')}


def test_transformers_siglip():
    model = timm.create_model('vit_large_patch16_siglip_gap_512', **SMALL,
                              img_size=64).eval()
    weights = hf_layout(model, 'hf_siglip', 'vision_model.')
    weights['vision_model.head.probe'] = torch.randn(1, 1, 32)
    result, backbone = converted(weights)
    assert result.family == 'hf_siglip'
    images = torch.randn(2, 3, 64, 64)
    assert_same_features(backbone, model, images)


def test_transformers_with_damaged_attention():
    weights = hf_layout(timm_model('augreg-s'), 'hf_vit')
    query = 'encoder.layer.1.attention.attention.query.weight'
    text = message({**weights, query: torch.zeros(16, 32)})
    assert query in text and 'their shapes differ' in text
    del weights[query]
    del weights[query.replace('query', 'key')]
    assert 'layers.1.attn.qkv.weight' in message(weights)


def test_transformers_head():
    model = timm_model('augreg-s')
    result = convert(hf_layout(model, 'hf_vit', 'vit.'), num_heads=HEADS,
                     head=True)
    assert torch.equal(result.head['layers.head.weight'], model.head.weight)
    clip = hf_layout(timm_model('clip-openai'), 'hf_clip')
    said = message(clip, head=True, act='gelu')
    assert "family 'hf_clip'" in said


def test_transformers_resample_without_antialiasing():
    patches = torch.randn(1, 25, 4)
    expected = torch.nn.functional.interpolate(
        patches.transpose(1, 2).unflatten(2, (5, 5)), (3, 3), mode='bicubic')
    assert torch.equal(resample(patches, (5, 5), (3, 3), 'hf_vit', False),
                       expected.flatten(2).transpose(1, 2))


PUBLISHED = os.path.join(os.environ.get('MMSINGER_DINOV2_S14', ''),
                         'model.safetensors')


@pytest.mark.skipif(not os.path.isfile(PUBLISHED), reason='set '
                    'MMSINGER_DINOV2_S14 to the folder of the weights and '
                    'recorded.npz')
def test_published_dinov2_against_recorded_outputs():
    folder = os.path.dirname(PUBLISHED)
    recorded = np.load(os.path.join(folder, 'recorded.npz'))
    result = convert(load_checkpoint(PUBLISHED), img_size=224)
    backbone = loaded(result)
    outputs = {}
    for i in (8, 11):
        backbone.layers[i].register_forward_hook(
            lambda module, args, output, i=i: outputs.update({i: output}))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (
        [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    images = torch.from_numpy(recorded['images']).permute(0, 3, 1, 2)
    with torch.no_grad():
        backbone((images - mean) / std)
    for i, output in outputs.items():
        expected = torch.from_numpy(recorded[f'block_{i}']).float()
        assert (output - expected).norm() / expected.norm() < 2e-3


def test_dinov2_training_file(tmp_path):
    """Teacher and student, each with heads, blocks in chunks."""
    model = timm_model('dinov2')
    path, out = str(tmp_path / 'model.pth'), str(tmp_path / 'out.pth')
    half = {f'backbone.{k}': v
            for k, v in dinov2_layout(model, chunked=True).items()}
    half['dino_head.mlp.0.weight'] = torch.randn(4, 4)
    torch.save(dict(teacher=half, student=dict(half), iteration=3), path)
    with pytest.raises(ConfigError, match="'teacher', 'student'.*--key"):
        convert_checkpoint(path, out)
    with pytest.raises(ConfigError, match="Did you mean 'teacher'"):
        convert_checkpoint(path, out, key='techer')
    flat = str(tmp_path / 'flat.pth')
    torch.save(half, flat)
    with pytest.raises(ConfigError, match='under no key. Leave --key out'):
        convert_checkpoint(flat, out, key='teacher')
    result = convert_checkpoint(path, out, key='teacher', num_heads=HEADS)
    assert result.family == 'dinov2'
    assert_same_features(loaded(result), model, torch.randn(1, 3, 70, 70))


def test_deit3_own_names():
    """facebookresearch/deit writes gamma_1 where timm has ls1.gamma."""
    model = timm_model('deit3')
    weights = {re.sub(r'ls(\d)\.gamma', r'gamma_\1', k): v
               for k, v in model.state_dict().items()}
    assert any('gamma_1' in k for k in weights)
    _, backbone = converted(weights)
    assert_same_features(backbone, model, torch.randn(1, 3, 64, 64))


# -- Config, report and file


@pytest.mark.parametrize('name, arch', [
    ('vit_tiny_patch16_224', 'deit-tiny'),
    ('vit_small_patch16_224', 'deit-small'), ('vit_base_patch16_224', 'base'),
    ('vit_large_patch14_reg4_dinov2', 'large'), ('vit_huge_patch14_224', 'h'),
    ('vit_giant_patch14_dinov2', 'dinov2-g'),
    ('deit3_medium_patch16_224', dict(
        embed_dims=512, num_layers=12, num_heads=8,
        feedforward_channels=2048))])
def test_published_sizes(name, arch):
    """Depth, width and heads of timm's own models, without arguments."""
    from mmpretrain.models import VisionTransformer

    from mmsinger.converters.describe import describe
    from mmsinger.converters.layouts import rename
    with torch.device('meta'):
        model = timm.create_model(name)
    weights = model.state_dict()
    named = {r.target: weights[r.source]
             for r in rename(weights, 'timm') if r.target}
    found = describe(named, (0, 1))['arch']
    zoo = VisionTransformer.arch_zoo
    sizes = zoo[found] if isinstance(found, str) else found
    assert sizes == (zoo[arch] if isinstance(arch, str) else arch)
    assert sizes['num_heads'] == model.blocks[0].attn.num_heads


def test_every_tensor_is_in_the_report():
    model = timm_model('dinov2-reg')
    weights = dinov2_layout(model)
    result, _ = converted(weights, img_size=42)
    assert [e.source for e in result.entries] == list(weights)
    assert {e.target for e in result.entries} - {''} == set(result.weights)
    by_source = {e.source: e for e in result.entries}
    assert by_source['register_tokens'].target == 'cls_token'
    assert by_source['cls_token'].shape == (1, 5, 32)
    assert by_source['pos_embed'].action == \
        'padded with 4 zero rows, resampled 5x5 -> 3x3'
    assert by_source['norm.weight'][1:] == ('ln1.weight', (32, ), 'renamed')
    lines = result.report().splitlines()
    assert len(lines) == 1 + len(weights)
    assert re.search(r'^blocks\.1\.mlp\.fc1\.bias +'
                     r'layers\.1\.ffn\.layers\.0\.0\.bias +128 +renamed$',
                     result.report(), re.M)
    assert re.search(r'^mask_token +- +1x32 +dropped: for training',
                     result.report(), re.M)


def test_weights_are_not_changed_by_conversion():
    model = timm_model('deit3')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = dict(before)
    convert(weights, num_heads=HEADS, img_size=96)
    assert list(weights) == list(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_half_precision_stays():
    weights = {k: v.half() for k, v in
               timm_model('augreg-s').state_dict().items()}
    result = convert(weights, num_heads=HEADS, img_size=96)
    assert {v.dtype for v in result.weights.values()} == {torch.float16}
    assert result.weights['pos_embed'].isfinite().all()


@pytest.fixture(scope='module')
def safetensors(tmp_path_factory):
    """A file of a small timm model, and the model."""
    torch.manual_seed(0)
    model = timm_model('dinov2-reg')
    path = str(tmp_path_factory.mktemp('timm') / 'model.safetensors')
    save_file(model.state_dict(), path)
    return path, model


def test_teacher_reads_the_file(tmp_path, safetensors):
    path, model = safetensors
    out = str(tmp_path / 'new' / 'out.pth')
    result = convert_checkpoint(path, out, num_heads=HEADS)
    saved = torch.load(out, weights_only=True)
    assert all(k.startswith('backbone.') for k in saved['state_dict'])
    with open(path, 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert saved['meta']['sha256'] == digest
    assert saved['meta']['source'] == 'model.safetensors'
    assert saved['meta']['family'] == 'timm'
    assert saved['meta']['backbone'] == result.backbone

    teacher = FrozenTeacher(backbone=saved['meta']['backbone'],
                            checkpoint=out, prefix='backbone.')
    teacher.load_weights()
    images = torch.randn(1, 3, 70, 70)
    taps = teacher(images, [0, 1], Normalisation(None, None))
    with torch.no_grad():
        expected = model.blocks[0](model.norm_pre(model._pos_embed(
            model.patch_embed(images))))
    tokens = taps.tokens(0)
    assert (tokens.num_prefix, tokens.grid) == (5, (5, 5))
    assert torch.allclose(tokens.values, expected, atol=1e-4)
    assert torch.allclose(taps.rerun(1, tokens.values),
                          taps.tokens(1).values, atol=1e-5)


@pytest.mark.parametrize('out_type, shape', [
    ('raw', (2, 5 + 9, 32)), ('cls_token', (2, 32)),
    ('featmap', (2, 32, 3, 3)), ('avg_featmap', (2, 32))])
def test_registers_stay_out_of_the_features(out_type, shape):
    backbone = tiny.build(dict(
        type='mmsinger.VisionTransformerWithRegisters', num_registers=4,
        arch=dict(embed_dims=32, num_layers=1, num_heads=4,
                  feedforward_channels=64),
        img_size=32, patch_size=8, out_type=out_type))
    output, = backbone(torch.randn(2, 3, 24, 24))
    assert output.shape == shape


def test_registers_need_a_class_token():
    with pytest.raises(ConfigError, match='needs a class token'):
        MODELS.build(dict(type='mmsinger.VisionTransformerWithRegisters',
                          with_cls_token=False))


def write_config(path, where, backbone):
    name, *inside = where.split('.')
    value = backbone
    for key in reversed(inside):
        value = {key: value}
    path.write_text(f'{name} = {value!r}\n')
    return str(path)


def test_tool(tmp_path, safetensors, monkeypatch):
    path, _ = safetensors
    output = forked.run(
        'convert_checkpoint.py', path, 'out.pth', '--num-heads', HEADS,
        '--img-size', 42, '--report', cwd=tmp_path).stdout
    assert "timm VisionTransformer layout ('timm', from its keys)" in output
    assert 'head.weight' in output and 'dropped: head' in output
    snippet = {}
    exec(output[re.search(r'^teacher *=', output, re.M).start():], snippet)
    teacher = snippet['teacher']
    assert teacher['backbone']['img_size'] == 42
    monkeypatch.chdir(tmp_path)
    frozen = FrozenTeacher(**teacher)
    frozen.load_weights()
    # the same once more, for the config that it printed
    config = write_config(tmp_path / 'config.py', 'teacher.backbone',
                          teacher['backbone'])
    forked.run('convert_checkpoint.py', path, 'again.pth', '--config',
               config, cwd=tmp_path)
    first, second = (torch.load(tmp_path / name)['state_dict']
                     for name in ('out.pth', 'again.pth'))
    assert list(first) == list(second)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize('case', ['augreg-s', 'deit3', 'dinov2-reg'])
def test_head_is_kept_on_request(tmp_path, case):
    model = timm_model(case)
    source, out = str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth')
    torch.save(model.state_dict(), source)
    result = convert_checkpoint(source, out, num_heads=HEADS, head=True)
    assert {e.target for e in result.entries if e.source.startswith('head.')
            } == {'layers.head.weight', 'layers.head.bias'}
    init_default_scope('mmpretrain')
    backbone = dict(result.backbone, out_type='cls_token')
    classifier = MODELS.build(dict(
        type='mmpretrain.ImageClassifier', backbone=backbone,
        head=dict(type='mmpretrain.VisionTransformerClsHead', num_classes=3,
                  in_channels=32)))
    classifier.load_state_dict(torch.load(out)['state_dict'])
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(images), model(images),
                                   rtol=1e-5, atol=1e-5)


def test_tool_prints_the_teacher_with_its_head(tmp_path, safetensors,
                                               monkeypatch):
    path, _ = safetensors
    output = forked.run('convert_checkpoint.py', path, 'out.pth', '--head',
                        '--num-heads', HEADS, cwd=tmp_path).stdout
    first, second = output.split('With its head, for LogitKDDistiller:')
    snippets = []
    for text in (first, second):
        snippets.append({})
        exec(text[re.search(r'^teacher *=', text, re.M).start():],
             snippets[-1])
    features, whole = (snippet['teacher'] for snippet in snippets)
    monkeypatch.chdir(tmp_path)
    FrozenTeacher(**features).load_weights()
    init_default_scope('mmpretrain')
    FrozenClassifier(**whole).load_weights()


# -- Bad input


def message(weights, **kwargs):
    with pytest.raises(ConfigError) as info:
        convert(weights, **{**dict(num_heads=HEADS), **kwargs})
    return str(info.value)


def small(case='augreg-s'):
    return dict(timm_model(case).state_dict())


def test_unknown_key():
    weights = small()
    weights['blocks.1.norm_1.weight'] = weights.pop('blocks.1.norm1.weight')
    weights['dist_token'] = torch.zeros(1, 1, 32)
    text = message(weights)
    assert '2 of' in text and 'dist_token' in text
    assert "Did you mean 'blocks.1.norm1.weight'" in text
    assert 'mmpretrain.TIMMBackbone' in text


def test_qk_norm_has_no_counterpart():
    model = timm.create_model('vit_small_patch16_224', **SMALL, qk_norm=True,
                              img_size=64)
    assert 'blocks.0.attn.q_norm.weight' in message(model.state_dict())


def test_missing_tensor():
    weights = small()
    del weights['blocks.1.mlp.fc2.weight']
    text = message(weights, path="'x.pth'")
    assert 'missing' in text and 'layers.1.ffn.layers.1.weight' in text
    assert 'incomplete' in text and "'x.pth'" in text
    for key in ('patch_embed.proj.weight', 'pos_embed',
                'blocks.0.mlp.fc1.weight'):
        weights = small()
        del weights[key]
        assert 'it is incomplete' in message(weights)


def test_registers_without_class_token():
    weights = {k: v for k, v in small('dinov2-reg').items()
               if k != 'cls_token'}
    backbone = tiny.vit(img_size=70, patch_size=14, with_cls_token=False,
                        layer_scale_init_value=1e-5, out_type='raw')
    backbone['arch'].update(num_layers=2, feedforward_channels=128)
    text = message(weights, backbone=backbone, num_heads=None)
    assert '1 unexpected keys' in text and 'register_tokens' in text


def test_missing_block():
    weights = {k: v for k, v in small().items()
               if not k.startswith('blocks.0.')}
    assert 'it is incomplete' in message(weights)


def test_shape_mismatch():
    weights = small()
    weights['blocks.1.norm1.weight'] = torch.zeros(16)
    text = message(weights)
    assert 'shapes differ' in text and 'layers.1.ln1.weight' in text
    deeper = convert(small(), num_heads=HEADS).backbone
    deeper['arch']['num_layers'] = 3
    text = message(small(), backbone=deeper, num_heads=None)
    assert 'missing' in text and 'layers.2.ln1.weight' in text


def test_two_keys_for_one():
    weights = small('deit3')
    weights['blocks.0.gamma_1'] = weights['blocks.0.ls1.gamma']
    assert 'which one counts' in message(weights)


def test_family_of_the_keys():
    with pytest.raises(ConfigError, match='several families.*reg_token.*'
                       'mask_token.*--source'):
        detect(['blocks.0.norm1.weight', 'reg_token', 'mask_token'])
    with pytest.raises(ConfigError, match="mmpretrain's layout already"):
        detect(['backbone.layers.0.ln1.weight'])
    with pytest.raises(ConfigError, match=r"begin with \['conv1', 'layer1'\]"
                       ".*'unic' \\(UNIC"):
        detect(['conv1.weight', 'layer1.0.weight'])
    assert detect(['blocks.0.norm1.weight', 'cls_token']) == 'timm'


@pytest.mark.parametrize('case, removed, words', [
    ('augreg-s', 'head.bias', 'has no head.bias'),
    ('augreg-s', 'head.weight', 'has no head.weight'),
    ('average-pool', 'norm_pre', 'has fc_norm.weight, fc_norm.bias')])
def test_head_that_cannot_be_kept(case, removed, words):
    weights = small(case)
    weights.pop(removed, None)
    said = message(weights, head=True)
    assert '--head' in said and words in said


def test_wrong_family():
    assert 'register_tokens' in message(
        dinov2_layout(timm_model('dinov2-reg')), family='timm')
    text = message(small('deit3'), family='unic')
    assert 'head.weight' in text and '--source' in text
    assert "--source='dino' is not valid" in message(small(), family='dino')


def test_clip_needs_its_activation():
    text = message(small('clip-openai'))
    assert '--act quickgelu' in text and '--act gelu' in text


def test_uncommon_width_needs_its_heads():
    assert '--num-heads' in message(small(), num_heads=None)
    assert '5 do not divide' in message(small(), num_heads=5)


def test_architecture_that_does_not_fit():
    assert "--arch='l' is" in message(small(), arch='l', num_heads=None)
    assert "--arch='xl' is not valid" in message(small(), arch='xl')
    assert 'is not that of' in message(small(), arch='l')
    assert 'Give one' in message(small(), backbone=tiny.vit())


def test_image_size_that_the_patches_do_not_divide():
    assert 'multiples of the patch size, 16' in message(small(), img_size=70)


@pytest.mark.parametrize('backbone, words', [
    (dict(type='mmpretrain.DeiT3', arch='s'), 'ln1 twice'),
    (tiny.seg_vit(), 'a VisionTransformer'),
    (tiny.vit('ViTEVA02'), 'a ViTEVA02')])
def test_backbones_that_weights_cannot_be_converted_for(backbone, words):
    assert words in message(small(), backbone=backbone, num_heads=None)


def test_mmpretrain_deit3_is_not_deit3():
    """The reason for the refusal: if this fails, mmpretrain mended it."""
    layer = tiny.build(tiny.vit('DeiT3')).layers[0]
    tokens = torch.randn(1, 5, 32)
    before = layer(tokens)
    torch.nn.init.zeros_(layer.ln2.weight)
    assert torch.equal(layer(tokens), before)


def test_grid_that_is_no_square():
    weights = small()
    weights['pos_embed'] = torch.zeros(1, 13, 32)
    assert '13 rows' in message(weights)


@pytest.mark.parametrize('make, words', [
    (lambda path: None, 'no such file'),
    (lambda path: open(path, 'wb').close(), 'cannot be read'),
    (lambda path: torch.save([1], path), 'holds a list'),
    (lambda path: torch.save(dict(model={}), path), 'holds no weights')])
def test_file_without_weights(tmp_path, make, words):
    path = str(tmp_path / 'x.pth')
    make(path)
    with pytest.raises(ConfigError, match=words):
        convert_checkpoint(path, str(tmp_path / 'out.pth'))
    assert 'out.pth' not in os.listdir(tmp_path)


def test_truncated_file(tmp_path, safetensors):
    whole = str(tmp_path / 'x.pth')
    torch.save(small(), whole)
    for path in (whole, safetensors[0]):
        with open(path, 'rb') as file:
            content = file.read()
        half = str(tmp_path / f'half_{os.path.basename(path)}')
        with open(half, 'wb') as file:
            file.write(content[:len(content) // 2])
        with pytest.raises(ConfigError, match='truncated|damaged'):
            convert_checkpoint(half, str(tmp_path / 'out.pth'))
    assert 'out.pth' not in os.listdir(tmp_path)


def test_no_place_to_write(tmp_path, safetensors):
    path, _ = safetensors
    (tmp_path / 'file').touch()
    for out in (tmp_path / 'file' / 'out.pth', tmp_path):
        with pytest.raises(ConfigError, match='cannot be written'):
            convert_checkpoint(path, str(out), num_heads=HEADS)
    own = str(tmp_path / 'x.pth')
    torch.save(small(), own)
    with pytest.raises(ConfigError, match='which would be lost'):
        convert_checkpoint(own, os.path.relpath(own), num_heads=HEADS)
    with pytest.raises(ConfigError, match='Name it'):
        convert_checkpoint(path, str(tmp_path / 'out.safetensors'))
    with pytest.raises(ConfigError, match='Download it first'):
        convert_checkpoint('https://x.org/x.pth', str(tmp_path / 'out.pth'))
    assert sorted(os.listdir(tmp_path)) == ['file', 'x.pth']


def test_tool_says_what_is_wrong_without_a_traceback(tmp_path, safetensors):
    path, _ = safetensors
    empty = write_config(tmp_path / 'empty.py', 'data.root', 'x')
    for args, words in (
            ([path, 'out.pth'], '--num-heads'),
            ([path, 'out.pth', '--config', empty], 'has no backbone'),
            (['none.pth', 'out.pth'], 'no such file')):
        done = forked.run('convert_checkpoint.py', *args, cwd=tmp_path,
                          check=False)
        assert done.returncode == 1
        assert 'ConfigError' in done.stdout and words in done.stdout
        assert 'Traceback' not in done.stdout
    assert not (tmp_path / 'out.pth').exists()
