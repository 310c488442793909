import pickle
import sys

import numpy as np
import pytest
from mmengine.registry import DATASETS
from scipy.io import savemat

import trees
from mmsinger.errors import ConfigError

SIZE = (6, 8)


@pytest.fixture
def made(tmp_path):
    pytest.importorskip('h5py')
    return str(tmp_path), *trees.nyu_mat(str(tmp_path), SIZE, frames=5)


def build(root, split='train', **kwargs):
    return DATASETS.build(dict(
        type='mmsinger.NYUMatDataset', data_root=root, split=split, **kwargs))


@pytest.mark.parametrize('split, frames', [('train', [2, 4]),
                                           ('test', [1, 3, 5])])
def test_frames_are_matlabs(made, split, frames):
    """``images(:, :, :, n)`` and ``depths(:, :, n)``, n from 1."""
    root, images, depths = made
    dataset = build(root, split)
    assert len(dataset) == len(frames)
    for index, frame in enumerate(frames):
        info = dataset.get_data_info(index)
        np.testing.assert_array_equal(
            info['img'][..., ::-1], images[..., frame - 1])
        np.testing.assert_array_equal(
            info['gt_depth_map'], depths[..., frame - 1])
        assert info['img'].dtype == np.uint8
        assert info['gt_depth_map'].dtype == np.float32
        assert info['img_shape'] == info['ori_shape'] == SIZE
        assert info['seg_fields'] == ['gt_depth_map']
        assert info['img_path'].endswith(f'.mat#{frame}')


def test_no_frame_is_read_before_it_is_asked_for(made, monkeypatch):
    root = made[0]
    import h5py
    reads = []
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, '__getitem__', lambda self, i: (
        reads.append((self.name, i)), read(self, i))[1])
    dataset = build(root)
    assert not reads
    dataset.get_data_info(1)
    assert reads == [('/images', 3), ('/depths', 3)]


def test_goes_to_a_worker(made):
    root, images, _ = made
    dataset = build(root)
    dataset.get_data_info(0)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(
        copy.get_data_info(0)['img'][..., ::-1], images[..., 1])


def test_without_h5py(made, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(ConfigError, match='pip install h5py'):
        build(made[0])


def cut_short(root):
    with open(f'{root}/nyu_depth_v2_labeled.mat', 'r+b') as file:
        file.truncate(1000)


def no_depths(root):
    import h5py
    with h5py.File(f'{root}/nyu_depth_v2_labeled.mat', 'a') as file:
        del file['depths']


@pytest.mark.parametrize('harm, message', [
    (cut_short, 'cut short'),
    (no_depths, "no 'depths'"),
    (lambda root: savemat(f'{root}/splits.mat', dict(trainNdxs=[[9]])),
     'names frame 9, .* holds 5'),
    (lambda root: savemat(f'{root}/splits.mat', dict(other=[[1]])),
     'has no trainNdxs')])
def test_damaged_files(made, harm, message):
    harm(made[0])
    with pytest.raises(ConfigError, match=message):
        build(made[0])


@pytest.mark.parametrize('kwargs, message', [
    (dict(mat_file='labeled.mat'), "no file .*labeled.mat"),
    (dict(splits_file='split.mat'), "no file .*split.mat"),
    (dict(split='val'), "split='val' is not valid")])
def test_wrong_names(made, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build(made[0], **kwargs)
