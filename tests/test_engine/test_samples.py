"""A sample is the same whenever it is drawn, whoever reads it."""
import os
import pickle
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmsinger.engine.faults import _wrong_labels
from mmsinger.engine.samples import (DataError, guard_samples, seed_samples,
                                     start_epoch)


class Noise(Dataset):
    """An index, and a number of each random generator."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        assert type(index) is int
        return torch.tensor([index, random.random(), np.random.rand(),
                             torch.rand(())], dtype=torch.float64)


def loader_of(workers=0, sampler=DefaultSampler, seed=5, **kwargs):
    dataset = Noise()
    loader = DataLoader(dataset, 2, num_workers=workers, sampler=sampler(
        dataset, seed=seed), **kwargs)
    seed_samples(loader, seed)
    return loader


def epoch_of(loader, epoch=0, done=0):
    start_epoch(loader, epoch, done)
    return torch.cat(list(loader))


@pytest.mark.parametrize('kwargs', [
    dict(workers=1), dict(workers=3), dict(workers=2, persistent_workers=True),
    dict(workers=1, multiprocessing_context='spawn')], ids=str)
def test_any_number_of_workers(kwargs):
    plain, other = loader_of(), loader_of(**kwargs)
    for epoch in range(2):
        expected = epoch_of(plain, epoch)
        assert torch.equal(epoch_of(other, epoch), expected)
        assert torch.equal(epoch_of(other, epoch, done=2), expected[4:])
    assert len(expected[:, 1:].unique()) == 30


class Pairs(BatchSampler):
    """Puts even and odd places together, as mmdet's does wide and high."""

    def __iter__(self):
        kinds = [], []
        for index in self.sampler:
            kinds[index % 2].append(index)
            if len(kinds[index % 2]) == 2:
                yield kinds[index % 2][:]
                kinds[index % 2].clear()


def test_a_batch_sampler_that_regroups():
    """What is passed over is batches, of whatever samples."""
    dataset = Noise()
    loader = DataLoader(dataset, batch_sampler=Pairs(
        DefaultSampler(dataset, seed=5), 2, False))
    seed_samples(loader, 5)
    expected = epoch_of(loader, 1)
    assert len(expected) == 8
    assert torch.equal(epoch_of(loader, 1, done=3), expected[6:])
    assert torch.equal(epoch_of(loader, 1), expected)


def test_samples_without_batches():
    dataset = Noise()
    loader = DataLoader(dataset, None,
                        sampler=DefaultSampler(dataset, seed=5))
    seed_samples(loader, 5)
    start_epoch(loader, 1)
    assert len(torch.stack(list(loader)).unique(dim=0)) == 10


def test_epochs_seeds_and_repeated_samples_differ():
    found = [epoch_of(loader_of(seed=seed), epoch)[:, 1]
             for seed in (5, 6) for epoch in (0, 1)]
    assert len(torch.cat(found).unique()) == 40
    infinite = iter(loader_of(sampler=InfiniteSampler))
    samples = torch.cat([next(infinite) for _ in range(20)])
    assert len(samples[:, 0].unique()) == 10
    assert len(samples[:, 1].unique()) == 40


@pytest.mark.parametrize('workers', [0, 2])
def test_an_endless_sampler_goes_on(workers):
    whole = iter(loader_of(sampler=InfiniteSampler))
    expected = torch.cat([next(whole) for _ in range(12)])
    loader = loader_of(workers, InfiniteSampler)
    loader.sampler.skip(14)  # as mmengine does
    resumed = iter(loader)
    assert torch.equal(torch.cat([next(resumed) for _ in range(5)]),
                       expected[14:])


def test_a_loop_that_begins_anew_by_itself():
    loader = loader_of()
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    assert torch.equal(first[:, 0], second[:, 0])
    assert len(torch.cat([first, second])[:, 1].unique()) == 20


def test_processes_share_an_epoch(monkeypatch):
    """Of two processes, each has every second sample of one."""
    expected = epoch_of(loader_of())
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            for module in ('mmengine.dataset.sampler', ):
                patch.setattr(f'{module}.get_dist_info', lambda: (rank, 2))
            patch.setattr('mmsinger.engine.samples.get_rank', lambda: rank)
            patch.setattr('mmsinger.engine.samples.get_world_size', lambda: 2)
            assert torch.equal(epoch_of(loader_of()), expected[rank::2])


@pytest.mark.parametrize('workers', [0, 1])
def test_the_models_own_numbers_go_on(workers):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    epoch_of(loader_of(workers))
    assert numbers() == expected


class Files(Dataset):
    """Reads what its entries name."""

    def __init__(self, *paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def get_data_info(self, index):
        return dict(img_path=self.paths[index], sample_idx=index)

    def __getitem__(self, index):
        with open(self.paths[index]) as file:
            return int(file.read())


@pytest.fixture
def files(tmp_path):
    (tmp_path / 'good.txt').write_text('7')
    (tmp_path / 'empty.png').write_text('')
    (tmp_path / 'words.png').write_text('words')
    return str(tmp_path)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('name, fault', [
    ('gone.png', 'is not there'), ('empty.png', 'is empty'),
    ('words.png', 'cannot be decoded'),
    (os.path.join('no', 'such', 'x.png'), 'nor is the folder')])
def test_the_file_is_named(files, name, fault, workers):
    path = os.path.join(files, name)
    dataset = guard_samples(Files(os.path.join(files, 'good.txt'), path), 'it')
    assert isinstance(dataset, Files) and type(dataset).__name__ == 'Files'
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset, 2, num_workers=workers))
    message = str(caught.value)
    assert message.startswith('it: sample 1 cannot be read: ')
    assert repr(path) in message and fault in message
    assert '\n' not in message


def test_an_error_without_a_bad_file_says_where(files):
    class Failing(Files):

        def __getitem__(self, index):
            raise ZeroDivisionError('none')

    dataset = guard_samples(Failing(f'{files}#1'), 'it')
    place = rf'{__file__}:\d+'
    with pytest.raises(DataError, match=rf'ZeroDivisionError: none \({place}\)'
                       f". Its files: '{files}#1'"):
        dataset[0]


def test_iteration_ends_and_copies_are_guarded(files):
    dataset = guard_samples(Files(os.path.join(files, 'good.txt')), 'it')
    assert guard_samples(dataset, 'again') is dataset
    assert list(dataset) == [7]
    copy = pickle.loads(pickle.dumps(dataset))
    copy.paths = ('gone', )
    with pytest.raises(DataError, match='^it: sample 0'):
        copy[0]


@pytest.mark.parametrize('out_channels, label, refused', [
    (1, 1, False), (1, 2, True), (None, 1, True)])
def test_labels_of_a_binary_head(out_channels, label, refused):
    """One logit tells two classes apart."""
    head = nn.Module()
    head.num_classes, head.ignore_index = 1, 255
    if out_channels:
        head.out_channels = out_channels
    model = nn.Module()
    model.decode_head = head
    sample = SimpleNamespace(seg_map_path='map.png', gt_sem_seg=(
        SimpleNamespace(data=torch.tensor([[0, label, 255]]))))
    said = _wrong_labels(dict(data_samples=[sample]), model, 'val_dataloader')
    assert bool(said) == refused
    if refused:
        assert re.search(f'map.png.*the label {label}', said)
