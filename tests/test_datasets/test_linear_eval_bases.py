"""The data sets' base configs, on made-up copies of the data."""
import os

import cv2
import numpy as np
import pytest
import torch
from dataset_check.known import KNOWN, TRAIN, VAL
from mmengine.config import Config
from mmengine.registry import (DATASETS, EVALUATOR, METRICS, TRANSFORMS,
                               DefaultScope, init_default_scope)
from PIL import Image

import trees

REPO = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
BASES = f'{REPO}/configs/_base_/datasets/linear_eval'
DENSE = ('ade20k', 'nyu_folder', 'nyu_mat')
CLASSES = dict(imagenet=1000, imagenet_r=1000, imagenet_v2=1000, inat2019=1010,
               aircraft=100, pets=37, food101=101, flowers102=102, ade20k=150)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """mmengine collects garbage for each data set, slowly in a test run."""
    monkeypatch.setattr('gc.collect', lambda *args: 0)


def read(name):
    return Config.fromfile(f'{BASES}/{name}.py')


def build(name, root, loader=VAL, scope=None):
    init_default_scope(scope or ('mmseg' if name in DENSE else 'mmpretrain'))
    return DATASETS.build(dict(read(name)[loader].dataset, data_root=root))


def test_every_known_data_set_has_a_base_and_a_page():
    for name in KNOWN:
        assert os.path.isfile(f'{BASES}/{name}.py'), name
        assert os.path.isfile(f'{REPO}/docs/datasets/{name}.md'), name


@pytest.mark.parametrize('name', [
    'imagenet_r', 'imagenet_v2', 'inat2019', 'aircraft', 'pets', 'food101',
    'flowers102'])
def test_recipe_has_the_data_and_their_number_of_classes(name):
    recipe = Config.fromfile(f'{REPO}/configs/linear_eval/cls_{name}.py')
    assert recipe.val_dataloader == read(name).val_dataloader
    assert recipe.test_dataloader == recipe.val_dataloader
    assert recipe.model.head.num_classes == CLASSES[name]
    assert recipe.model.backbone.type == 'mmsinger.FrozenBackbone'
    if name.startswith('imagenet'):  # the head that cls_in1k.py trained
        trained = Config.fromfile(f'{REPO}/configs/linear_eval/cls_in1k.py')
        assert recipe.model == trained.model
        assert recipe.train_dataloader == trained.train_dataloader


@pytest.mark.parametrize('name', trees.MAKERS)
def test_builds_and_gives_what_a_model_takes(name, tmp_path):
    root = trees.make(name, tmp_path)
    cfg = read(name)
    assert cfg.get('num_classes') == CLASSES.get(name)
    assert cfg.test_dataloader == cfg.val_dataloader
    assert cfg.test_evaluator == cfg.val_evaluator
    assert 'data_preprocessor' not in cfg and 'model' not in cfg
    for loader in KNOWN[name].images:
        dataset = build(name, root, loader)
        assert len(dataset) > 0
        for item in dataset:
            assert item['inputs'].shape == (3, 224, 224)
            assert item['inputs'].dtype == torch.uint8
            sample = item['data_samples']
            if name == 'ade20k':
                labels = sample.gt_sem_seg.data
                assert labels.shape == (1, 224, 224)
                labels = labels[labels != 255]
                assert 0 <= labels.min() <= labels.max() < 150
            elif name in DENSE:
                assert sample.gt_depth_map.data.shape == (1, 224, 224)
                assert 1 <= sample.gt_depth_map.data.min()
                assert sample.gt_depth_map.data.max() <= 9
            else:
                assert 0 <= sample.gt_label.item() < CLASSES[name]
    METRICS.build(cfg.val_evaluator)


@pytest.mark.parametrize('name', trees.MAKERS)
def test_evaluation_is_repeatable_and_training_is_not(name, tmp_path):
    root = trees.make(name, tmp_path)
    for loader in KNOWN[name].images:
        dataset = build(name, root, loader)
        first, second = (dataset[0]['inputs'] for _ in range(2))
        assert torch.equal(first, second) == (loader != TRAIN)


def test_loaders_visit_training_images_in_random_order():
    for name in KNOWN:
        cfg = read(name)
        assert cfg.train_dataloader.sampler.shuffle
        assert not cfg.val_dataloader.sampler.shuffle


def test_classification_does_not_depend_on_the_default_scope(tmp_path):
    root = trees.make('pets', tmp_path)
    items = [build('pets', root, scope=scope)[0]['inputs']
             for scope in ('mmpretrain', 'mmseg', 'mmengine')]
    assert torch.equal(items[0], items[1])
    assert torch.equal(items[0], items[2])


