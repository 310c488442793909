"""NYUd-v2 straight from its labelled file, nyu_depth_v2_labeled.mat."""
import os
from typing import List, Literal

import numpy as np
from mmseg.datasets import NYUDataset

from mmsinger.errors import ConfigError
from mmsinger.registry import DATASETS

SPLIT_KEYS = {'train': 'trainNdxs', 'test': 'testNdxs'}


@DATASETS.register_module()
class NYUMatDataset(NYUDataset):
    """The 1,449 labelled frames of NYUd-v2, read from MATLAB's file.

    Nothing is unpacked: an item reads its own frame. It comes with ``img``
    (480, 640, 3), BGR, uint8, and ``gt_depth_map`` (480, 640), float32,
    metres; the pipeline must not load anything. Needs the package h5py. ::

        data_root/
        ├── nyu_depth_v2_labeled.mat    HDF5; images, depths, …
        └── splits.mat                  trainNdxs, testNdxs, from 1

    Args:
        data_root (str): The folder of both files.
        split (str): ``'train'``, 795 frames, or ``'test'``, 654. Defaults to
            ``'train'``.
        mat_file (str): The labelled file. Defaults to
            ``'nyu_depth_v2_labeled.mat'``.
        splits_file (str): The official split. Defaults to ``'splits.mat'``.
        **kwargs: As for mmseg's ``BaseSegDataset``.

    Raises:
        ConfigError: If h5py or a file is missing, or a file is not what its
            name says.
    """

    def __init__(self,
                 data_root: str,
                 split: Literal['train', 'test'] = 'train',
                 mat_file: str = 'nyu_depth_v2_labeled.mat',
                 splits_file: str = 'splits.mat',
                 **kwargs) -> None:
        self.split = split
        self.mat_file = os.path.join(data_root, mat_file)
        self.splits_file = os.path.join(data_root, splits_file)
        super().__init__(data_root=data_root, data_prefix={}, **kwargs)

    def load_data_list(self) -> List[dict]:
        """One entry for each frame of the split; no frame is read."""
        frames = _frames_of(self.splits_file, SPLIT_KEYS[self.split])
        with _open(self.mat_file) as file:
            count = len(file['depths'])
        if frames.max() > count:
            raise ConfigError(
                f'NYUMatDataset: {self.splits_file!r} names frame '
                f'{frames.max()}, but {self.mat_file!r} holds {count}. They '
                'do not belong together, or a download was cut short.')
        return [
            dict(img_path=f'{self.mat_file}#{frame}', frame=int(frame) - 1)
            for frame in frames
        ]

    def get_data_info(self, idx: int) -> dict:
        """One frame.

        Args:
            idx (int): Its position in the split.

        Returns:
            dict: ``img``, ``gt_depth_map`` and what a loading transform
            would add.
        """
        info = super().get_data_info(idx)
        # Opened anew for each item: HDF5 handles do not outlive a fork.
        with _open(self.mat_file) as file:
            # MATLAB's axes come reversed: (frame, channel, width, height)
            image = file['images'][info['frame']].transpose(2, 1, 0)
            depth = file['depths'][info['frame']].T
        info['img'] = np.ascontiguousarray(image[..., ::-1])
        info['gt_depth_map'] = np.ascontiguousarray(depth, np.float32)
        info['seg_fields'] = ['gt_depth_map']
        info['img_shape'] = info['ori_shape'] = info['img'].shape[:2]
        return info


def _frames_of(path: str, key: str) -> np.ndarray:
    from scipy.io import loadmat
    _check_file(path, 'Fetch splits.mat from the site of the data set '
                '(indoor_seg_sup) and put it beside the labelled file.')
    try:
        return loadmat(path)[key].ravel()
    except Exception as error:
        raise ConfigError(
            f'NYUMatDataset: {path!r} has no {key}, or is no MATLAB file '
            f'({error}). Fetch splits.mat again.') from error


def _open(path: str):
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(
            'NYUMatDataset needs the package h5py: `pip install h5py`. '
            "mmseg's NYUDataset reads a folder of images without it."
        ) from error
    _check_file(path, 'Fetch the labelled data set of NYU Depth V2, or set '
                'data_root to where it is.')
    try:
        file = h5py.File(path, 'r')
    except OSError as error:
        raise ConfigError(
            f'NYUMatDataset: {path!r} is no HDF5 file, or was cut short '
            f'({error}). Fetch it again (2.8 GB).') from error
    for name, axes in (('images', 4), ('depths', 3)):
        if name not in file or file[name].ndim != axes:
            file.close()
            raise ConfigError(
                f'NYUMatDataset: {path!r} has no {name!r} of {axes} axes. '
                'It must be nyu_depth_v2_labeled.mat as published.')
    return file


def _check_file(path: str, fix: str) -> None:
    if not os.path.isfile(path):
        raise ConfigError(f'NYUMatDataset: no file {path!r} (working '
                          f'directory {os.getcwd()}). {fix}')
