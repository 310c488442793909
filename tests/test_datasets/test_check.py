"""The checker finds each kind of fault, and nothing in a good copy."""
import dataclasses
import os
import runpy
import shutil
import sys

import cv2
import numpy as np
import pytest
from dataset_check import check
from dataset_check.check import check_config, check_known
from dataset_check.known import KNOWN, TRAIN, VAL
from mmengine.config import Config

import trees
from mmsinger.errors import ConfigError

BOTH = {TRAIN: trees.PER_SPLIT, VAL: trees.PER_SPLIT}
SMALL = dict(  # images and classes of the made-up copies
    imagenet=(BOTH, 3), imagenet_r=({VAL: 3}, 3), imagenet_v2=({VAL: 5}, 5),
    inat2019=({TRAIN: 16, VAL: 4}, 0), aircraft=(BOTH, 3), pets=(BOTH, 3),
    food101=(BOTH, 3), flowers102=(BOTH, 3), ade20k=(BOTH, 0),
    nyu_folder=(BOTH, 0), nyu_mat=(BOTH, 0))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """mmengine collects garbage for each data set, slowly in a test run."""
    monkeypatch.setattr('gc.collect', lambda *args: 0)


@pytest.fixture
def small(monkeypatch):
    """As if the data sets had been published in the size of our copies."""
    for name, (images, classes) in SMALL.items():
        monkeypatch.setitem(KNOWN, name, dataclasses.replace(
            KNOWN[name], classes=classes,
            images={k: (n, ) for k, n in images.items()}))


def problems(name, root, **kwargs):
    return [what for what, fix in check_known(name, root, **kwargs).problems
            if fix]


@pytest.mark.parametrize('name', SMALL)
def test_nothing_is_wrong_with_a_good_copy(small, name, tmp_path):
    report = check_known(name, trees.make(name, tmp_path))
    assert not report.problems
    assert len(report.facts) >= len(KNOWN[name].images)
    assert str(report).endswith('No problems.')


def test_real_sizes_are_expected(tmp_path):
    found = problems('pets', trees.make('pets', tmp_path))
    assert 'train: 3 images, but a complete copy has 3,680' in found
    assert 'val: 3 images, but a complete copy has 3,669' in found
    assert 'val: images of 3 classes, but a complete copy has 37' in found


@pytest.mark.parametrize('name', SMALL)
def test_missing_root_and_missing_files(small, name, tmp_path):
    with_root = problems(name, str(tmp_path / 'nowhere'))
    assert len(with_root) == 1 and 'nowhere' in with_root[0]
    root = trees.make(name, tmp_path / 'copy')
    for file in KNOWN[name].files:
        os.rename(f'{root}/{file}', f'{root}/away')
        found = problems(name, root)
        assert len(found) == 1 and f"{file}' is missing" in found[0]
        os.rename(f'{root}/away', f'{root}/{file}')


