"""A frozen backbone is run over a small data set once, not every epoch."""
import random
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmsinger.engine.random_states import preserved_random_states
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError
from mmsinger.images import dataset_batches
from mmsinger.models.probes.frozen_backbone import FrozenBackbone
from mmsinger.registry import HOOKS
from mmsinger.schema import Count


@HOOKS.register_module()
class CacheFeaturesHook(Hook):
    """Trains and tests a head on features of a :class:`FrozenBackbone` that
    are computed once and kept in memory.

    Before training and testing, each data set passes the backbone once, in
    every process of a distributed run. Then the loaders, in the order that
    they had, give what the head gets, in float32, and the annotations. This
    is for data sets of some thousand small images of one size whose pipelines
    are not random.

    Args:
        chunk_size (int): Images in a pass of the backbone. Defaults to 250.
    """

    priority = 'LOW'  # other hooks see the images' data set in before_train

    def __init__(self, chunk_size: Count = 250) -> None:
        self.chunk_size = chunk_size

    def before_train(self, runner) -> None:
        loop = runner.train_loop
        self._cache(runner, loop, training=True)
        if hasattr(loop, 'dataloader_iterator'):  # counted in iterations
            loop.dataloader_iterator = type(loop.dataloader_iterator)(
                loop.dataloader)
        if runner.val_loop is not None:
            self._cache(runner, runner.val_loop)

    def before_val(self, runner) -> None:
        self._cache(runner, runner.val_loop)

    def before_test(self, runner) -> None:
        self._cache(runner, runner.test_loop)

    def _cache(self, runner, loop, training: bool = False) -> None:
        """Let a loop's loader give features."""
        loader = loop.dataloader
        if isinstance(loader.dataset, CachedFeatures):
            return
        model = unwrap(runner.model)
        backbone = dict(model.named_children()).get('backbone')
        if not isinstance(backbone, FrozenBackbone):
            raise ConfigError(
                'CacheFeaturesHook: model.backbone is a '
                f'{type(backbone).__name__}; it must be a '
                "'mmsinger.FrozenBackbone', since others change in training. "
                'Take the hook out of custom_hooks.')
        if not isinstance(model.data_preprocessor, FeaturePreprocessor):
            model.data_preprocessor = FeaturePreprocessor(
                model.data_preprocessor)
        preprocess = model.data_preprocessor.images
        if training and getattr(preprocess, 'batch_augments', None):
            raise ConfigError(
                'CacheFeaturesHook: model.train_cfg mixes images at random. '
                'Take the augments or the hook out.')
        chunks, samples, sizes = [], [], set()

        def collate(items: List[dict]) -> Dict[str, Any]:
            sizes.update(tuple(item['inputs'].shape[1:]) for item in items)
            if len(sizes) > 1:
                raise ConfigError(
                    'CacheFeaturesHook: the images differ in size, '
                    f'{" and ".join(map(str, sorted(sizes)[:2]))}. Bring '
                    'them to one size in the pipeline, or take the hook out '
                    'of custom_hooks.')
            return loader.collate_fn(items)

        with preserved_random_states(seed=0):
            check_not_random(loader.dataset)
            for batch in dataset_batches(
                    loader.dataset, range(len(loader.dataset)),
                    self.chunk_size, preprocess, training, collate):
                chunks.append(backbone(batch['inputs'])[0].float().cpu())
                samples.extend(batch['data_samples'])
        features = torch.cat(chunks)
        if not torch.isfinite(features).all():
            raise ConfigError('CacheFeaturesHook: the backbone gives tokens '
                              'that are not finite. Check its weights.')
        runner.logger.info(f'{len(samples)} images passed the backbone; '
                           'their features are kept in memory')
        if loader.batch_size is None:
            order = dict(batch_sampler=loader.batch_sampler)
        else:
            order = dict(sampler=loader.sampler, batch_size=loader.batch_size,
                         drop_last=loader.drop_last)
        loop.dataloader = DataLoader(
            CachedFeatures(features, samples, copies=not training),
            collate_fn=lambda batch: batch, **order)


def check_not_random(dataset: Dataset) -> None:
    """Raise :class:`ConfigError` if loading an item of a data set, with
    ``inputs`` in it, draws random numbers, or gives another image the second
    time; eight are tried, evenly spaced."""
    total = len(dataset)
    with preserved_random_states(seed=0):
        expected = _next_numbers()
    for i in sorted({i * total // 8 for i in range(8)}):
        with preserved_random_states(seed=0):
            first = dataset[i]['inputs']
            drawn = _next_numbers() != expected
        if drawn or not torch.equal(first, dataset[i]['inputs']):
            raise ConfigError(
                f'CacheFeaturesHook: the pipeline of {type(dataset).__name__}'
                ' is random, so its features cannot be computed once. Use '
                'the test pipeline for training too, or take the hook out of '
                'custom_hooks. The pipeline is:\n'
                f'{getattr(dataset, "pipeline", "")}')


def _next_numbers() -> Tuple[float, ...]:
    return random.random(), np.random.rand(), torch.rand(()).item()


class CachedFeatures(Dataset):
    """Features and annotations, a batch at a time.

    Args:
        features (Tensor): What the head gets of each image, (n, C) or
            (n, C, h, w).
        samples (list): The n annotations.
        copies (bool): Give copies of the annotations: predictions are
            written into them.
    """

    def __init__(self, features: Tensor, samples: List[Any], copies: bool
                 ) -> None:
        self.features = features
        self.samples = samples
        self.copies = copies

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: List[int]) -> Dict[str, Any]:
        samples = [self.samples[i] for i in indices]
        if self.copies:
            samples = [sample.new() for sample in samples]
        return dict(inputs=(self.features[indices], ), data_samples=samples)


class FeaturePreprocessor(BaseDataPreprocessor):
    """Lets batches of :class:`CachedFeatures`, which are preprocessed, pass.

    Args:
        images (nn.Module): The preprocessor of all other batches.
    """

    def __init__(self, images: nn.Module) -> None:
        super().__init__()
        self.images = images

    def forward(self, data: Dict[str, Any], training: bool = False
                ) -> Dict[str, Any]:
        """Preprocess images, or bring features to the model's device."""
        if not isinstance(data['inputs'], tuple):
            return self.images(data, training)
        return dict(data, inputs=tuple(
            features.to(self.images.device) for features in data['inputs']))
