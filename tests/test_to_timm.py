"""Students in timm's layout: loaded strictly, the same output."""
import ast
import os
import re
import sys

import pytest
import torch

import forked
import keep_run
import tiny
from mmsinger.converters import to_timm
from mmsinger.errors import ConfigError
from tiny import vit

timm = pytest.importorskip('timm')
pytest.importorskip('mmseg')
SWIN = dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4])
CONVNEXT = dict(depths=[1, 2, 1, 1], channels=[8, 16, 24, 32])

CASES = {
    'vit': vit(),
    'vit-layerscale': vit(layer_scale_init_value=1e-5, qkv_bias=False),
    'vit-without-cls': vit(with_cls_token=False, out_type='raw'),
    'vit-registers': dict(vit(), num_registers=2,
                          type='mmsinger.VisionTransformerWithRegisters'),
    'vit-not-square': vit(img_size=(32, 64)),
    'vit-raw-norm': vit(final_norm=False),
    'mmseg-vit': tiny.seg_vit(),
    'mmseg-vit-norm': tiny.seg_vit(final_norm=True, out_indices=(1, 3)),
    'swin': dict(type='mmpretrain.SwinTransformer', arch=SWIN, img_size=128,
                 window_size=4),
    'mmseg-swin': dict(type='mmseg.SwinTransformer', pretrain_img_size=128,
                       window_size=4, **SWIN),
    'vit-grey': tiny.vit(in_channels=1),
    'convnext': dict(type='mmpretrain.ConvNeXt', arch=CONVNEXT),
    'convnext-dense': dict(type='mmpretrain.ConvNeXt', arch=CONVNEXT,
                           out_indices=(0, 1, 2, 3),
                           gap_before_final_norm=False),
    'convnext-v2': dict(type='mmpretrain.ConvNeXt', arch=CONVNEXT,
                        use_grn=True, layer_scale_init_value=0.),
    'resnet18': dict(type='mmpretrain.ResNet', depth=18),
    'resnet50-d8': dict(type='mmseg.ResNetV1c', depth=50,
                        strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4),
                        contract_dilation=True),
    'resnet18-c': dict(type='mmseg.ResNetV1c', depth=18),
    'resnet50d': dict(type='mmpretrain.ResNetV1d', depth=50),
    'resnext50': dict(type='mmpretrain.ResNeXt', depth=50),
    'seresnet50': dict(type='mmpretrain.SEResNet', depth=50),
    'regnet': dict(type='mmpretrain.RegNet', arch='regnetx_400mf'),
    'densenet': dict(type='mmpretrain.DenseNet', arch='121'),
    'efficientnet': dict(type='mmpretrain.EfficientNet', arch='b0'),
    'mobilenet-v2': dict(type='mmpretrain.MobileNetV2', widen_factor=0.5),
    'timm': dict(type='mmpretrain.TIMMBackbone', model_name='resnet10t'),
}


def last(output):
    while isinstance(output, (tuple, list)):
        output = output[-1]
    return output


@pytest.mark.parametrize('name', CASES)
def test_same_output(name):
    cfg = CASES[name]
    student = tiny.build(cfg)
    if name == 'convnext-dense':  # norms a map; timm, like others, its mean
        dense, student = student, tiny.build(CASES['convnext'])
        student.load_state_dict(dense.state_dict(), strict=False)
        found = to_timm(dense.state_dict(), cfg)
        assert found.left_out == [f'norm{i}.{leaf}' for i in range(3)
                                  for leaf in ('weight', 'bias')]
    found = to_timm(student.state_dict(), cfg)
    model = timm.create_model(found.model_name, **found.kwargs).eval()
    model.load_state_dict(found.state_dict, strict=True)
    size = found.kwargs.get('img_size', (64, 64))
    images = torch.randn(2, found.kwargs.get('in_chans', 3), *size)
    with torch.no_grad():
        ours = last(student(images))
        theirs = model.forward_features(images)
        if ours.dim() == 2:
            theirs = theirs[:, 0] if name.startswith('vit') else model(images)
    if ours.dim() == 4 and theirs.dim() == 3:
        ours = ours.flatten(2).transpose(1, 2)
        theirs = theirs[:, -ours.shape[1]:]
    elif ours.shape != theirs.shape:
        theirs = theirs.permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, ours, rtol=0,
                               atol=1e-5 * ours.abs().max().item())


KEPT = os.path.join(tiny.TESTS, 'data', 'run_0.1.0', 'epoch_2.pth')


def export(*args, cwd, check=True):
    return forked.run('export_student.py', KEPT, '--config', keep_run.CONFIG,
                      *args, cwd=cwd, check=check)


def test_tool(tmp_path):
    """What it prints makes the model."""
    output = export('--layout', 'timm', '--out', 'student.pth',
                    cwd=tmp_path).stdout
    name, kwargs = re.search(
        r"^timm\.create_model\('(\w+)', (.*), checkpoint_path='student.pth'",
        output, re.M).groups()
    kwargs = {key.arg: ast.literal_eval(key.value) for key in
              ast.parse(f'f({kwargs})', mode='eval').body.keywords}
    path = str(tmp_path / 'student.pth')
    model = timm.create_model(name, checkpoint_path=path, **kwargs).eval()
    assert torch.load(path, weights_only=True)['meta'] == dict(
        model_name=name, kwargs=kwargs)
    with torch.no_grad():
        found = model.forward_features(keep_run.images())[:, 0]
    expected = torch.from_numpy(
        keep_run.outputs(KEPT.replace('.pth', '_student.pth')))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('args, words', [
    (['--layout', 'timm', '--timm-model', 'vit_tiny_patch16_22'],
     "no such model. Did you mean 'vit_tiny_patch16_224'"),
    (['--layout', 'timm', '--timm-model', 'vit_tiny_patch16_224'],
     'not the same model as'),
    (['--layout', 'timm', '--out', KEPT], 'would be lost'),
    (['--layout', 'timm', '--onnx'], 'two files'),
    (['--size', '64'], '--size is for --onnx'),
    (['--timm-model', 'resnet18'], '--timm-model is for'),
    (['--onnx', '--size', '0'], 'argument --size: '),
    (['--onnx', '--out', KEPT], 'would be lost'),
])
def test_bad_input(tmp_path, args, words):
    result = export(*args, cwd=tmp_path, check=False)
    assert result.returncode != 0 and words in result.stdout
    assert 'Traceback' not in result.stdout


def test_a_model_that_only_looks_alike():
    """Its shapes are the same; its downsampling is not."""
    with pytest.raises(ConfigError, match="'legacy_seresnet50'.*not the same"):
        to_timm({}, CASES['seresnet50'], 'legacy_seresnet50')


def test_families():
    cfg = dict(type='mmpretrain.HRNet', arch='w18')
    with pytest.raises(ConfigError, match='(?s)HRNet.*ConvNeXt.*--timm-model'):
        to_timm({}, cfg)
    cfg = CASES['resnet18']
    with pytest.raises(ConfigError, match='(?s)missing keys.*conv1.weight'):
        to_timm({}, cfg)


def test_a_stem_that_timm_has_not():
    cfg = vit(type='mmsinger.VisionTransformerWithRegisters', num_registers=1,
              patch_cfg=dict(conv_type='mmsinger.ConvStem'))
    with pytest.raises(ConfigError, match='ConvStem for its patches'):
        to_timm({}, cfg)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ConfigError, match=r'pip install .mmsinger\[timm\]'):
        to_timm({}, vit())
