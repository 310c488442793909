"""Reading block outputs of every supported backbone family from outside."""
import copy
import functools
from collections import Counter

import pytest
import torch
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.models.features.anatomy import (find_blocks, fixed_input_size,
                                              patch_stride, resolve_layer)
from mmsinger.models.features.taps import BlockTaps
from mmsinger.registry import MODELS
from tiny import build, seg_vit, timm_vit, vit

DEPTH = 4
MMPRETRAIN = dict(
    plain=vit(),
    layer_scale=vit(layer_scale_init_value=0.1),
    clip=vit(pre_norm=True),
    dinov2_g=vit(layer_scale_init_value=0.1,
                 layer_cfgs=dict(ffn_type='swiglu_fused')),
    no_cls=vit(with_cls_token=False, out_type='avg_featmap'),
    deit3=vit('DeiT3'),
    deit_distilled=vit('DistilledVisionTransformer'),
    eva02=vit('ViTEVA02'),
    eva02_sub_ln=vit('ViTEVA02', sub_ln=True),
    beit=vit('BEiTViT', final_norm=True),
    beit_shared=vit('BEiTViT', use_rel_pos_bias=False, final_norm=True,
                    use_shared_rel_pos_bias=True),
    beit_wide=vit('BEiTViT', img_size=(32, 48), final_norm=True),
    mae=vit('MAEViT'),
)
MMSEG = dict(
    mmseg=seg_vit(final_norm=True),
    mmseg_no_cls=seg_vit(final_norm=True, with_cls_token=False),
    mmseg_checkpointing=seg_vit(final_norm=True, with_cp=True),
    mmseg_pre_norm=seg_vit(final_norm=True, pre_norm=True),
)
TIMM = dict(
    timm_registers=timm_vit('vit_tiny_patch16_224', reg_tokens=4,
                            dynamic_img_size=True),
    timm_fixed_size=timm_vit('vit_tiny_patch16_224'),
    timm_eva02=timm_vit('eva02_tiny_patch14_224', dynamic_img_size=True),
    timm_beit=timm_vit('beit_base_patch16_224'),
    timm_beit_shared=timm_vit('beit_base_patch16_224', use_rel_pos_bias=False,
                              use_shared_rel_pos_bias=True),
    timm_deit3=timm_vit('deit3_small_patch16_224', dynamic_img_size=True),
    timm_dinov2=timm_vit('vit_small_patch14_dinov2', patch_size=14,
                         img_size=56, dynamic_img_size=True),
    timm_dinov2_g=timm_vit('vit_giant_patch14_dinov2'),
    timm_dinov3=timm_vit('vit_small_patch16_dinov3'),
)
FAMILIES = {**MMPRETRAIN, **MMSEG, **TIMM}
PREFIX = dict(no_cls=0, mmseg_no_cls=0, deit_distilled=2, timm_registers=5,
              timm_dinov3=5)
FINAL_NORM = ('ln1', 'norm1', 'timm_model.norm')


def images_for(backbone, rows=4, columns=6):
    """Not square wherever the backbone can take that."""
    step = patch_stride(find_blocks(backbone, 'teacher').patch_embed)
    size = fixed_input_size(backbone) or (rows * step[0], columns * step[1])
    return torch.randn(2, 3, *size)


def raw_outputs(name, backbone, images):
    """Patch tokens of all blocks before the final norm, and the prefix tokens
    where they can be had, through the backbone's own interface."""
    if name in TIMM:
        features = backbone.timm_model.forward_intermediates(
            images, norm=False, output_fmt='NLC', intermediates_only=True,
            return_prefix_tokens=True)
        return [(patches, prefix) for patches, prefix in features]
    cfg = dict(FAMILIES[name], final_norm=False, out_indices=list(range(DEPTH)))
    if name in MMPRETRAIN:
        cfg.update(out_type='featmap' if name == 'no_cls' else 'raw')
    reference = MODELS.build(cfg)
    # Parameters alone: EVA-02's rotary buffers take the size of the last image
    theirs = dict(backbone.named_parameters())
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            parameter.copy_(theirs[key])
    reference.eval()
    outputs = reference(images, mask=None) if name == 'mae' \
        else reference(images)
    count = PREFIX.get(name, 1)
    if outputs[0].dim() == 4:
        return [(x.flatten(2).transpose(1, 2), None) for x in outputs]
    return [(x[:, count:], x[:, :count]) for x in outputs]


@pytest.fixture(params=FAMILIES, scope='module')
def family(request):
    torch.manual_seed(0)
    return request.param, build(FAMILIES[request.param])


def hooks_left(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks)
               + len(m._forward_hooks_with_kwargs)
               + len(m._forward_pre_hooks_with_kwargs)
               for m in module.modules())


def count_calls(backbone):
    """How often each module's forward runs, without using hooks."""
    calls = Counter()
    for name, module in backbone.named_modules():
        module.forward = _counted(module.forward, name, calls)
    return calls


def _counted(forward, name, calls):

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls[name] += 1
        return forward(*args, **kwargs)

    return counted


