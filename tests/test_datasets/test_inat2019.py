import os
import shutil

import pytest
import torch
from mmengine.registry import DATASETS

import trees
from mmsinger.datasets.inat2019 import split_indices
from mmsinger.errors import ConfigError


@pytest.fixture
def root(tmp_path):
    return trees.make('inat2019', tmp_path)


def build(root, split, **kwargs):
    return DATASETS.build(dict(type='mmsinger.INaturalist2019',
                               data_root=root, split=split, **kwargs))


def items(dataset):
    return [(info['img_path'], info['gt_label'])
            for info in map(dataset.get_data_info, range(len(dataset)))]


@pytest.mark.parametrize('arrange', [
    sorted, lambda names: sorted(names, reverse=True)])
def test_images_labels_and_split_are_torchvisions(root, monkeypatch, arrange):
    """In whatever order a file system lists them."""
    from torchvision.datasets import INaturalist
    listdir = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda path: arrange(listdir(path)))
    reference = INaturalist(root, version='2019')
    everything = [(os.path.join(reference.root,
                                reference.all_categories[label], name), label)
                  for label, name in reference.index]
    assert len(everything) == 20
    order = torch.randperm(
        20, generator=torch.Generator().manual_seed(1234)).tolist()
    train, val = build(root, 'train'), build(root, 'val')
    assert items(train) == [everything[i] for i in sorted(order[:16])]
    assert items(val) == [everything[i] for i in sorted(order[16:])]
    assert train.metainfo['classes'] == tuple(reference.all_categories)


def test_sizes_of_the_real_split():
    assert len(split_indices(268243, 'train')) == 214594
    assert len(split_indices(268243, 'val')) == 53649


def test_sorted_order_does_not_depend_on_the_file_system(root, monkeypatch):
    before = [items(build(root, s, file_order='sorted'))
              for s in ('train', 'val')]
    listdir = os.listdir
    monkeypatch.setattr(
        os, 'listdir', lambda path: sorted(listdir(path), reverse=True))
    assert before == [items(build(root, s, file_order='sorted'))
                      for s in ('train', 'val')]
    assert before[0] != items(build(root, 'train'))


def test_unpacked_by_hand(root):
    expected = [label for _, label in items(build(
        root, 'val', file_order='sorted'))]
    os.rename(f'{root}/2019', f'{root}/train_val2019')
    with pytest.raises(ConfigError, match='rename train_val2019 to 2019'):
        build(root, 'val')
    assert expected == [label for _, label in items(build(
        root, 'val', file_order='sorted', data_prefix='train_val2019'))]


def test_bad_values(root):
    with pytest.raises(ConfigError, match="split='test'"):
        build(root, 'test')
    with pytest.raises(ConfigError, match="Did you mean 'sorted'"):
        build(root, 'val', file_order='sort')


@pytest.mark.parametrize('harm, message', [
    (lambda top: shutil.rmtree(f'{top}/Birds/0'), 'numbered 0, 1, 2'),
    (lambda top: os.rename(f'{top}/Plants/1', f'{top}/Plants/fern'),
     'numbered 0, 1, 2'),
    (lambda top: shutil.copytree(f'{top}/Plants/1', f'{top}/Birds/1'),
     'numbered 0, 1, 2'),
    (lambda top: open(f'{top}/.DS_Store', 'w').close(), 'Remove it')])
def test_damaged_folders_are_refused(root, harm, message):
    harm(f'{root}/2019')
    with pytest.raises(ConfigError, match=message):
        build(root, 'train')
