import builtins
import collections
import hashlib
import json
import os
import runpy
import shutil
import sys

import cv2
import make_digit_scenes as digit_scenes
import numpy as np
import pytest
import torch
from make_digit_scenes import (DIGIT_SCENES_CLASSES, DIGIT_SCENES_PALETTE,
                               make_digit_scenes, split_digits)
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmsinger.errors import ConfigError

pytest.importorskip('sklearn')
REPO = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
ASSETS = os.path.join(REPO, 'mmsinger', 'assets')
SIZES = dict(num_train=40, num_val=20)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('data') / 'digit_scenes')
    assert make_digit_scenes(path, **SIZES)
    return path


def read(root, kind, index=0, split='validation'):
    path = f'{root}/{kind}/{split}/scene_{index:06d}.png'
    return cv2.imread(path, cv2.IMREAD_UNCHANGED)


def stock_dataset(name, root, loader='val_dataloader'):
    import mmpretrain.datasets  # noqa: F401
    import mmseg.datasets  # noqa: F401
    init_default_scope('mmseg')
    cfg = Config.fromfile(f'{REPO}/configs/_base_/datasets/{name}.py')
    dataset = cfg[loader].dataset
    dataset.data_root = root
    return DATASETS.build(dataset)


def test_splits_share_no_digit(root):
    train, val = split_digits()
    assert len(train) + len(val) == 1797
    assert not set(train) & set(val)
    with open(f'{root}/digit_scenes.json') as file:
        used = json.load(file)['digits']
    assert used['training'] and set(used['training']) <= set(train.tolist())
    assert used['validation'] and set(used['validation']) <= set(val.tolist())


def test_scenes_depend_on_seed_and_index_alone(root, tmp_path):
    for name, kwargs in (('longer', dict(num_train=3, num_val=25)),
                         ('seed', dict(SIZES, seed=1))):
        make_digit_scenes(str(tmp_path / name), **kwargs)
    for kind in ('images', 'annotations', 'depth'):
        for index in range(20):
            here = read(root, kind, index)
            assert np.array_equal(here, read(tmp_path / 'longer', kind, index))
        assert not np.array_equal(here, read(tmp_path / 'seed', kind, index))


def test_annotations_depth_and_labels_agree(root):
    with open(f'{root}/meta/val.txt') as file:
        lines = [line.split() for line in file]
    assert len(lines) == SIZES['num_val']
    counts = set()
    for index, (name, label) in enumerate(lines):
        assert name == f'scene_{index:06d}.png'
        classes, depth = (read(root, kind, index)
                          for kind in ('annotations', 'depth'))
        assert read(root, 'images', index).shape == (32, 32, 3)
        assert classes.dtype == np.uint8 and classes.max() <= 10
        assert depth.dtype == np.uint16
        assert 6500 <= depth[classes == 0].min()
        assert depth.max() <= 9500
        assert depth[classes > 0].max() <= round(48000 / 13)
        assert classes.flat[depth.argmin()] == int(label) + 1
        counts.add(len(np.unique(depth[classes > 0])))
    assert counts == {1, 2}


def test_stock_segmentation_dataset(root):
    dataset = stock_dataset('digit_scenes', root)
    assert len(dataset) == SIZES['num_val']
    assert dataset.metainfo['classes'] == DIGIT_SCENES_CLASSES
    assert dataset.metainfo['palette'] == DIGIT_SCENES_PALETTE
    sample = dataset[3]
    assert torch.equal(
        sample['data_samples'].gt_sem_seg.data[0],
        torch.from_numpy(read(root, 'annotations', 3).astype(np.int64)))
    assert np.array_equal(sample['inputs'].permute(1, 2, 0).numpy(),
                          read(root, 'images', 3))
    training = stock_dataset('digit_scenes', root, 'train_dataloader')
    assert len(training) == SIZES['num_train']
    for sample in training:
        classes = sample['data_samples'].gt_sem_seg.data
        assert sample['inputs'].shape == (3, 32, 32)
        assert classes.shape == (1, 32, 32) and classes.max() <= 10


