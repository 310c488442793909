"""Teacher tokens kept from one epoch to the next."""
import hashlib
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor

from mmsinger.errors import ConfigError
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.teachers.record_files import RecordFolder

THREADS = 8  # that look up images
FORMAT = 1  # raise it when the same folder would hold other tokens


class TokenMemory:
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
        self._tokens: Dict[bytes, List[Tensor]] = {}
        # Grid and extra arguments of the blocks do not depend on the image
        self._examples: Dict[tuple, BlockTaps] = {}
        self._map: Callable = map

    def check(self) -> None:
        """Called before training.

        Raises:
            ConfigError: If nothing can be kept.
        """

    def recall(self, images: Tensor, layers: Sequence[int],
               run: Callable[[Tensor], BlockTaps]) -> BlockTaps:
        """Tokens of a batch, computed only for images that are new.

        Args:
            images (Tensor): As the teacher takes them, (B, 3, H, W).
            layers (Sequence[int]): Indices of the blocks to record.
            run (Callable): The teacher's pass over such images.

        Returns:
            BlockTaps: As of a pass over the whole batch.
        """
        layers = sorted(set(layers))
        kind = self._kind(images, layers)
        keys = list(self._map(partial(self._key, kind), _as_bytes(images)))
        tokens = self._find(kind, keys)
        self._count(len(keys), sum(key in tokens for key in keys))
        new = {key: i for i, key in enumerate(keys) if key not in tokens}
        if new:
            taps = run(images[list(new.values())])
            self._examples[kind] = taps.with_outputs({})
            batches = [taps.tokens(layer).values for layer in layers]
            tokens.update(self._keep(kind, {
                key: [batch[row].clone() for batch in batches]
                for row, key in enumerate(new)}))
        return self._examples[kind].with_outputs({
            layer: torch.stack([tokens[key][n] for key in keys])
            for n, layer in enumerate(layers)})

    def _kind(self, images: Tensor, layers: Sequence[int]) -> tuple:
        """What tokens depend on, beside pixels and weights."""
        return (tuple(layers), tuple(images.shape[1:]), images.dtype,
                images.device)

    def _key(self, kind: tuple, image: np.ndarray) -> bytes:
        return hashlib.blake2b(
            repr(kind).encode() + image.tobytes(), digest_size=16).digest()

    def _find(self, kind: tuple, keys: List[bytes]
              ) -> Dict[bytes, List[Tensor]]:
        """Tokens (N, C) of each layer, of the images that are known."""
        return {key: self._tokens[key] for key in keys if key in self._tokens}

    def _keep(self, kind: tuple, new: Dict[bytes, List[Tensor]]
              ) -> Dict[bytes, List[Tensor]]:
        """Keep what there is room for; returns all, as they will be found."""
        for key, tokens in new.items():
            if len(self._tokens) < self.capacity:
                self._tokens[key] = tokens
        return new

    def _count(self, seen: int, recalled: int) -> None:
        self.seen += seen
        self.recalled += recalled
        if self.seen >= 4 * self.capacity and not self.recalled:
            print_log(
                f'teacher.remember={self.capacity}: none of {self.seen} '
                'images came a second time, so remembering only costs so '
                'far. Take random augmentation out of the train pipeline, or '
                'set teacher.remember=0.', logger='current', level=30)
            self.seen = 0


class _Store(NamedTuple):
    """Files for images of one kind, and what a record holds: for each layer
    the shape (N, C) and the dtype that the teacher gives."""
    records: RecordFolder
    shapes: List[Tuple[int, ...]]
    dtypes: List[torch.dtype]


