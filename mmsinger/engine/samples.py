"""Samples of a data set: the same whenever they are drawn, and one message
that names the file where one cannot be read."""
import contextlib
import functools
import hashlib
import itertools
import os
import random
import traceback
from typing import Any, Iterator, List, Optional

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from PIL import Image
from torch.utils.data import (DataLoader, Dataset, IterableDataset,
                              get_worker_info)

from mmsinger.errors import ConfigError, TrainingError


class DataError(TrainingError):
    """A file of a data set, or a process that reads it, is at fault.

    Args:
        message (str): What, where and what to do. For an error in a data
            worker, torch passes the text of its traceback, which ends so.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            str(message).split(f'{__name__}.DataError: ')[-1].strip())


# -- random numbers ----------------------------------------------------------


class Draw(int):
    """An index of a data set, with the seed for what is random about it.

    Attributes:
        seed (int): 64 bits.
    """
    seed: int


def seed_samples(loader: DataLoader, seed: int) -> None:
    """Give every sample that a loader draws random numbers of its own.

    Their seed follows from the run's, the epoch and the sample's place in it
    over all processes, so that augmentation is the same with any number of
    data workers, and after a resume. Python's, numpy's and torch's generators
    get it, and go on afterwards as if nothing had been drawn.

    Args:
        loader (DataLoader): Of training; not iterated yet.
        seed (int): The run's.
    """
    sampler = sampler_of(loader)
    if isinstance(loader.dataset, IterableDataset) or hasattr(
            sampler, 'seeds_of_epoch'):
        return
    guard_samples(loader.dataset, 'train_dataloader.dataset')
    if loader.generator is None:  # it would draw from the model's
        loader.generator = torch.Generator().manual_seed(seed)
    cls, rank, processes = type(sampler), get_rank(), get_world_size()

    class Seeding(cls):
        seeds_of_epoch = first = 0

        def __iter__(self) -> Iterator[Draw]:
            epoch, first = self.seeds_of_epoch, self.first
            self.seeds_of_epoch += 1  # for loops that do not name it
            self.first = 0
            for place, index in enumerate(cls.__iter__(self), first):
                draw = Draw(index)
                draw.seed = _hash(seed, epoch, place * processes + rank)
                yield draw

        if hasattr(cls, 'skip'):
            def skip(self, count: int) -> None:
                """Of mmengine's InfiniteSampler, for resuming."""
                cls.skip(self, count)
                self.first = count

    sampler.__class__ = functools.update_wrapper(Seeding, cls, updated=())
    if loader.batch_sampler is None:  # batch_size=None: samples as they are
        return
    batches = type(loader.batch_sampler)

    class PassingOver(batches):
        passed_over = 0

        def __iter__(self) -> Iterator[List[Draw]]:
            # Read late: torch makes one more iterator than it uses
            done, self.passed_over = self.passed_over, 0
            yield from itertools.islice(batches.__iter__(self), done, None)

    loader.batch_sampler.__class__ = functools.update_wrapper(
        PassingOver, batches, updated=())


def start_epoch(loader: DataLoader, epoch: int, done: int = 0) -> None:
    """Tell a loader which epoch comes next.

    Args:
        loader (DataLoader): See :func:`seed_samples`.
        epoch (int): Counted from 0.
        done (int): Batches of this process that are passed over without
            being read. Defaults to 0.
    """
    sampler_of(loader).seeds_of_epoch = epoch
    if loader.batch_sampler is not None:
        loader.batch_sampler.passed_over = done


def sampler_of(loader: DataLoader) -> Any:
    """The sampler of a loader, also of one with a batch sampler."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def _hash(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


@contextlib.contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Seed the generators of the CPU; in the main process, put them back."""
    main = get_worker_info() is None  # a worker has nothing to go on with
    before = (random.getstate(), np.random.get_state(legacy=False),
              torch.get_rng_state()) if main else ()
    random.seed(seed)
    np.random.seed(seed & 0xffffffff)
    torch.default_generator.manual_seed(seed)  # not the accelerator's
    try:
        yield
    finally:
        if main:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


# -- reading -----------------------------------------------------------------


