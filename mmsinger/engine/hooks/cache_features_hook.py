"""A frozen backbone is run over a small data set once, not every epoch."""
import os
from typing import Any, Dict, Iterator, List, Optional

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmsinger.engine.hooks.random_state_hook import random_states
from mmsinger.engine.hooks.target_norm_hook import preserved_random_states
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, check_choice
from mmsinger.files import add_tensor, atomic_save, content_hash
from mmsinger.models.features.tokens import Grid, Tokens
from mmsinger.models.probes.frozen_backbone import FrozenBackbone
from mmsinger.registry import HOOKS

FORMAT = 1  # raise it when the same key would stand for other tokens


@HOOKS.register_module()
class CacheFeaturesHook(Hook):
    """Trains and tests a head on stored tokens of a :class:`FrozenBackbone`.

    Before training and testing, each data set is read once, image by image.
    The block's raw tokens are stored in files of ``chunk_size`` images, whose
    name is a hash of the preprocessed images themselves and of the backbone's
    weights, config and layer. Whatever changes a token changes the name, so a
    file is never stale, and tasks that see the same images share them. Files
    appear complete or not at all; an interrupted run goes on where it was.
    The folder may be deleted at any time.

    Then the loaders, in the order that they had, give these tokens, and the
    annotations, which stay in memory. This is for data sets of some thousand
    small images of one size whose pipelines are not random.

    Args:
        folder (str, optional): Where the files are. Defaults to None,
            ``features`` in the work dir.
        chunk_size (int): Images in a file, and in a pass of the backbone.
            Defaults to 250.
        dtype (str): ``'float32'``, or ``'float16'`` for half the space and
            rounded tokens. Defaults to ``'float32'``.
    """

    priority = 'LOW'  # other hooks see the images' data set in before_train

    def __init__(self, folder: Optional[str] = None, chunk_size: int = 250,
                 dtype: str = 'float32') -> None:
        check_choice('CacheFeaturesHook.dtype', dtype,
                     ('float32', 'float16'))
        if chunk_size < 1:
            raise ConfigError('CacheFeaturesHook.chunk_size must be at least '
                              f'1, got {chunk_size}.')
        self.folder = folder
        self.chunk_size = chunk_size
        self.dtype = dtype

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
        """Let a loop's loader give stored tokens."""
        loader = loop.dataloader
        if isinstance(loader.dataset, CachedTokens):
            return
        model = unwrap(runner.model)
        backbone = getattr(model, 'backbone', None)
        if not isinstance(backbone, FrozenBackbone):
            raise ConfigError(
                'CacheFeaturesHook: model.backbone is a '
                f'{type(backbone).__name__}; it must be a '
                "'mmsinger.FrozenBackbone', since others change in training. "
                'Take the hook out of custom_hooks.')
        if not isinstance(model.data_preprocessor, TokenPreprocessor):
            model.data_preprocessor = TokenPreprocessor(
                model.data_preprocessor)
        preprocess = model.data_preprocessor.images
        if training and getattr(preprocess, 'batch_augments', None):
            raise ConfigError(
                'CacheFeaturesHook: model.train_cfg mixes images at random. '
                'Take the augments or the hook out.')
        folder = self.folder or os.path.join(runner.work_dir, 'features')
        with preserved_random_states(seed=0):
            check_not_random(loader.dataset)
            store = TokenStore(folder, backbone,
                               getattr(torch, self.dtype))
            dataset = CachedTokens(self.chunk_size, copies=not training)
            if not is_main_process():
                barrier()
            for batch in self._batches(loader):
                batch = preprocess(batch, training)
                dataset.add(store(batch['inputs']), batch['data_samples'])
            if is_main_process():
                barrier()
        runner.logger.info(
            f'{len(dataset)} images: {store.computed} passed the backbone, '
            f'the tokens of {len(dataset) - store.computed} were in {folder}')
        if loader.batch_size is None:
            order = dict(batch_sampler=loader.batch_sampler)
        else:
            order = dict(sampler=loader.sampler, batch_size=loader.batch_size,
                         drop_last=loader.drop_last)
        loop.dataloader = DataLoader(dataset, collate_fn=_as_it_is, **order)

    def _batches(self, loader: DataLoader) -> Iterator[Dict[str, Any]]:
        dataset = loader.dataset
        shape = None
        for start in range(0, len(dataset), self.chunk_size):
            stop = min(start + self.chunk_size, len(dataset))
            items = [dataset[i] for i in range(start, stop)]
            for item in items:
                shape = shape or item['inputs'].shape
                if item['inputs'].shape != shape:
                    raise ConfigError(
                        'CacheFeaturesHook: the images differ in size, '
                        f'{tuple(shape[1:])} and '
                        f'{tuple(item["inputs"].shape[1:])}. Bring them to '
                        'one size in the pipeline, or take the hook out of '
                        'custom_hooks.')
            yield loader.collate_fn(items)


