"""The frozen teacher: a backbone that is only ever read."""
import functools
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from mmsinger.checkpoint import load_strict, read_weights
from mmsinger.errors import ConfigError
from mmsinger.images import check_scale
from mmsinger.models.features.anatomy import (Blocks, Layer, find_blocks,
                                              fixed_input_size, image_channels)
from mmsinger.models.features.taps import BlockTaps, own_precision
from mmsinger.models.features.tokens import Grid
from mmsinger.models.teachers.feature_cache import FeatureCache
from mmsinger.registry import MODELS, checked
from mmsinger.schema import Count, Natural, Positive

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16}


class Normalisation(NamedTuple):
    """Per-channel mean and std of images, in pixel units of 0 to 255; None
    stands for not normalised."""
    mean: Optional[Tuple[float, ...]] = None
    std: Optional[Tuple[float, ...]] = None

    def apply(self, images: Tensor) -> Tensor:
        """Normalise images (B, C, H, W)."""
        if self.mean is None:
            return images
        return (images - _channels(self.mean, images)) / _channels(
            self.std, images)

    def undo(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) as they were before."""
        if self.mean is None:
            return images
        return images * _channels(self.std, images) + _channels(
            self.mean, images)


class FrozenModule(nn.Module):
    """A pretrained module that gives outputs and never changes.

    Its parameters do not require gradients, it is in evaluation mode whatever
    ``train()`` is called with (dropout and drop path off), and
    :class:`BaseDistiller` keeps it out of ``state_dict()`` and
    ``parameters()``. A copy of a distiller (an EMA model, say) shares it.

    Args:
        module (dict): Config of the module. Write the scope, as in
            ``type='mmpretrain.VisionTransformer'``.
        checkpoint (str, optional): Its weights, from any file that holds
            them under ``prefix``. None leaves them random, with a warning:
            for tests only. An ``init_cfg`` of type Pretrained in ``module``
            means the same. Defaults to None.
        prefix (str): What the module's keys begin with in the checkpoint,
            for instance ``'backbone.'``. Defaults to ``''``.
        ignore_keys (Sequence[str]): Prefixes of keys, after ``prefix``, that
            the checkpoint may hold beside the module, for instance
            ``['head.']``. Any other left-over key is an error. Defaults to
            none.
        mean (Sequence[float], optional): The teacher's own normalisation,
            in RGB unless ``swap_channels``, 0 to 255. Defaults to None, the
            student's.
        std (Sequence[float], optional): See ``mean``.
        swap_channels (bool): Reverse the channel order before the teacher,
            for a student that is fed BGR. ``mean`` and ``std`` are in the
            teacher's order. Defaults to False.
        input_size (int | tuple[int, int], optional): Resize images to this
            (H, W) for the teacher. Defaults to None: the student's size, or
            the only one that the module takes; sizes that a backbone's
            patches do not divide are rounded to the nearest that they do.

    Raises:
        ConfigError: If a value is not valid.
    """

    # Who it is and under which key its module is, in config and messages
    role = place = 'teacher'
    part = 'module'
    example = "type='mmpretrain.VisionTransformer', arch='l', patch_size=16"

    def __init__(self,
                 module: dict,
                 /,
                 checkpoint: Optional[str] = None,
                 prefix: str = '',
                 ignore_keys: Union[str, Sequence[str]] = (),
                 mean: Optional[Sequence[float]] = None,
                 std: Optional[Sequence[Positive]] = None,
                 swap_channels: bool = False,
                 input_size: Union[Count, Tuple[Count, Count], None] = None
                 ) -> None:
        super().__init__()
        if not isinstance(module, dict) or 'type' not in module:
            raise ConfigError(
                f'{self.role}.{self.part} must be a config with a type, got '
                f'{module!r}. For instance dict({self.example}).')
        if (mean is None) != (std is None):
            raise ConfigError(f'{self.role}.mean and {self.role}.std belong '
                              f'together: got mean={mean}, std={std}.')
        if std is not None:
            check_scale(self.role, mean, std)
        module = dict(module)
        checkpoint, prefix = _weights_of_init_cfg(
            module.pop('init_cfg', None), checkpoint, prefix)
        self.add_module(self.part, MODELS.build(module))
        channels = image_channels(self.module)
        if mean is not None and len(mean) not in (1, channels):
            raise ConfigError(
                f'{self.role}.mean={list(mean)} is of {len(mean)} channels, '
                f'and the {type(self.module).__name__} takes images of '
                f'{channels}. Give one value for each channel.')
        self.checkpoint = checkpoint
        self.prefix = _with_dot(prefix)
        self.ignore_keys = [ignore_keys] if isinstance(ignore_keys, str) \
            else list(ignore_keys)
        self.normalisation = None if mean is None else Normalisation(
            tuple(mean), tuple(std))
        self.swap_channels = swap_channels
        self.input_size = fixed_input_size(self.module) \
            if input_size is None else tuple(to_2tuple(input_size))
        self.loaded = checkpoint is None
        self.dtype: Optional[torch.dtype] = None
        self.requires_grad_(False)
        self.train(False)

    @property
    def module(self) -> nn.Module:
        """What is frozen."""
        return getattr(self, self.part)

    def load_weights(self) -> None:
        """Load the checkpoint, strictly.

        Raises:
            ConfigError: If the file is missing or damaged, nothing in it
                begins with the prefix, or a key is missing, left over, or of
                another shape.
        """
        key = f'{self.role}.checkpoint'
        if self.checkpoint is None:
            print_log(f'{key} is None: the {self.role} has random weights, '
                      'so nothing useful will be '
                      f'{"distilled" if self.role == "teacher" else "read"}.',
                      logger='current', level=30)
            return
        weights = self.read_checkpoint(key)
        found = {k[len(self.prefix):]: v for k, v in weights.items()
                 if k.startswith(self.prefix)}
        if not found:
            tops = sorted({k.split('.')[0] + '.' for k in weights})
            if 'student.' in tops:
                raise ConfigError(
                    f'{key}={self.checkpoint!r} is a checkpoint of a '
                    f'distillation, which never holds the {self.role}. Give '
                    'the weights that it was distilled from.')
            raise ConfigError(
                f'{self.role}.prefix={self.prefix!r}: no key of '
                f'{self.checkpoint!r} begins with it. They begin with '
                f'{tops[:10]}; set {self.role}.prefix to one of these, or to '
                f"'' if the file holds the {self.part} alone.")
        module = self.module
        timm_model = getattr(module, 'timm_model', None)
        if timm_model is not None and \
                not any(k.startswith('timm_model.') for k in found):
            module = timm_model
        load_strict(
            module, found,
            what=f'{key}={self.checkpoint!r} does not fit '
            f'{self.role}.{self.part} ({type(self.module).__name__})',
            fix=self._loading_hint(found), ignore=self.ignore_keys)
        self.loaded = True
        print_log(f'{self.role.capitalize()} {type(self.module).__name__} '
                  f'loaded from {self.checkpoint}', logger='current')

    def cast(self, dtype: torch.dtype) -> None:
        """Store the weights and compute in another precision, under autocast
        too; what goes in and comes out is not affected."""
        self.dtype = dtype
        self.module.to(dtype)

    def read_checkpoint(self, key: str) -> Dict[str, Tensor]:
        """The weights in the checkpoint, by their keys there.

        Args:
            key (str): The config key that named the file, for messages.
        """
        return read_weights(self.checkpoint, key)

    def _loading_hint(self, found: dict) -> str:
        own = {k.split('.')[0] for k in self.module.state_dict()}
        if any(k.startswith('backbone.') for k in found) and \
                'backbone' not in own:
            return ("The file's keys begin with 'backbone.': set "
                    f"{self.role}.prefix='backbone.'.")
        if any(k.startswith('blocks.') for k in found) and 'layers' in own:
            return ('The file has timm keys (blocks.…) and the backbone has '
                    "mmpretrain's (layers.…): use type="
                    "'mmpretrain.TIMMBackbone', or convert the file with "
                    'tools/convert_checkpoint.py.')
        return (f'Make {self.role}.{self.part} the architecture that the '
                'file was saved from; list left-over heads in '
                f"{self.role}.ignore_keys, for instance ['head.'].")

    def check_loaded(self) -> None:
        """Raise RuntimeError before :meth:`load_weights`."""
        if not self.loaded:
            raise RuntimeError(
                f'The {self.role} has no weights yet. Call init_weights() on '
                'the distiller first; a Runner does.')

    def prepare(self, images: Tensor, normalisation: Normalisation) -> Tensor:
        """Images as the teacher expects them: channel order, normalisation,
        size.

        Args:
            images (Tensor): As the student receives them, (B, 3, H, W).
            normalisation (Normalisation): What they were normalised with, in
                their own channel order.

        Returns:
            Tensor: Shape (B, 3, H', W').
        """
        # Equal numbers in opposite channel orders are not the same thing.
        differs = self.normalisation is not None and (
            self.swap_channels or self.normalisation != normalisation)
        if differs:
            images = normalisation.undo(images)
        if self.swap_channels:
            images = images.flip(1)
        if differs:
            images = self.normalisation.apply(images)
        size = self.input_size or self.fitting_size(images.shape[-2:])
        if tuple(images.shape[-2:]) != tuple(size):
            images = nn.functional.interpolate(
                images, size=tuple(size), mode='bilinear',
                align_corners=False, antialias=True)
        return images

    def fitting_size(self, size: Tuple[int, int]) -> Tuple[int, int]:
        """The size nearest to (H, W) that the module takes."""
        return size

    def train(self, mode: bool = True) -> 'FrozenModule':
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def __deepcopy__(self, memo) -> 'FrozenModule':
        return self


@checked
class FrozenTeacher(FrozenModule):
    """A pretrained backbone that gives features and never changes.

    Args:
        backbone (dict): Config of the backbone alone; no head is built or
            run, no label is needed.
        layers (Sequence[int | str]): The blocks that feature methods distil
            unless their own ``layers`` says otherwise. Defaults to
            ``(17, 23)``, the paper's for 24 blocks.
        feature_cache (int): How many images to keep the tokens of, in
            memory, so that the teacher sees each only once. For small data
            sets and pipelines without random augmentation. Defaults to 0,
            none.
        **kwargs: ``checkpoint``, ``prefix``, ``ignore_keys``, ``mean``,
            ``std``, ``swap_channels``, ``input_size``: see
            :class:`FrozenModule`.

    Raises:
        ConfigError: If a value is not valid or the backbone is no vision
            transformer.
    """

    part = 'backbone'
    find_features = staticmethod(find_blocks)

    def __init__(self,
                 backbone: dict,
                 layers: Sequence[Layer] = (17, 23),
                 feature_cache: Natural = 0,
                 **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.blocks: Blocks = self.find_features(self.backbone, self.role)
        self.layers = layers
        self.feature_cache = feature_cache
        self._cached = FeatureCache(feature_cache)

    def load_weights(self) -> None:
        """See :class:`FrozenModule`; tokens of other weights are dropped."""
        super().load_weights()
        self.forget_images()

    def forget_images(self) -> None:
        """Drop the tokens in ``feature_cache``: the teacher has changed."""
        self._cached = FeatureCache(self.feature_cache)

    def forward(self, images: Tensor, layers: Sequence[int],
                normalisation: Normalisation, count: bool = True
                ) -> BlockTaps:
        """Run the backbone up to the deepest of some blocks.

        Args:
            images (Tensor): As the student receives them, (B, 3, H, W).
            layers (Sequence[int]): Indices of the blocks to record.
            normalisation (Normalisation): What the images were normalised
                with.
            count (bool): See :meth:`FeatureCache.recall`. Defaults to True.

        Returns:
            BlockTaps: The recorded outputs, raw (before any final norm),
            without gradients. Blocks can be run again through it.
        """
        self.check_loaded()

        def run(prepared: Tensor) -> BlockTaps:
            with torch.no_grad(), BlockTaps(
                    self.blocks, layers, stop=True, dtype=self.dtype) as taps:
                taps.run(self.backbone, prepared)
            return taps

        images = self.prepare(images, normalisation)
        if self.feature_cache:
            return self._cached.recall(images, layers, run, count)
        return run(images)

    @functools.cached_property
    def _stride(self) -> Grid:
        return self.blocks.stride

    def fitting_size(self, size: Tuple[int, int]) -> Tuple[int, int]:
        return tuple(max(1, round(length / step)) * step
                     for length, step in zip(size, self._stride))


def feature_settings(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of the :class:`FrozenTeacher` that a ``teacher`` in a
    config stands for.

    Args:
        cfg (dict): Of a :class:`FrozenTeacher`; or of a
            :class:`FrozenClassifier`, of whose model the backbone is taken.

    Returns:
        dict: A copy.

    Raises:
        ConfigError: If it names neither a backbone nor a model.
    """
    settings = {key: cfg[key] for key in cfg if key != 'type'}
    if 'model' in settings:
        whole = settings.pop('model')
        settings['backbone'] = whole.get('backbone', whole)
        settings['checkpoint'], prefix = _weights_of_init_cfg(
            whole.get('init_cfg'), settings.get('checkpoint'),
            settings.get('prefix'))
        settings['prefix'] = _with_dot(prefix) + 'backbone.'
    if 'backbone' not in settings:
        raise ConfigError('teacher must be dict(backbone=…, checkpoint=…), '
                          f'got the keys {sorted(settings)}.')
    return settings


