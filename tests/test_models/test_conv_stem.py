import pytest
import torch
from mmcv.cnn.bricks.transformer import PatchEmbed

from mmsinger.errors import ConfigError
from mmsinger.models.backbones.conv_stem import ConvStem


def vit(**kwargs):
    from mmpretrain.registry import MODELS
    return MODELS.build(dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=16, num_layers=1, num_heads=2,
                  feedforward_channels=32),
        patch_cfg=dict(conv_type='mmsinger.ConvStem'),
        out_type='featmap', **kwargs))


@pytest.mark.parametrize('patch', [2, 4, 8, 16])
def test_one_token_per_patch(patch):
    embed = PatchEmbed(embed_dims=24, conv_type='mmsinger.ConvStem',
                       kernel_size=patch, stride=patch,
                       input_size=(4 * patch, 6 * patch))
    assert isinstance(embed.projection, ConvStem)
    tokens, size = embed(torch.randn(2, 3, 4 * patch, 6 * patch))
    assert size == embed.init_out_size == (4, 6)
    assert tokens.shape == (2, 24, 24)


@pytest.mark.parametrize('height, width', [(32, 48), (30, 45)])
def test_vit_on_non_square_images(height, width):
    model = vit(img_size=(height, width), patch_size=4)
    assert model.patch_resolution == (8, 12)
    assert model(torch.randn(1, 3, height, width))[0].shape == (1, 16, 8, 12)


def test_vit_on_another_size_than_it_was_made_for():
    model = vit(img_size=32, patch_size=4)
    assert model(torch.randn(1, 3, 16, 40))[0].shape == (1, 16, 4, 10)


def test_token_sees_its_own_patch():
    model = vit(img_size=32, patch_size=4).patch_embed.eval()
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    tokens, _ = model(image)
    tokens[0, 3 * 8 + 5].sum().backward()
    rows, columns = image.grad.abs().sum((0, 1)).nonzero().T
    assert set(range(12, 16)) <= set(rows.tolist())
    assert set(range(20, 24)) <= set(columns.tolist())
    assert rows.min() >= 8 and rows.max() < 20


def test_all_parameters_learn():
    model = vit(img_size=32, patch_size=4).patch_embed
    model(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize('changed', [
    dict(kernel_size=14, stride=14), dict(kernel_size=(4, 8), stride=(4, 8)),
    dict(kernel_size=1, stride=1), dict(stride=2), dict(padding=1),
    dict(dilation=2)])
def test_what_is_no_stem_is_refused(changed):
    with pytest.raises(ConfigError, match='ConvStem'):
        ConvStem(3, 16, **{**dict(kernel_size=4, stride=4), **changed})
