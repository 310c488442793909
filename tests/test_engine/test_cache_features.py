"""Stored tokens: the right ones, or new ones."""
import os

import pytest
import torch
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset

import tiny
from mmsinger.engine.hooks import CacheFeaturesHook
from mmsinger.engine.hooks.cache_features_hook import (CachedTokens,
                                                       TokenStore,
                                                       check_not_random)
from mmsinger.errors import ConfigError
from mmsinger.models import FrozenBackbone
from mmsinger.models.features.tokens import Tokens
from mmsinger.registry import MODELS


def store(folder, seed=0, dtype=torch.float32, **kwargs):
    """A store, with the weights of a seed."""
    torch.manual_seed(seed)
    cfg = {k: kwargs.pop(k) for k in ('layer', 'input_size') if k in kwargs}
    backbone = FrozenBackbone(tiny.vit(**kwargs), **cfg)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return TokenStore(str(folder), backbone, dtype)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_backbones(tmp_path):
    first = store(tmp_path)
    tokens = first(IMAGES)
    expected = first.backbone.tokens(IMAGES)
    assert torch.equal(tokens.values, expected.values)
    assert tokens.grid == expected.grid == (4, 4)
    again = store(tmp_path)
    assert torch.equal(again(IMAGES).values, expected.values)
    assert (first.computed, again.computed) == (3, 0)


@pytest.mark.parametrize('change', [
    dict(seed=1), dict(layer=2), dict(input_size=64), dict(pre_norm=True),
    dict(patch_size=16), dict(qkv_bias=False), dict(final_norm=False),
    dict(dtype=torch.float16),
    dict(arch=dict(embed_dims=32, num_layers=4, num_heads=2,
                   feedforward_channels=64)),
], ids=lambda change: next(iter(change)))
def test_another_backbone_has_other_tokens(tmp_path, change):
    """num_heads, for one, is in no weight."""
    store(tmp_path)(IMAGES)
    other = store(tmp_path, **change)
    other(IMAGES)
    assert other.computed == 3
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize('change', [
    lambda x: x + 1e-6 * (torch.arange(x.numel()) == 99).view_as(x),
    lambda x: x.flip(0), lambda x: x.flip(3), lambda x: x[:2]])
def test_another_image_has_other_tokens(tmp_path, change):
    first = store(tmp_path)
    first(IMAGES)
    images = change(IMAGES)
    found = first(images)
    assert first.computed == 3 + len(images)
    assert torch.equal(found.values, first.backbone.tokens(images).values)


def test_one_changed_weight_is_noticed(tmp_path):
    store(tmp_path)(IMAGES)
    changed = store(tmp_path).backbone
    with torch.no_grad():
        changed.backbone.layers[0].attn.qkv.bias[-1] += 1e-4
    other = TokenStore(str(tmp_path), changed, torch.float32)
    other(IMAGES)
    assert other.computed == 3


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    first = store(tmp_path)

    def save(content, file):
        file.write(b'half')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', save)
        with pytest.raises(KeyboardInterrupt):
            first(IMAGES)
    assert os.listdir(tmp_path) == []
    assert torch.equal(first(IMAGES).values,
                       first.backbone.tokens(IMAGES).values)


def test_float16(tmp_path):
    half = store(tmp_path, dtype=torch.float16)
    tokens = half(IMAGES).values
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(
        tokens.float(), half.backbone.tokens(IMAGES).values, rtol=1e-3,
        atol=1e-3)
    with torch.no_grad():
        half.backbone.backbone.layers[-1].ffn.layers[1].bias[0] = 1e6
    with pytest.raises(ConfigError, match="dtype='float32'"):
        TokenStore(str(tmp_path), half.backbone, torch.float16)(IMAGES)
    assert len(os.listdir(tmp_path)) == 1