@torch.no_grad()
def test_raw_outputs_of_every_block(family):
    name, backbone = family
    images = images_for(backbone)
    with BlockTaps(find_blocks(backbone, 'teacher'), range(DEPTH)) as taps:
        taps.run(backbone, images)
    expected = raw_outputs(name, backbone, images)
    assert len(expected) == DEPTH
    for layer, (patches, prefix) in enumerate(expected):
        tokens = taps.tokens(layer)
        assert tokens.num_prefix == PREFIX.get(name, 1)
        assert torch.allclose(tokens.patches, patches, atol=1e-5)
        if prefix is not None:
            assert torch.allclose(tokens.prefix, prefix, atol=1e-5)


@torch.no_grad()
def test_grid_and_width(family):
    name, backbone = family
    blocks = find_blocks(backbone, 'teacher')
    images = images_for(backbone)
    step = patch_stride(blocks.patch_embed)
    with BlockTaps(blocks, [0]) as taps:
        taps.run(backbone, images)
    tokens = taps.tokens(0)
    assert step == ((14, 14) if name == 'timm_dinov2' else (8, 8))
    assert tokens.grid == (images.shape[2] // step[0],
                           images.shape[3] // step[1])
    assert len(blocks) == DEPTH and blocks.dim == 32
    assert blocks.in_channels == 3


def test_image_size_is_not_square_where_it_can_be():
    fixed = [name for name, cfg in FAMILIES.items()
             if fixed_input_size(MODELS.build(dict(cfg)))]
    assert fixed == ['beit', 'beit_shared', 'beit_wide', 'timm_fixed_size',
                     'timm_beit', 'timm_beit_shared', 'timm_dinov2_g']
    assert fixed_input_size(MODELS.build(FAMILIES['beit_wide'])) == (32, 48)


def test_rerun_of_the_next_block(family):
    """With the arguments of the pass: rotary embeddings, position bias."""
    name, backbone = family
    with torch.no_grad(), BlockTaps(
            find_blocks(backbone, 'teacher'), [1, 2], stop=True) as taps:
        taps.run(backbone, images_for(backbone))
    with torch.no_grad():
        again = taps.rerun(2, taps.tokens(1).values)
    assert torch.equal(again, taps.tokens(2).values)

    values = taps.tokens(1).values.clone().requires_grad_()
    again = taps.rerun(2, values)
    # another attention kernel may be chosen when gradients are wanted
    assert torch.allclose(again, taps.tokens(2).values, atol=1e-5)
    again.square().sum().backward()
    assert values.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'name', ['eva02', 'beit_shared', 'timm_eva02', 'timm_beit_shared',
             'timm_dinov3'])
@torch.no_grad()
def test_rerun_needs_the_extra_arguments(name):
    """Guards the test above: without them the outcome is another one."""
    backbone = build(FAMILIES[name])
    with BlockTaps(find_blocks(backbone, 'teacher'), [1, 2]) as taps:
        taps.run(backbone, images_for(backbone))
    args, kwargs = taps._extras[2]
    assert args or any(value is not None for value in kwargs.values())
    taps._extras[2] = (), {}
    try:
        again = taps.rerun(2, taps.tokens(1).values)
    except TypeError:  # a positional argument is missing
        return
    assert not torch.allclose(again, taps.tokens(2).values, atol=1e-4)


@torch.no_grad()
def test_pass_stops_after_the_deepest_tap(family):
    name, backbone = family
    backbone = copy.deepcopy(backbone)
    blocks = find_blocks(backbone, 'teacher')
    calls = count_calls(backbone)
    with BlockTaps(blocks, [0, 2], stop=True) as taps:
        taps.run(backbone, images_for(backbone))
    assert [calls[f'{blocks.path}.{i}'] for i in range(DEPTH)] == [1, 1, 1, 0]
    assert not any(calls[norm] for norm in FINAL_NORM)

    # the last block too: the final norm is not run, but would be otherwise
    calls.clear()
    with BlockTaps(blocks, [DEPTH - 1], stop=True) as taps:
        taps.run(backbone, images_for(backbone))
    assert [calls[f'{blocks.path}.{i}'] for i in range(DEPTH)] == [1] * DEPTH
    assert not any(calls[norm] for norm in FINAL_NORM)
    with BlockTaps(blocks, [0]) as taps:
        taps.run(backbone, images_for(backbone))
    assert any(calls[norm] for norm in FINAL_NORM)


@torch.no_grad()
def test_hooks_are_removed(family):
    name, backbone = family
    blocks = find_blocks(backbone, 'teacher')
    images = images_for(backbone)
    before = hooks_left(backbone)
    for stop in (False, True):
        with BlockTaps(blocks, [1, 2], stop=stop) as taps:
            assert hooks_left(backbone) > before
            taps.run(backbone, images)
        assert hooks_left(backbone) == before
    with pytest.raises(KeyboardInterrupt):
        with BlockTaps(blocks, [1, 2], stop=True):
            raise KeyboardInterrupt
    assert hooks_left(backbone) == before