def test_short_side_256_bicubic_centre_224(tmp_path):
    """Against torchvision's transforms on the same decoded image."""
    from torchvision import transforms
    root = trees.make('pets', tmp_path)
    dataset = build('pets', root)
    path = dataset.get_data_info(1)['img_path']
    image = Image.fromarray(cv2.imread(path)[..., ::-1])
    expected = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224)])(image)
    got = dataset[1]['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
    assert np.abs(got.astype(int) - np.asarray(expected)).max() <= 1


def test_ade20k_is_compared_at_the_size_of_the_input(tmp_path):
    root = trees.make('ade20k', tmp_path)
    sample = build('ade20k', root)[0]['data_samples']
    assert sample.ori_shape == sample.img_shape == (224, 224)
    mask = cv2.imread(f'{root}/annotations/validation/0.png', -1)
    expected = cv2.resize(mask, (224, 224), interpolation=cv2.INTER_NEAREST)
    assert (expected == 0).any()
    expected = np.where(expected == 0, 255, expected.astype(int) - 1)
    np.testing.assert_array_equal(sample.gt_sem_seg.data[0], expected)


@pytest.mark.parametrize('name', ['nyu_folder', 'nyu_mat'])
def test_nyu_evaluates_the_central_square(name, tmp_path):
    root = trees.make(name, tmp_path)
    dataset = build(name, root)
    sample = dataset[0]['data_samples']
    assert sample.ori_shape == sample.img_shape == (224, 224)
    info = dataset.get_data_info(0)
    image, depth = (info['img'], info['gt_depth_map']) if 'img' in info else (
        cv2.imread(info['img_path']),
        cv2.imread(info['depth_map_path'], -1) * np.float32(1e-3))
    np.testing.assert_array_equal(
        dataset[0]['inputs'].permute(1, 2, 0), cv2.resize(
            image[:, 80:560], (224, 224), interpolation=cv2.INTER_AREA))
    np.testing.assert_allclose(
        sample.gt_depth_map.data[0], cv2.resize(
            depth[:, 80:560], (224, 224), interpolation=cv2.INTER_NEAREST))


def test_nyu_training_sees_80_per_cent_of_the_square(tmp_path):
    """The made-up depth rises evenly from 1 m at the left to 9 m."""
    dataset = build('nyu_folder', trees.make('nyu_folder', tmp_path), TRAIN)
    widths, starts = [], set()
    for _ in range(8):
        row = dataset[0]['data_samples'].gt_depth_map.data[0, 0]
        columns = (row - 1) / 8 * 639
        widths.append((columns.max() - columns.min()).item() * 224 / 223)
        starts.add(columns.min().item())
        assert 79 <= columns.min() and columns.max() <= 560
    assert np.allclose(widths, 384, atol=4)
    assert len(starts) > 1


def test_perfect_predictions_score_perfectly(tmp_path):
    init_default_scope('mmpretrain')
    dataset = build('imagenet_r', trees.make('imagenet_r', tmp_path))
    evaluator = EVALUATOR.build(dict(
        type='Evaluator', metrics=read('imagenet_r').val_evaluator))
    samples = [item['data_samples'] for item in dataset]
    for sample in samples:
        sample.set_pred_score(torch.eye(1000)[sample.gt_label.item()])
    evaluator.process(samples)
    assert evaluator.evaluate(len(samples))['accuracy/top1'] == 100


@pytest.mark.parametrize('seg_fields', [['gt_seg_map'], ['gt_depth_map'], []])
def test_maps_are_cut_where_the_image_is(seg_fields):
    DefaultScope.get_instance('test', scope_name='mmsinger')
    crop = TRANSFORMS.build(dict(
        type='mmsinger.RandomResizedSegCrop', scale=20,
        interpolation='nearest', backend='cv2'))
    rows, columns = np.mgrid[:40, :60].astype(np.uint8)
    for seed in range(20):
        np.random.seed(seed)
        results = dict(img=np.stack([rows, columns, rows], -1),
                       seg_fields=seg_fields)
        results.update({key: columns + 0.5 * rows for key in seg_fields})
        results = crop(results)
        image = results['img'].astype(float)
        assert image.shape == (20, 20, 3) and results['img_shape'] == (20, 20)
        for key in seg_fields:
            np.testing.assert_array_equal(
                results[key], image[..., 1] + 0.5 * image[..., 0])