def test_stock_depth_dataset(root):
    sample = stock_dataset('digit_scenes_depth', root)[3]
    np.testing.assert_allclose(
        sample['data_samples'].gt_depth_map.data[0].numpy(),
        read(root, 'depth', 3) / 1000, rtol=1e-6)
    training = stock_dataset('digit_scenes_depth', root, 'train_dataloader')
    assert len(training) == SIZES['num_train']
    assert training[0]['inputs'].shape == (3, 32, 32)


def test_stock_classification_dataset(root):
    dataset = stock_dataset('digit_scenes_cls', root)
    with open(f'{root}/meta/val.txt') as file:
        labels = [int(line.split()[1]) for line in file]
    assert [dataset[i]['data_samples'].gt_label.item()
            for i in range(len(dataset))] == labels
    training = stock_dataset('digit_scenes_cls', root, 'train_dataloader')
    assert len(training) == SIZES['num_train']
    assert training[0]['inputs'].shape == (3, 32, 32)


def test_made_once(root):
    marker = f'{root}/digit_scenes.json'
    before = os.stat(marker).st_mtime_ns
    assert not make_digit_scenes(root, **SIZES)
    assert os.stat(marker).st_mtime_ns == before


def test_other_settings_are_refused(root):
    with pytest.raises(ConfigError, match=r'seed=0 \(asked for 5\)'):
        make_digit_scenes(root, **SIZES, seed=5)


@pytest.mark.parametrize('harm', [
    lambda root: os.remove(f'{root}/digit_scenes.json'),
    lambda root: open(f'{root}/digit_scenes.json', 'w').close()])
def test_incomplete_folder_is_refused(root, tmp_path, harm):
    copy = str(tmp_path / 'copy')
    shutil.copytree(root, copy)
    harm(copy)
    with pytest.raises(ConfigError, match='incomplete'):
        make_digit_scenes(copy, **SIZES)
    assert read(copy, 'images') is not None


def test_interrupted_making_leaves_nothing_that_looks_complete(
        root, tmp_path, monkeypatch):
    path = str(tmp_path / 'scenes')
    write, calls = cv2.imwrite, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(cv2, 'imwrite', interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_digit_scenes(path, **SIZES)
    assert not os.path.exists(path)
    monkeypatch.undo()
    assert make_digit_scenes(path, **SIZES)
    assert os.listdir(tmp_path) == ['scenes']
    assert np.array_equal(read(path, 'images', 19), read(root, 'images', 19))


@pytest.mark.parametrize('setting', [
    dict(num_train=0), dict(canvas=8), dict(digit_size=(13, 40)),
    dict(digit_size=(18, 13)), dict(max_digits=0), dict(val_fraction=1.),
    dict(seed=-1)])
def test_bad_settings(tmp_path, setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        make_digit_scenes(str(tmp_path / 'scenes'), **{**SIZES, **setting})


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'scenes').symlink_to('disk')
    assert make_digit_scenes(str(tmp_path / 'scenes'), **SIZES)
    assert (tmp_path / 'scenes').is_symlink()
    assert not make_digit_scenes(str(tmp_path / 'scenes'), **SIZES)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot be written.*another root'):
        make_digit_scenes(str(tmp_path / 'file' / 'scenes'), **SIZES)


def test_of_two_at_once_one_makes_them(tmp_path, monkeypatch):
    path, write = str(tmp_path / 'scenes'), digit_scenes._write_longtails

    def slower(folder):
        monkeypatch.setattr(digit_scenes, '_write_longtails', write)
        monkeypatch.setattr(os, 'getpid', lambda: 1)
        assert make_digit_scenes(path, **SIZES)  # the other process
        write(folder)

    monkeypatch.setattr(digit_scenes, '_write_longtails', slower)
    assert not make_digit_scenes(path, **SIZES)
    assert os.listdir(tmp_path) == ['scenes']


def test_long_tails(tmp_path):
    """As many times rarer as their name says, and none of what tunes."""
    scenes = [f'scene_{i:06d}.png {i % 10}\n' for i in range(12000)]
    (tmp_path / 'train.txt').write_text(''.join(scenes))
    digit_scenes._write_longtails(str(tmp_path))
    for name, rarest, last in (
            ('longtail', 13, 12000), ('imbalance10', 100, 10000),
            ('imbalance50', 20, 10000), ('imbalance100', 10, 10000)):
        lines = (tmp_path / f'train_{name}.txt').read_text().splitlines(True)
        assert lines == sorted(lines) and set(lines) <= set(scenes[:last])
        counts = collections.Counter(line.split()[1] for line in lines)
        assert counts['0'] == last // 10 and counts['9'] == rarest
        assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_without_scikit_learn(tmp_path, monkeypatch):
    original = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.startswith('sklearn'):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_sklearn)
    with pytest.raises(ConfigError, match='pip install scikit-learn'):
        make_digit_scenes(str(tmp_path / 'scenes'), **SIZES)
    assert not os.listdir(tmp_path)


