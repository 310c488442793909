"""Records of one size in files that several processes share."""
import errno
import mmap
import os
import time
import uuid
import zlib
from typing import Dict, Optional, Tuple

import numpy as np
from mmengine.logging import print_log

KEY = 16  # bytes
CHECKSUM = 4
ENTRY = KEY + CHECKSUM


class RecordFolder:
    """Finds records of one size by their keys, in a folder.

    Each process appends to a pair of files of its own and reads those of all
    others, of earlier runs and of this one: no locks, and no file has two
    writers. A key is written after its record, so that what an interrupted
    process leaves is whole up to its last key; a rest behind that is never
    read. Checksums tell what a crash of the machine has damaged.

    Args:
        folder (str): Where the files are; made when the first record is
            added.
        size (int): Bytes of a record.
    """

    def __init__(self, folder: str, size: int) -> None:
        self.folder = folder
        self.size = size
        self._places: Dict[bytes, Tuple['_Pair', int]] = {}
        self._pairs: Dict[str, _Pair] = {}
        self._own: Optional[_Pair] = None
        self._damaged = False
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Look for records that other processes have added. What cannot be
        read is passed over."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:
            return
        for name in names:  # oldest first: later records replace earlier ones
            stem, extension = os.path.splitext(name)
            if extension != '.index' or (
                    self._own is not None and self._own.name == stem):
                continue
            pair = self._pairs.setdefault(
                stem, _Pair(self.folder, stem, self.size))
            for position in pair.read_index():
                self._places[pair.key(position)] = (pair, position)

    def get(self, key: bytes) -> Optional[np.ndarray]:
        """A record, checked. Threads may call it at the same time, for
        different keys.

        Args:
            key (bytes): Of 16 bytes.

        Returns:
            ndarray | None: A copy, uint8, shape (size, ); None if there is
            none, or it is damaged.
        """
        if key not in self._places:
            return None
        pair, position = self._places[key]
        record = pair.read(position)
        if record is None:
            self._places.pop(key, None)
            if not self._damaged:
                print_log(f'{pair.records} is damaged or gone: what cannot be '
                          'read is computed anew', logger='current', level=30)
            self._damaged = True
        return record

    def add(self, key: bytes, record: np.ndarray) -> None:
        """Append a record.

        Args:
            key (bytes): Of 16 bytes.
            record (ndarray): uint8, shape (size, ).

        Raises:
            OSError: If it cannot be written. What is there stays good.
        """
        if self._own is None:
            os.makedirs(self.folder, exist_ok=True)
            self._own = _Pair(  # names in the order of time
                self.folder, f'{time.time_ns():020d}_{uuid.uuid4().hex[:8]}',
                self.size)
        self._places[key] = (self._own, self._own.append(key, record))


class _Pair:
    """``NAME.records``, one after the other, and ``NAME.index``, the key and
    the checksum of each."""

    def __init__(self, folder: str, name: str, size: int) -> None:
        self.name = name
        self.records = os.path.join(folder, f'{name}.records')
        self.index = os.path.join(folder, f'{name}.index')
        self.size = size
        self._entries = bytearray()
        self._map: Optional[mmap.mmap] = None
        self._files: Optional[list] = None  # while written to

    def __len__(self) -> int:
        return len(self._entries) // ENTRY

    def key(self, position: int) -> bytes:
        start = position * ENTRY
        return bytes(self._entries[start:start + KEY])

    def read_index(self) -> range:
        """Positions that are new since the last call."""
        known = len(self)
        try:
            with open(self.index, 'rb') as file:
                file.seek(len(self._entries))
                entries = file.read()
            whole = os.path.getsize(self.records) // self.size
        except OSError:
            return range(0)
        count = max(0, min(len(entries) // ENTRY, whole - known))
        self._entries += entries[:count * ENTRY]
        return range(known, known + count)

    def read(self, position: int) -> Optional[np.ndarray]:
        start = position * self.size
        try:
            mapped = self._map
            if mapped is None or len(mapped) < start + self.size:
                with open(self.records, 'rb') as file:
                    mapped = self._map = mmap.mmap(
                        file.fileno(), 0, access=mmap.ACCESS_READ)
            record = np.frombuffer(
                mapped, np.uint8, self.size, start).copy()
        except (OSError, ValueError):  # gone, or shorter than it was
            return None
        entry = self._entries[position * ENTRY:(position + 1) * ENTRY]
        return record if _checksum(record) == entry[KEY:] else None

    def append(self, key: bytes, record: np.ndarray) -> int:
        if len(key) != KEY or record.nbytes != self.size:
            raise ValueError(f'a key of {len(key)} bytes and a record of '
                             f'{record.nbytes}; expected {KEY} and '
                             f'{self.size}')
        if self._files is None:
            self._files = [open(path, 'xb', buffering=0)
                           for path in (self.records, self.index)]
        position = len(self)
        entry = key + _checksum(record)
        # At their places: half a record of an earlier attempt is overwritten
        _write(self._files[0], position * self.size, record.data)
        _write(self._files[1], position * ENTRY, entry)
        self._entries += entry
        return position


def _checksum(record: np.ndarray) -> bytes:
    return zlib.crc32(record).to_bytes(CHECKSUM, 'little')


def _write(file, offset: int, data) -> None:
    file.seek(offset)
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
