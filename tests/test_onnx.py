"""Students as ONNX graphs, for any number of images."""
import os
import sys

import pytest
import torch
from mmengine.config import Config

import forked
import keep_run
import tiny
from mmsinger.converters import export_onnx
from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
KEPT = os.path.join(tiny.TESTS, 'data', 'run_0.1.0', 'epoch_2.pth')


def run(path, images):
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider'])
    output, = session.run(['output'], dict(image=images.numpy()))
    return torch.from_numpy(output)


def test_tool(tmp_path):
    result = forked.run(
        'export_student.py', KEPT, '--config', keep_run.CONFIG, '--onnx',
        '--out', 'student.onnx', cwd=tmp_path)
    assert 'student.onnx: image (N, 3, 32, 32)' in result.stdout
    expected = torch.from_numpy(
        keep_run.outputs(KEPT.replace('.pth', '_student.pth')))
    images = keep_run.images()
    for count in (1, 2):
        torch.testing.assert_close(
            run(tmp_path / 'student.onnx', images[:count]), expected[:count],
            rtol=0, atol=1e-5)
    assert os.listdir(tmp_path) and not [
        name for name in os.listdir(tmp_path) if name.endswith('.tmp')]


# Two heads, and attention in windows, whose own code fixes the batch size
MODELS_ = {
    'classifier': dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='mmpretrain.SwinTransformer', img_size=64,
                      window_size=4, arch=dict(
                          embed_dims=8, depths=[1, 2], num_heads=[1, 2]),
                      out_indices=(1, )),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=3,
                  in_channels=16)),
    'segmentor': dict(
        type='mmseg.EncoderDecoder',
        backbone=dict(type='mmseg.ResNet', depth=18, base_channels=8),
        decode_head=dict(type='mmseg.FCNHead', in_channels=64, channels=8,
                         num_classes=3, num_convs=1),
        test_cfg=dict(mode='whole')),
}


@pytest.mark.parametrize('name', MODELS_)
def test_models(tmp_path, name):
    pytest.importorskip('mmseg')
    model = tiny.build(MODELS_[name])
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    path, shape = export_onnx(
        str(tmp_path / 'model.pth'), Config(dict(model=MODELS_[name])),
        size=(64, 64))
    assert path == str(tmp_path / 'model_student.onnx')
    assert shape == (3, 64, 64)
    images = torch.randn(3, *shape)
    with torch.no_grad():
        expected = model(images)
    assert expected.shape[:2] == (3, 3)
    torch.testing.assert_close(run(path, images), expected, rtol=0,
                               atol=1e-5 * expected.abs().max().item())


@MODELS.register_module(force=True)
class Constant(torch.nn.Module):
    """Makes a constant of the number of images."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return self.linear(image) * float(image.shape[0])


def test_a_graph_that_computes_something_else(tmp_path):
    cfg = dict(type='mmsinger.Constant')
    torch.save(MODELS.build(cfg).state_dict(), tmp_path / 'model.pth')
    with pytest.raises(ConfigError, match='batches of any size'):
        export_onnx(str(tmp_path / 'model.pth'), Config(dict(model=cfg)),
                    size=(8, 8))
    assert os.listdir(tmp_path) == ['model.pth']


def test_without_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ConfigError, match=r'onnxscript.*mmsinger\[onnx\]'):
        export_onnx('model.pth', Config(dict(model={})))