def truncate(path):
    with open(path, 'r+b') as file:
        file.truncate(os.path.getsize(path) // 2)


@pytest.mark.parametrize('harm', [
    truncate, os.remove, lambda path: open(path, 'w').close()])
def test_unreadable_images(small, tmp_path, harm):
    root = trees.make('pets', tmp_path)
    harm(f'{root}/images/breed_5.jpg')
    found = problems('pets', root)
    assert found == ['val: 1 of 3 images cannot be read: '
                     f'{root}/images/breed_5.jpg']


def test_sample_and_all(small, tmp_path):
    root = trees.make('pets', tmp_path)
    truncate(f'{root}/images/breed_1.jpg')
    assert not problems('pets', root, samples=2)
    assert problems('pets', root, samples=None)


def test_label_out_of_range(small, tmp_path):
    root = trees.make('pets', tmp_path)
    trees.lines(f'{root}/annotations/test.txt',
                [f'breed_{i} {i} 1 1' for i in (1, 2, 3, 38)])
    assert any('labels 0 to 37, but there are 37 classes' in p
               for p in problems('pets', root))


def test_wrong_class_folders(small, tmp_path):
    root = trees.make('imagenet_v2', tmp_path)
    os.rename(f'{root}/10', f'{root}/ten')
    found, = problems('imagenet_v2', root)
    assert "the folder 'ten'" in found and "'0' to '999'" in found


def test_imagenet_folders(monkeypatch, tmp_path):
    root = str(tmp_path)
    trees.imagenet_folders(root)
    monkeypatch.setitem(KNOWN, 'imagenet', dataclasses.replace(
        KNOWN['imagenet'], images={VAL: (1000, )}))
    assert not problems('imagenet', root, samples=3)
    os.rename(f'{root}/val/n01440764', f'{root}/val/tench')
    assert any('n01440764, tench' in p
               for p in problems('imagenet', root, samples=3))
    shutil.rmtree(f'{root}/val/tench')
    assert any('subfolders (999)' in p
               for p in problems('imagenet', root, samples=3))


def mask_file(root, i=0, split='validation'):
    return f'{root}/annotations/{split}/{i}.png'


def write_masks(root, change):
    for split in ('training', 'validation'):
        for i in range(trees.PER_SPLIT):
            path = mask_file(root, i, split)
            trees.array(path, change(cv2.imread(path, -1)))


def already_reduced(mask):
    return np.where(mask == 0, 255, mask - 1).astype(np.uint8)


@pytest.mark.parametrize('change, message', [
    (lambda m: np.stack([m, m, m], -1), 'masks have 3 channels'),
    (lambda m: m.astype(np.uint16), 'masks are uint16 instead of uint8'),
    (lambda m: m[:-1], 'masks are not as large as their image'),
    (lambda m: m + (m > 149), 'masks go up to 151, but there are 150'),
    (already_reduced, 'as if 0 had been removed already')])
def test_bad_masks(small, tmp_path, change, message):
    root = trees.make('ade20k', tmp_path)
    write_masks(root, change)
    found = problems('ade20k', root)
    assert len(found) == 2, found  # of both splits
    assert all(message in p for p in found)


@pytest.mark.parametrize('harm', [truncate, os.remove])
def test_unreadable_mask(small, tmp_path, harm):
    root = trees.make('ade20k', tmp_path)
    harm(mask_file(root))
    found = problems('ade20k', root)
    assert len(found) == 1 and mask_file(root) in found[0]


def test_zero_label_not_reduced(tmp_path):
    """Labels 1 to 150 with a config that takes them for 0 to 149."""
    root = trees.make('ade20k', tmp_path)
    cfg = check.load_config(f'{check.paths.configs()}/_base_/datasets/'
                            'linear_eval/ade20k.py')
    cfg.default_scope = 'mmseg'
    assert not check_config(cfg, 'ade20k', root).problems
    for loader in (cfg.train_dataloader, cfg.val_dataloader,
                   cfg.test_dataloader):
        loader.dataset.reduce_zero_label = False
    report = check_config(cfg, 'ade20k', root)
    assert len(report.problems) == 2
    what, fix = report.problems[0]
    assert 'masks go up to 150, but there are 150 classes, 0 to 149' in what
    assert 'reduce_zero_label=True' in fix


@pytest.mark.parametrize('unit, said', [(1., 'depth is 0.00'),
                                        (6000., 'depth is 30 m')])
def test_depth_unit(small, tmp_path, unit, said):
    """Metres, or sixths of millimetres, that are read as millimetres."""
    trees.nyu_folder(str(tmp_path), unit)
    report = check_known('nyu_folder', str(tmp_path))
    assert len(report.problems) == 2
    what, fix = report.problems[0]
    assert said in what and 'depth_rescale_factor' in fix


def test_depth_unit_beside_several_metrics(small, tmp_path):
    root = trees.make('nyu_folder', tmp_path)
    cfg = check.load_config(f'{check.paths.configs()}/_base_/datasets/'
                            'nyu_480.py')
    cfg.default_scope = 'mmseg'
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='DepthMetric')]
    assert not check_config(cfg, 'nyu_folder', root).problems