@checked
class FrozenClassifier(FrozenModule):
    """A pretrained classifier or segmentor that gives class logits and never
    changes.

    Args:
        model (dict): Config of a whole model of any architecture, such as
            ``type='mmpretrain.ImageClassifier'`` or
            ``type='mmseg.EncoderDecoder'``.
        **kwargs: ``checkpoint``, ``prefix``, ``ignore_keys``, ``mean``,
            ``std``, ``swap_channels``, ``input_size``: see
            :class:`FrozenModule`.
    """

    part = 'model'
    example = "type='mmpretrain.ImageClassifier', backbone=…, head=…"

    def __init__(self, model: dict, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)

    @torch.no_grad()
    def forward(self, images: Tensor, normalisation: Normalisation) -> Tensor:
        """Class logits.

        Args:
            images (Tensor): As the student receives them, (B, 3, H, W).
            normalisation (Normalisation): What they were normalised with.

        Returns:
            Tensor: Shape (B, K), or (B, K, h, w) of a segmentor.
        """
        self.check_loaded()
        images = self.prepare(images, normalisation)
        with own_precision(images, self.dtype) as images:
            logits = self.model(images)
        return logits if self.dtype is None else logits.float()


def _weights_of_init_cfg(
        init_cfg: Any, checkpoint: Optional[str], prefix: Optional[str]
) -> Tuple[Optional[str], Optional[str]]:
    """Checkpoint and prefix, from a Pretrained ``init_cfg`` where there is no
    checkpoint."""
    if checkpoint is None and isinstance(init_cfg, dict) and \
            init_cfg.get('type') == 'Pretrained':
        return init_cfg['checkpoint'], prefix or init_cfg.get('prefix')
    return checkpoint, prefix


def _with_dot(prefix: Optional[str]) -> str:
    return f'{prefix}.' if prefix and prefix[-1] != '.' else prefix or ''


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    # Python numbers through full(), not tensor(): no copy from host memory
    return torch.stack([like.new_full((), value) for value in values]
                       ).view(1, -1, 1, 1)
