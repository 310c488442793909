"""Small made-up copies of the data sets of the linear evaluation."""
import os

import cv2
import numpy as np
from mmpretrain.datasets.categories import (FGVCAIRCRAFT_CATEGORIES,
                                            FOOD101_CATEGORIES)
from scipy.io import savemat

from mmsinger.datasets.imagenet_variants import imagenet_wnids

PER_SPLIT = 3  # images of each split, unless a tree says otherwise
IMAGENET_R = ('n01443537', 'n01484850', 'n07880968')  # classes 1, 2, 965


def image(path, size=(300, 280), seed=0):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.default_rng(seed).integers(
        0, 256, (6, 5, 3), dtype=np.uint8)
    assert cv2.imwrite(path, cv2.resize(pixels, size[::-1]))


def array(path, values):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    assert cv2.imwrite(path, values)


def lines(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
        file.write('\n'.join(rows) + '\n')


def imagenet(root):
    for split in ('train', 'val'):
        rows = []
        for i in range(PER_SPLIT):
            image(f'{root}/{split}/{i}.JPEG', seed=i)
            rows.append(f'{i}.JPEG {i * 300}')
        lines(f'{root}/meta/{split}.txt', rows)


def imagenet_r(root):
    for i, wnid in enumerate(IMAGENET_R):
        image(f'{root}/{wnid}/art_0.jpg', seed=i)
    lines(f'{root}/README.txt', ['no class'])


def imagenet_v2(root):
    for i in (0, 1, 2, 10, 999):
        image(f'{root}/{i}/a.jpeg', seed=i)


def inat2019(root):
    for number, group in enumerate(['Birds', 'Plants', 'Birds', 'Amphibians']):
        for i in range(5):
            image(f'{root}/2019/{group}/{number}/{i * 37 % 11}.jpg', seed=i)


def aircraft(root):
    for i in range(3 * PER_SPLIT):
        image(f'{root}/data/images/{i:07}.jpg', seed=i)
    for number, split in enumerate(('train', 'val', 'test')):
        lines(f'{root}/data/images_variant_{split}.txt', [
            f'{i:07} {FGVCAIRCRAFT_CATEGORIES[30 * (i % PER_SPLIT)]}'
            for i in range(number * PER_SPLIT, (number + 1) * PER_SPLIT)])


def pets(root):
    for split, offset in (('trainval', 0), ('test', PER_SPLIT)):
        rows = []
        for i in range(PER_SPLIT):
            image(f'{root}/images/breed_{offset + i}.jpg', seed=i)
            rows.append(f'breed_{offset + i} {12 * i + 1} 1 1')
        lines(f'{root}/annotations/{split}.txt', rows)


def food101(root):
    for split in ('train', 'test'):
        names = [f'{FOOD101_CATEGORIES[33 * i]}/{split}{i}'
                 for i in range(PER_SPLIT)]
        for i, name in enumerate(names):
            image(f'{root}/images/{name}.jpg', seed=i)
        lines(f'{root}/meta/{split}.txt', names)


def flowers102(root):
    for i in range(3 * PER_SPLIT):
        image(f'{root}/jpg/image_{i + 1:05}.jpg', seed=i)
    ids = np.arange(1, 3 * PER_SPLIT + 1).reshape(3, PER_SPLIT)
    savemat(f'{root}/imagelabels.mat', {
        'labels': np.tile(np.linspace(1, 102, PER_SPLIT, dtype=int), 3)})
    savemat(f'{root}/setid.mat', dict(trnid=ids[0], valid=ids[1],
                                      tstid=ids[2]))


def ade20k(root, highest=150):
    for split in ('training', 'validation'):
        for i in range(PER_SPLIT):
            image(f'{root}/images/{split}/{i}.jpg', seed=i)
            mask = np.linspace(0, highest, 300 * 280).reshape(300, 280)
            array(f'{root}/annotations/{split}/{i}.png',
                  mask.round().astype(np.uint8))


def nyu_folder(root, unit=1000.):
    columns = np.linspace(1, 9, 640) * np.ones((480, 1))
    for split in ('train', 'test'):
        for i in range(PER_SPLIT):
            image(f'{root}/images/{split}/kitchen_{i}.jpg', (480, 640), i)
            array(f'{root}/annotations/{split}/kitchen_{i}.png',
                  (columns * unit).astype(np.uint16))


def nyu_mat(root, size=(480, 640), frames=2 * PER_SPLIT):
    """Returns the arrays as MATLAB sees them: (H, W, 3, N), (H, W, N)."""
    import h5py
    os.makedirs(root, exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (*size, 3, frames), dtype=np.uint8)
    depths = rng.uniform(1, 9, (*size, frames)).astype(np.float32)
    with h5py.File(f'{root}/nyu_depth_v2_labeled.mat', 'w') as file:
        file['images'], file['depths'] = images.T, depths.T
    savemat(f'{root}/splits.mat', dict(  # columns, from 1
        trainNdxs=np.arange(2, frames + 1, 2)[:, None],
        testNdxs=np.arange(1, frames + 1, 2)[:, None]))
    return images, depths


def imagenet_folders(root):
    """A thousand class folders, one image in each split."""
    image(f'{root}/one.JPEG', (20, 20))
    for split in ('train', 'val'):
        for wnid in imagenet_wnids():
            os.makedirs(f'{root}/{split}/{wnid}')
            os.link(f'{root}/one.JPEG', f'{root}/{split}/{wnid}/a.JPEG')


MAKERS = dict(
    imagenet=imagenet, imagenet_r=imagenet_r, imagenet_v2=imagenet_v2,
    inat2019=inat2019, aircraft=aircraft, pets=pets, food101=food101,
    flowers102=flowers102, ade20k=ade20k, nyu_folder=nyu_folder,
    nyu_mat=nyu_mat)


def make(name, root):
    """Write a tree; skips the test if what writes it is not installed."""
    if name == 'nyu_mat':
        import pytest
        pytest.importorskip('h5py')
    MAKERS[name](str(root))
    return str(root)
