import importlib.resources

import pytest
from mmengine.registry import DATASETS
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

import trees
from mmsinger.datasets.imagenet_variants import imagenet_wnids
from mmsinger.errors import ConfigError


def build(name, root):
    return DATASETS.build(dict(type=f'mmsinger.{name}', data_root=str(root)))


def timm_list(name):
    info = importlib.resources.files(pytest.importorskip('timm.data'))
    return (info / '_info' / name).read_text().split()


def test_wnids_are_those_of_imagenet():
    wnids = imagenet_wnids()
    assert len(set(wnids)) == 1000 and wnids == sorted(wnids)
    assert wnids == timm_list('imagenet_synsets.txt')


def test_imagenet_r_labels_are_imagenet_indices(tmp_path):
    """All 200 classes, against timm's table."""
    wnids = timm_list('imagenet_r_synsets.txt')
    for wnid in wnids:
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / 'a.jpg').touch()
    dataset = build('ImageNetR', tmp_path)
    found = {info['img_path'].split('/')[-2]: info['gt_label']
             for info in map(dataset.get_data_info, range(len(dataset)))}
    assert found == dict(zip(
        wnids, map(int, timm_list('imagenet_r_indices.txt'))))
    assert dataset.metainfo['classes'] == tuple(IMAGENET_CATEGORIES)


def test_imagenet_v2_labels_are_the_folder_numbers(tmp_path):
    for label in range(1000):
        (tmp_path / str(label)).mkdir()
        (tmp_path / str(label) / 'a.jpeg').touch()
    dataset = build('ImageNetV2', tmp_path)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [i['gt_label'] for i in infos] == \
        [int(i['img_path'].split('/')[-2]) for i in infos]
    assert sorted(i['gt_label'] for i in infos) == list(range(1000))


@pytest.mark.parametrize('name, folder', [
    ('ImageNetR', 'n00000001'), ('ImageNetR', '7'), ('ImageNetR', 'val'),
    ('ImageNetV2', 'n01443537'), ('ImageNetV2', '007'),
    ('ImageNetV2', '1000'), ('ImageNetV2', '-1')])
def test_other_folders_are_refused(tmp_path, name, folder):
    trees.image(f'{tmp_path}/{folder}/a.jpg', (8, 8))
    with pytest.raises(ConfigError, match=f'{folder!r} .* names no class'):
        build(name, tmp_path)


def test_no_images(tmp_path):
    (tmp_path / '5').mkdir()
    with pytest.raises(ConfigError, match='no images'):
        build('ImageNetV2', tmp_path)