class TokenFolder(TokenMemory):
    """Teacher tokens in files, from one run to the next.

    There is a folder for each teacher, set of layers, image size and
    precision; it is named by a hash of these, the teacher's by its content.
    In it, images are known by their pixels: see :class:`RecordFolder`.
    Whatever changes a token changes a name, so a file is never stale. Tokens
    are rounded to the files' dtype, those just computed too: an image has the
    same ones each time.

    The first image of each kind that a process meets is computed once more:
    what the blocks receive beside tokens is not in the files.

    Args:
        capacity (int): Images to keep, those found in the files included.
        folder (str): Where the folders are.
        dtype (torch.dtype): Of the files.
        identify (Callable): Gives the teacher's hash, see
            :func:`content_hash`; called when the first image comes.
    """

    def __init__(self, capacity: int, folder: str, dtype: torch.dtype,
                 identify: Callable[[], Any]) -> None:
        super().__init__(capacity)
        self.folder = folder
        self.dtype = dtype
        self._identify = identify
        self._teacher: Any = None
        self._stores: Dict[tuple, _Store] = {}
        self._writable = True
        # Hashing, reading and checking leave Python's lock to others
        self._map = ThreadPoolExecutor(THREADS).map

    def check(self) -> None:
        """See :class:`TokenMemory`; warns if tokens can be read only."""
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f'teacher.remember_in={self.folder!r} is no folder and '
                f'cannot be made: {error}. Name one that can be written, or '
                'leave it out: tokens are then remembered in memory.'
            ) from error
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            self._stop_writing(error)

    def recall(self, images: Tensor, layers: Sequence[int],
               run: Callable[[Tensor], BlockTaps]) -> BlockTaps:
        """See :class:`TokenMemory`."""
        kind = self._kind(images, sorted(set(layers)))
        if kind not in self._stores:
            self._open(kind, run(images[:1]))
        return super().recall(images, layers, run)

    def _kind(self, images: Tensor, layers: Sequence[int]) -> tuple:
        # Tokens are others under autocast; in memory the first ones win
        return (*super()._kind(images, layers), _product_dtype(images))

    def _key(self, kind: tuple, image: np.ndarray) -> bytes:
        # The kind is in the folder's name, but for the device
        return hashlib.blake2b(image, digest_size=16).digest()

    def _open(self, kind: tuple, taps: BlockTaps) -> None:
        layers, shape, dtype, _, precision = kind
        values = [taps.tokens(layer).values[0] for layer in layers]
        if self._teacher is None:
            self._teacher = self._identify()
        name = self._teacher.copy()
        name.update(repr([
            FORMAT, self.dtype, layers, shape, dtype, precision]).encode())
        size = sum(value.numel() for value in values) * \
            torch.finfo(self.dtype).bits // 8
        records = RecordFolder(
            os.path.join(self.folder, name.hexdigest()[:40]), size)
        if not self._stores:
            self._report(records)
        self._examples[kind] = taps.with_outputs({})
        self._stores[kind] = _Store(
            records, [tuple(value.shape) for value in values],
            [value.dtype for value in values])

    def _report(self, records: RecordFolder) -> None:
        print_log(
            f'teacher.remember_in={self.folder!r}: the tokens of '
            f'{len(records)} images are there, of up to {self.capacity}; one '
            f'takes {records.size:,} bytes', logger='current')
        needed = (self.capacity - len(records)) * records.size
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return
        if self._writable and needed > free:
            print_log(
                f'teacher.remember_in={self.folder!r}: the other '
                f'{self.capacity - len(records)} images would take '
                f'{needed:,} bytes, but {free:,} are free. When the disk is '
                'full, further images are computed every time. Lower '
                'teacher.remember, or name another folder.',
                logger='current', level=30)

    def _find(self, kind: tuple, keys: List[bytes]
              ) -> Dict[bytes, List[Tensor]]:
        store, device = self._stores[kind], kind[3]
        found = {}
        for look_again in (False, True):
            missing = [key for key in dict.fromkeys(keys) if key not in found]
            if look_again and missing:
                store.records.refresh()
            for key, record in zip(
                    missing, self._map(store.records.get, missing)):
                if record is not None:
                    found[key] = record
        if not found:
            return {}
        rows = torch.from_numpy(np.stack(list(found.values())))
        rows = rows.view(self.dtype).to(device)
        return {key: self._unpack(store, row)
                for key, row in zip(found, rows)}

    def _keep(self, kind: tuple, new: Dict[bytes, List[Tensor]]
              ) -> Dict[bytes, List[Tensor]]:
        store = self._stores[kind]
        rows = torch.stack([
            torch.cat([values.flatten().to(self.dtype) for values in tokens])
            for tokens in new.values()])
        room = self.capacity - sum(
            len(s.records) for s in self._stores.values())
        if self._writable and room > 0:
            self._write(store.records, list(new)[:room], rows[:room].cpu())
        return {key: self._unpack(store, row) for key, row in zip(new, rows)}

    def _write(self, records: RecordFolder, keys: List[bytes], rows: Tensor
               ) -> None:
        finite = torch.isfinite(rows).all(dim=1)
        try:
            for key, row, good in zip(keys, rows, finite):
                if good:  # or one mishap would stop every later run too
                    records.add(key, row.view(torch.uint8).numpy())
        except OSError as error:
            self._stop_writing(error)

    @staticmethod
    def _unpack(store: _Store, row: Tensor) -> List[Tensor]:
        parts = row.split([math.prod(shape) for shape in store.shapes])
        return [part.view(shape).to(dtype) for part, shape, dtype in zip(
            parts, store.shapes, store.dtypes)]

    def _stop_writing(self, error: OSError) -> None:
        self._writable = False
        print_log(
            f'teacher.remember_in={self.folder!r} cannot be written: {error}. '
            'Tokens that are there are used; other images are computed every '
            'time.', logger='current', level=30)


def _product_dtype(images: Tensor) -> torch.dtype:
    """What matrix products are computed in, under autocast or not."""
    one = images.new_ones(1, 1)
    return (one @ one).dtype


def _as_bytes(images: Tensor):
    if images.dtype == torch.bfloat16:  # which numpy lacks
        images = images.float()
    return images.detach().cpu().contiguous().numpy()
