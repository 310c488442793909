"""Features in memory: computed once, where that is right."""
import pytest
import torch
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset

import tiny
from mmsinger.engine.hooks import CacheFeaturesHook
from mmsinger.engine.hooks.cache_features_hook import (CachedFeatures,
                                                       check_not_random)
from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS


def test_batches_of_kept_features():
    features = torch.randn(7, 2)
    for copies in (False, True):
        dataset = CachedFeatures(features, [
            BaseDataElement(metainfo=dict(i=i)) for i in range(7)], copies)
        assert len(dataset) == 7
        batch = dataset.__getitems__([6, 0, 4])
        assert torch.equal(batch['inputs'][0], features[[6, 0, 4]])
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

    def __init__(self, model, dataset):
        import logging
        from types import SimpleNamespace

        from mmengine.dataset import pseudo_collate
        self.model = model
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


def test_hook_replaces_the_loader_once():
    runner = Runner(seg_model(FROZEN), Images())
    hook = CacheFeaturesHook(chunk_size=4)
    state = torch.get_rng_state()
    hook.before_test(runner)
    assert torch.equal(torch.get_rng_state(), state)
    loader = runner.test_loop.dataloader
    hook.before_test(runner)
    assert runner.test_loop.dataloader is loader
    batches = list(loader)
    assert [len(b['inputs'][0]) for b in batches] == [4, 2]
    images = torch.stack([Images()[i]['inputs'] for i in range(4)])
    found = runner.model.data_preprocessor(batches[0], False)['inputs']
    assert torch.equal(runner.model.backbone(found)[0],
                       runner.model.backbone(images)[0])


@pytest.mark.parametrize('other', [1, 5])  # in the first chunk, in another
def test_images_of_two_sizes_are_refused(other):
    sizes = Images(lambda x, i: x[:, :16] if i == other else x)
    with pytest.raises(ConfigError, match='differ in size.*16, 32'):
        CacheFeaturesHook(chunk_size=4).before_test(
            Runner(seg_model(FROZEN), sizes))


def test_what_the_hook_refuses():
    trained = Runner(seg_model(tiny.vit(out_type='featmap')), Images())
    with pytest.raises(ConfigError, match='is a VisionTransformer'):
        CacheFeaturesHook().before_test(trained)
    with pytest.raises(ConfigError, match='chunk_size'):
        CacheFeaturesHook(chunk_size=0)
    broken = Runner(seg_model(FROZEN), Images())
    next(broken.model.backbone.parameters()).data.fill_(torch.inf)
    with pytest.raises(ConfigError, match='not finite'):
        CacheFeaturesHook().before_test(broken)