def test_batches_of_stored_tokens():
    values = torch.randn(7, 5, 2)
    for copies in (False, True):
        dataset = CachedTokens(3, copies)
        for start in range(0, 7, 3):
            dataset.add(Tokens(values[start:start + 3], (2, 2)), [
                BaseDataElement(metainfo=dict(i=i))
                for i in range(start, min(start + 3, 7))])
        assert len(dataset) == 7
        batch = dataset.__getitems__([6, 0, 4])
        assert torch.equal(batch['inputs'].values, values[[6, 0, 4]])
        assert [s.i for s in batch['data_samples']] == [6, 0, 4]
        batch['data_samples'][0].set_field(1, 'prediction')
        assert ('prediction' in dataset.samples[6]) != copies


class Images(Dataset):
    """Items that a function makes of images."""
    pipeline = 'the pipeline'

    def __init__(self, change=lambda x, i: x, count=6):
        self.change = change
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = torch.full((3, 32, 32), float(i))
        return dict(inputs=self.change(image, i),
                    data_samples=BaseDataElement(metainfo=dict(i=i)))


@pytest.mark.parametrize('change', [
    lambda x, i: x + torch.rand(()),
    lambda x, i: x + __import__('random').random(),
    lambda x, i: x + __import__('numpy').random.rand(),
    # drawn and without effect, most of the time
    lambda x, i: x.flip(0) if torch.rand(()) > 0.999 else x,
    # a generator of its own
    lambda x, i, g=torch.Generator(): x + torch.rand((), generator=g),
])
def test_random_pipelines_are_refused(change):
    with pytest.raises(ConfigError, match='Images is random.*\n.*pipeline'):
        check_not_random(Images(change))
    check_not_random(Images())
    check_not_random(Images(count=1))


class Runner:
    """What the hook reads of a runner."""

    def __init__(self, model, work_dir, dataset):
        import logging
        from types import SimpleNamespace

        from mmengine.dataset import pseudo_collate
        self.model = model
        self.work_dir = str(work_dir)
        self.logger = logging.getLogger('test')
        self.test_loop = SimpleNamespace(dataloader=DataLoader(
            dataset, batch_size=4, collate_fn=pseudo_collate))


def seg_model(backbone, **kwargs):
    return MODELS.build(dict(
        type='mmseg.EncoderDecoder', backbone=backbone,
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor'),
        decode_head=dict(
            type='mmseg.FCNHead', in_channels=32, channels=32, num_convs=0,
            concat_input=False, num_classes=2), test_cfg=dict(mode='whole'),
        **kwargs))


FROZEN = dict(type='mmsinger.FrozenBackbone', backbone=tiny.vit(),
              output='featmap')


def test_hook_replaces_the_loader_once(tmp_path):
    runner = Runner(seg_model(FROZEN), tmp_path, Images())
    hook = CacheFeaturesHook(chunk_size=4)
    hook.before_test(runner)
    assert len(os.listdir(tmp_path / 'features')) == 2  # 4 images and 2
    loader = runner.test_loop.dataloader
    state = torch.get_rng_state()
    hook.before_test(runner)
    assert runner.test_loop.dataloader is loader
    assert torch.equal(torch.get_rng_state(), state)
    batches = list(loader)
    assert [len(b['inputs'].values) for b in batches] == [4, 2]
    images = torch.stack([Images()[i]['inputs'] for i in range(4)])
    found = runner.model.data_preprocessor(batches[0], False)['inputs']
    assert torch.equal(runner.model.backbone(found)[0],
                       runner.model.backbone(images)[0])


def test_what_the_hook_refuses(tmp_path):
    sizes = Images(lambda x, i: x if i else x[:, :16])
    runner = Runner(seg_model(FROZEN), tmp_path, sizes)
    with pytest.raises(ConfigError, match='differ in size.*16, 32'):
        CacheFeaturesHook().before_test(runner)
    trained = Runner(seg_model(tiny.vit(out_type='featmap')), tmp_path,
                     Images())
    with pytest.raises(ConfigError, match='is a VisionTransformer'):
        CacheFeaturesHook().before_test(trained)
    with pytest.raises(ConfigError, match='dtype'):
        CacheFeaturesHook(dtype='float64')
    with pytest.raises(ConfigError, match='chunk_size'):
        CacheFeaturesHook(chunk_size=0)