def guard_samples(dataset: Dataset, key: str) -> Dataset:
    """Let a sample that cannot be read end in one message with its file.

    Args:
        dataset (Dataset): Map-style; changed in place.
        key (str): Where its config stands.

    Returns:
        Dataset: The same object.
    """
    if hasattr(dataset, '_config_key') or isinstance(dataset,
                                                     IterableDataset):
        return dataset
    cls = type(dataset)
    eight_bits = _loads_eight_bits(dataset)

    class Guarded(cls):

        def __getitem__(self, index: int) -> Any:
            with contextlib.ExitStack() as stack:
                if isinstance(index, Draw):
                    stack.enter_context(_random_numbers(index.seed))
                    index = int(index)
                try:
                    sample = cls.__getitem__(self, index)
                    if eight_bits:
                        _check_bits(sample)
                    return sample
                except Exception as error:
                    if isinstance(error, IndexError) and index >= len(self):
                        raise  # how iteration ends
                    raise DataError(_why(self, index, error)) from error

        if hasattr(cls, '__getitems__'):
            def __getitems__(self, indices: List[int]) -> List[Any]:
                return [self[index] for index in indices]

        def __reduce_ex__(self, protocol: int) -> tuple:
            plain = object.__new__(cls)
            plain.__dict__ = {name: value for name, value
                              in vars(self).items() if name != '_config_key'}
            return guard_samples, (plain, key)

    dataset._config_key = key
    dataset.__class__ = functools.update_wrapper(Guarded, cls, updated=())
    return dataset


def _loads_eight_bits(dataset: Any) -> bool:
    """Whether label maps go through mmseg's loader, which keeps the lower
    eight bits of each value."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return any(type(step).__name__ == 'LoadAnnotations'
               and type(step).__module__.startswith('mmseg.')
               for step in transforms)


def _check_bits(sample: Any) -> None:
    """Raise :class:`DataError` for a label map with values above 255."""
    samples = sample.get('data_samples') if isinstance(sample, dict) else None
    path = getattr(samples, 'seg_map_path', None)
    if not isinstance(path, str) or not os.path.isfile(path):
        return
    with Image.open(path) as image:  # no more than its header of 8 bits
        values = np.asarray(image) if image.mode[0] in 'IF' else np.zeros(1)
    highest = values[values != 65535].max(initial=0)  # that becomes 255
    if highest > 255:
        raise DataError(
            f'{path!r} has the label {highest}, and mmseg loads maps of 8 '
            'bits: values above 255 would become others. Write the classes '
            'as 0, 1, 2, …, and what is to be ignored as 255.')


def _why(dataset: Any, index: int, error: Exception) -> str:
    """Why a sample could not be read, and what to do."""
    if isinstance(error, (ConfigError, TrainingError)):
        return str(error)
    paths = sample_paths(dataset, index)
    faults = [f'{path!r} {fault}' for path in paths
              for fault in [_fault(path)] if fault]
    if faults:
        said = '; '.join(faults) + \
            '. Fetch it again, or take it out of the data set'
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f'{type(error).__name__}: {error} ({place.filename}:' \
            f'{place.lineno}). Its files: ' \
            f'{", ".join(map(repr, paths)) or "it names none"}. Look at ' \
            'them, and at the pipeline'
    return f'{dataset._config_key}: sample {index} cannot be read: {said}; ' \
        'tools/check_dataset.py CONFIG --all goes through all files, and ' \
        'training goes on with --resume.'


def sample_paths(dataset: Any, index: int) -> List[str]:
    """The files that a sample is read from, where the dataset says so."""
    with contextlib.suppress(Exception):
        info = dataset.get_data_info(index)
        return [value for key, value in info.items()
                if key.endswith('path') and isinstance(value, str) and value]
    return []


def _fault(path: str) -> Optional[str]:
    """What is wrong with a file; None if nothing is, or nobody knows."""
    if '://' in path or '#' in path:
        return None
    if not os.path.exists(path):
        gone = path
        while not os.path.exists(os.path.dirname(gone) or '.'):
            gone = os.path.dirname(gone)
        return 'is not there' + (f', nor is the folder {gone!r}'
                                 if gone != path else '')
    if not os.path.getsize(path):
        return 'is empty'
    try:
        with Image.open(path) as image:
            image.load()
    except PermissionError as error:
        return f'cannot be opened ({error.strerror})'
    except Exception as error:  # decoders raise nearly anything
        return f'cannot be decoded ({error})'
    return None
