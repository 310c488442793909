"""Teacher tokens kept from one epoch to the next."""
import hashlib
from typing import Callable, Dict, List, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmsinger.models.features.taps import BlockTaps


class FeatureCache:
    """Teacher tokens by image, for training without random augmentation.

    An image is known by its pixels, so nothing has to be told when data or
    order change. One that was augmented at random is never seen again: the
    log warns if that is so.

    Args:
        capacity (int): Images to keep; others are computed every time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen = self.recalled = 0
        self._warn_at = 4 * capacity
        self._tokens: Dict[bytes, List[Tensor]] = {}
        # Grid and extra arguments of the blocks do not depend on the image
        self._examples: Dict[tuple, BlockTaps] = {}

    def recall(self, images: Tensor, layers: Sequence[int],
               run: Callable[[Tensor], BlockTaps], count: bool = True
               ) -> BlockTaps:
        """Tokens of a batch, computed only for images that are new.

        Args:
            images (Tensor): As the teacher takes them, (B, 3, H, W).
            layers (Sequence[int]): Indices of the blocks to record.
            run (Callable): The teacher's pass over such images.
            count (bool): Whether they are of an epoch, in which none coming a
                second time is worth a warning. Defaults to True.

        Returns:
            BlockTaps: As of a pass over the whole batch.
        """
        layers = sorted(set(layers))
        # What tokens depend on, beside pixels and weights; under autocast
        # those that calibration took in full precision are as good
        kind = (tuple(layers), tuple(images.shape[1:]), images.dtype,
                images.device)
        pixels = images.detach().cpu().contiguous()
        if pixels.dtype == torch.bfloat16:  # which numpy lacks
            pixels = pixels.float()
        keys = [hashlib.blake2b(repr(kind).encode() + image.tobytes(),
                                digest_size=16).digest()
                for image in pixels.numpy()]
        tokens = {key: self._tokens[key] for key in keys
                  if key in self._tokens}
        if count:
            self._count(len(keys), sum(key in tokens for key in keys))
        new = {key: i for i, key in enumerate(keys) if key not in tokens}
        if new:
            taps = run(images[list(new.values())])
            self._examples[kind] = taps.with_outputs({})
            batches = [taps.tokens(layer).values for layer in layers]
            for row, key in enumerate(new):
                tokens[key] = [batch[row].clone() for batch in batches]
                if len(self._tokens) < self.capacity:
                    self._tokens[key] = tokens[key]
        return self._examples[kind].with_outputs({
            layer: torch.stack([tokens[key][n] for key in keys])
            for n, layer in enumerate(layers)})

    def _count(self, seen: int, recalled: int) -> None:
        self.seen += seen
        self.recalled += recalled
        if self.seen >= self._warn_at and not self.recalled:
            self._warn_at *= 4
            print_log(
                f'teacher.feature_cache={self.capacity}: none of {self.seen} '
                'images came a second time, so the cache only costs so far. '
                'If a pass over the data has fewer images, take random '
                'augmentation out of the train pipeline; if it has more, a '
                'larger cache spares more. feature_cache=0 switches it off.',
                logger='current', level=30)