def test_command_line(tmp_path, monkeypatch, capsys):
    def call(*more):
        monkeypatch.setattr(sys, 'argv', [
            'make_digit_scenes.py', '--root', str(tmp_path / 'scenes'),
            '--num-train', '2', '--num-val', '1', *more])
        runpy.run_path(f'{REPO}/tools/make_digit_scenes.py',
                       run_name='__main__')
        return capsys.readouterr().out

    assert 'made in' in call()
    assert 'already there' in call()
    with pytest.raises(SystemExit) as stopped:
        call('--seed', '1')
    assert stopped.value.code == 1
    assert 'ConfigError' in capsys.readouterr().err


def build_demo_model(name):
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS
    init_default_scope('mmseg')
    return MODELS.build(Config.fromfile(
        f'{REPO}/configs/demo/{name}.py').model)


def test_shipped_teacher():
    path = f'{ASSETS}/digits_teacher.pth'
    with open(f'{ASSETS}/digits_teacher.sha256') as file:
        recorded = file.read().split()
    with open(path, 'rb') as file:
        assert hashlib.sha256(file.read()).hexdigest() == recorded[0]
    assert recorded[1] == 'digits_teacher.pth'
    with open(f'{ASSETS}/README.md') as file:
        assert recorded[0] in file.read()
    assert os.path.getsize(path) <= 3_000_000
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['meta']['classes'] == list(DIGIT_SCENES_CLASSES)
    assert checkpoint['meta']['palette'] == DIGIT_SCENES_PALETTE
    assert checkpoint['meta']['mIoU'] >= 60
    build_demo_model('digits_teacher').load_state_dict(
        checkpoint['state_dict'], strict=True)


def test_shipped_teacher_knows_unseen_digits(tmp_path):
    """More than its README says: the weights do it, on scenes made here."""
    make_digit_scenes(str(tmp_path / 'scenes'), num_train=1, num_val=100)
    dataset = stock_dataset('digit_scenes', str(tmp_path / 'scenes'))
    model = build_demo_model('digits_teacher').eval()
    model.load_state_dict(torch.load(
        f'{ASSETS}/digits_teacher.pth', weights_only=True)['state_dict'])
    samples = [dataset[i] for i in range(len(dataset))]
    predicted = model.test_step(dict(
        inputs=[s['inputs'] for s in samples],
        data_samples=[s['data_samples'] for s in samples]))
    pairs = sum(torch.bincount(
        (11 * p.gt_sem_seg.data + p.pred_sem_seg.data).flatten(),
        minlength=121) for p in predicted).view(11, 11).double()
    iou = pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())
    assert iou.mean() > 0.55


def test_student_needs_no_mmsinger():
    cfg = Config.fromfile(f'{REPO}/configs/demo/digits_student.py')
    assert 'mmsinger' not in str(cfg.model)
    build_demo_model('digits_student')