def test_hooks_are_removed_after_an_error_inside_the_model():
    backbone = build(vit())
    blocks = find_blocks(backbone, 'teacher')

    def fail(*args):
        raise FloatingPointError('inside')

    blocks.modules[1].forward = fail
    with pytest.raises(FloatingPointError, match='inside'):
        with BlockTaps(blocks, [0, 1, 2], stop=True) as taps:
            taps.run(backbone, torch.randn(1, 3, 32, 32))
    assert hooks_left(backbone) == 0


def test_gradients_flow_through_tokens_under_checkpointing():
    backbone = build(seg_vit(with_cp=True))
    backbone.train()
    blocks = find_blocks(backbone, 'student')
    with BlockTaps(blocks, [2], stop=True) as taps:
        taps.run(backbone, torch.randn(1, 3, 32, 32))
    taps.tokens(2).values.square().sum().backward()
    assert blocks.patch_embed.projection.weight.grad.abs().sum() > 0
    assert blocks.modules[0].ffn.layers[1].weight.grad.abs().sum() > 0
    assert blocks.modules[3].ffn.layers[1].weight.grad is None


def test_masking_backbone_runs_unmasked_and_repeatably():
    backbone = build(vit('MAEViT'))
    images = torch.randn(2, 3, 32, 32)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad(), BlockTaps(
                find_blocks(backbone, 'teacher'), [1], stop=True) as taps:
            taps.run(backbone, images)
        values.append(taps.tokens(1).values)
    assert values[0].shape == (2, 17, 32)
    assert torch.equal(*values)


# -- what cannot be read -----------------------------------------------------


def test_resnet_is_refused():
    with pytest.raises(ConfigError) as error:
        find_blocks(MODELS.build(dict(type='mmpretrain.ResNet', depth=18)),
                    'teacher')
    message = str(error.value)
    assert message.startswith('teacher: ResNet is no vision transformer')
    assert 'TIMMBackbone' in message and 'layer1' in message


def test_pyramid_is_refused():
    swin = dict(type='mmpretrain.SwinTransformer', arch=dict(
        embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
        img_size=64)
    with pytest.raises(ConfigError, match='teacher: SwinTransformer has '
                       'several lists of blocks.*pyramid'):
        find_blocks(MODELS.build(swin), 'teacher')


def test_blocks_without_patch_embed_are_refused():

    class Block(nn.Module):

        def __init__(self):
            super().__init__()
            self.attn = self.mlp = nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="blocks at '1' but no patch_embed"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block())),
                    'student')


def test_layer_that_the_pass_did_not_reach():
    backbone = build(vit())
    with torch.no_grad(), BlockTaps(
            find_blocks(backbone, 'teacher'), [0, 3]) as taps:
        pass
    with pytest.raises(ConfigError, match=r'layers\.3 was not reached'):
        taps.tokens(3)


def test_fewer_tokens_than_patches():
    backbone = build(vit('MAEViT'))
    with torch.no_grad(), BlockTaps(
            find_blocks(backbone, 'teacher'), [1]) as taps:
        backbone(torch.randn(1, 3, 32, 32), mask=True)
    with pytest.raises(ConfigError, match='4 x 4.*Token dropping'):
        taps.tokens(1)


@pytest.mark.parametrize('layer, index', [
    (0, 0), (3, 3), (-1, 3), (-4, 0), ('layers.2', 2),
    ('backbone.layers.3', 3), ('student.backbone.layers.1', 1)])
def test_layer_names(layer, index):
    blocks = find_blocks(build(vit()), 'teacher')
    assert resolve_layer(layer, blocks, 'layers') == index


def test_layer_names_in_timm():
    blocks = find_blocks(build(TIMM['timm_registers']), 'teacher')
    for layer in ('timm_model.blocks.2', 'backbone.timm_model.blocks.2', 2):
        assert resolve_layer(layer, blocks, 'layers') == 2


@pytest.mark.parametrize('layer, words', [
    (4, ['layers=4 is out of range', '4 blocks', 'from 0 to 3', '-4 to -1']),
    (-5, ['layers=-5 is out of range', '4 blocks']),
    (24, ['layers=24 is out of range']),
    ('layer.2', ["layers='layer.2': no such block", "'layers.0' to "
                 "'layers.3'", "Did you mean 'layers.2'"]),
    ('layers.9', ["layers='layers.9'", "Did you mean 'layers."]),
    ('blocks.2', ["layers='blocks.2': no such block", "'layers.0'"]),
    ('backbone.layrs.3', ["Did you mean 'layers.3'"]),
    (True, ['layers=True']),
    (1.0, ['layers=1.0']),
    (None, ['layers=None']),
])
def test_layers_that_do_not_exist(layer, words):
    blocks = find_blocks(build(vit()), 'teacher')
    with pytest.raises(ConfigError) as error:
        resolve_layer(layer, blocks, 'layers')
    for word in words:
        assert word in str(error.value)