def check_not_random(dataset: Dataset, count: int = 8) -> None:
    """Raise :class:`ConfigError` if loading an item draws random numbers, or
    gives another image the second time.

    Args:
        dataset (Dataset): With ``inputs`` in its items.
        count (int): Items to try, evenly spaced. Defaults to 8.
    """
    total = len(dataset)
    for i in sorted({i * total // count for i in range(count)}):
        before = random_states()
        first = dataset[i]['inputs']
        drawn = not _equal(before, random_states())
        if drawn or not torch.equal(first, dataset[i]['inputs']):
            raise ConfigError(
                f'CacheFeaturesHook: the pipeline of {type(dataset).__name__}'
                ' is random, so its features cannot be computed once. Use '
                'the test pipeline for training too, or take the hook out of '
                'custom_hooks. The pipeline is:\n'
                f'{getattr(dataset, "pipeline", "")}')


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return all(map(_equal, first, second))
    return first == second


class TokenStore:
    """Tokens of images, from files or from the backbone.

    Args:
        folder (str): Where the files are.
        backbone (FrozenBackbone): Whose tokens they are.
        dtype (torch.dtype): Of the files.
    """

    def __init__(self, folder: str, backbone: FrozenBackbone,
                 dtype: torch.dtype) -> None:
        self.folder = folder
        self.backbone = backbone
        self.dtype = dtype
        self.computed = 0
        self._hash = content_hash(
            [FORMAT, str(dtype), backbone.layer, backbone.input_size,
             backbone.config], backbone.state_dict())
        os.makedirs(folder, exist_ok=True)

    def __call__(self, images: Tensor) -> Tokens:
        """The tokens of preprocessed images (B, 3, H, W), memory-mapped."""
        key = self._hash.copy()
        add_tensor(key, images)
        path = os.path.join(self.folder, f'{key.hexdigest()[:40]}.pth')
        if not os.path.isfile(path):
            self._write(path, self.backbone.tokens(images))
            self.computed += len(images)
        content = torch.load(path, mmap=True, weights_only=True)
        return Tokens(content['values'], tuple(content['grid']))

    def _write(self, path: str, tokens: Tokens) -> None:
        values = tokens.values.cpu().to(self.dtype)
        if not torch.isfinite(values).all():
            raise ConfigError(
                'CacheFeaturesHook: the backbone gives tokens that are not '
                f'finite in {self.dtype}. Check its weights; what is beyond '
                "float16 needs dtype='float32'.")
        atomic_save(dict(values=values, grid=tokens.grid), path, sync=False)


class CachedTokens(Dataset):
    """Stored tokens and annotations, a batch at a time.

    Args:
        chunk_size (int): Images in each chunk but the last.
        copies (bool): Give copies of the annotations: predictions are
            written into them.
    """

    def __init__(self, chunk_size: int, copies: bool) -> None:
        self.chunk_size = chunk_size
        self.copies = copies
        self.chunks: List[Tensor] = []
        self.samples: List[Any] = []
        self.grid: Optional[Grid] = None

    def add(self, tokens: Tokens, samples: List[Any]) -> None:
        """Append a chunk: tokens (B, N, C) and B annotations."""
        self.chunks.append(tokens.values)
        self.samples.extend(samples)
        self.grid = tokens.grid

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: List[int]) -> Dict[str, Any]:
        values = torch.stack([
            self.chunks[i // self.chunk_size][i % self.chunk_size]
            for i in indices])
        samples = [self.samples[i] for i in indices]
        if self.copies:
            samples = [sample.new() for sample in samples]
        return dict(inputs=Tokens(values, self.grid), data_samples=samples)


def _as_it_is(batch: Dict[str, Any]) -> Dict[str, Any]:
    return batch


class TokenPreprocessor(BaseDataPreprocessor):
    """Lets batches of :class:`CachedTokens`, which are preprocessed, pass.

    Args:
        images (nn.Module): The preprocessor of all other batches.
    """

    def __init__(self, images: nn.Module) -> None:
        super().__init__()
        self.images = images

    def forward(self, data: Dict[str, Any], training: bool = False
                ) -> Dict[str, Any]:
        """Preprocess images, or bring tokens to the model's device."""
        if not isinstance(data['inputs'], Tokens):
            return self.images(data, training)
        values, grid = data['inputs']
        values = values.to(self.images.device, torch.float32)
        return dict(data, inputs=Tokens(values, grid))