@pytest.mark.parametrize('change, message', [
    (lambda d: (d // 40).astype(np.uint8), '8 bits'),
    (lambda d: np.zeros_like(d), 'hold no depth'),
    (lambda d: d[:, :-1], 'not as large as their image'),
    (lambda d: np.stack([d, d, d], -1), '3 channels')])
def test_bad_depth_maps(small, tmp_path, change, message):
    root = trees.make('nyu_folder', tmp_path)
    path = f'{root}/annotations/test/kitchen_2.png'
    trees.array(path, change(cv2.imread(path, -1)))
    found, = problems('nyu_folder', root)
    assert found.startswith('val: 1 of 3') and message in found
    assert path in found


def test_damaged_mat_file(small, tmp_path):
    root = trees.make('nyu_mat', tmp_path)
    truncate(f'{root}/nyu_depth_v2_labeled.mat')
    found = problems('nyu_mat', root)
    assert found and 'cut short' in found[0]


def recipe(root, classes=37, **dataset):
    return Config(dict(
        default_scope='mmpretrain',
        model=dict(type='ImageClassifier', head=dict(num_classes=classes)),
        train_dataloader=dict(dataset=dict(
            type='RepeatDataset', times=2, dataset=dict(
                type='OxfordIIITPet', data_root=root, split='test',
                pipeline=[dict(type='LoadImageFromFile'),
                          dict(type='PackInputs')], **dataset)))))


def test_any_config(tmp_path):
    root = trees.make('pets', tmp_path)
    cfg = recipe('elsewhere')
    assert not check_config(cfg, 'mine', root).problems
    assert cfg.train_dataloader.dataset.dataset.data_root == 'elsewhere'
    (what, fix), = check_config(recipe(root, 10), 'mine').problems
    assert 'model.head.num_classes=10' in what
    assert fix == 'Set model.head.num_classes=37.'
    (what, _), = check_config(recipe('elsewhere'), 'mine').problems
    assert what.startswith('train_dataloader: cannot be built')


def test_pipeline_that_fails(tmp_path):
    root = trees.make('pets', tmp_path)
    cfg = recipe(root)
    pipeline = cfg.train_dataloader.dataset.dataset.pipeline
    pipeline[0] = dict(type='CenterCrop', crop_size=8)
    (what, _), = check_config(cfg, 'mine').problems
    assert 'does not pass the pipeline' in what
    pipeline[:] = [dict(type='LoadImageFromFile')]
    (what, fix), = check_config(cfg, 'mine').problems
    assert 'does not give inputs' in what and 'PackInputs' in fix


def test_unknown_name_and_empty_config(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'pets'"):
        check_known('pet')
    with pytest.raises(ConfigError, match='no train_dataloader'):
        check_config(Config(dict(model=dict())), 'mine')


def test_command_line(tmp_path, monkeypatch, capsys):
    root = trees.make('pets', tmp_path / 'pets')
    recipe(root).dump(str(tmp_path / 'mine.py'))

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['check_dataset.py', *args])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(os.path.join(check.paths.tools(),
                                        'check_dataset.py'),
                           run_name='__main__')
        return stopped.value.code, capsys.readouterr()

    code, said = call('pets', '--root', root)
    assert code == 1
    assert 'PROBLEM train: 3 images, but a complete copy has 3,680' in said.out
    assert 'fix: Get it from www.robots.ox.ac.uk' in said.out
    assert '4 problems.' in said.out
    code, said = call(str(tmp_path / 'mine.py'), '--all')
    assert code == 0 and 'No problems.' in said.out
    code, said = call('pet')
    assert code == 1 and "Did you mean 'pets'" in said.err
    code, said = call('pets', '--samples', '0')
    assert code == 2 and "--samples: '0'" in said.err
