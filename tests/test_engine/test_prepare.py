"""What the toolboxes' users write, and their own tools start."""
import copy
import os

import forked
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmsinger.datasets.random_images import RandomImages
from mmsinger.engine.checks import check_data_folders, check_pretrained
from mmsinger.engine.parts import check_parts
from mmsinger.engine.prepare import (load_config, refuse_separate_wrapper,
                                     scale_learning_rate,
                                     use_data_preprocessor)
from mmsinger.errors import ConfigError
from mmsinger.export import student_config
from mmsinger.registry import MODELS


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tiny.workplace(tmp_path_factory.mktemp('place'))


def recipe(crop=None, **changes):
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.merge_from_dict(changes)
    if crop is not None:
        cfg.train_dataloader.dataset.pipeline.insert(2, dict(
            type='RandomCrop', crop_size=crop))
    init_default_scope('mmseg')
    return cfg


@pytest.mark.parametrize('place', ['', 'model.'])
@pytest.mark.parametrize('top, own, crop', [
    ((16, 16), (32, 32), (16, 16)), ((64, 64), (16, 16), [16, 16]),
    ((16, 16), (32, 32), 16)])
def test_the_crop_decides_the_preprocessors_size(place, top, own, crop):
    cfg = recipe(crop, **{f'{place}data_preprocessor': dict(size=top),
                          'model.student.data_preprocessor.size': own})
    use_data_preprocessor(cfg)
    assert tuple(cfg.model.student.data_preprocessor.size) == (16, 16)
    use_data_preprocessor(cfg)  # once is enough


@pytest.mark.parametrize('change, text', [
    (dict(size=(16, 16)), 'data_preprocessor.size=(16, 16)'),
    (dict(mean=[1., 2., 3.]), 'data_preprocessor.mean=[1.0, 2.0, 3.0]')])
def test_preprocessors_that_contradict_each_other(change, text):
    cfg = recipe(data_preprocessor=change)
    with pytest.raises(ConfigError) as error:
        use_data_preprocessor(cfg)
    assert text in str(error.value)
    assert 'model.student.data_preprocessor' in str(error.value)


def test_preprocessors_of_a_student_without():
    cfg = recipe()
    own = cfg.model.student.pop('data_preprocessor')
    cfg.model.data_preprocessor = copy.deepcopy(own)
    cfg.data_preprocessor = copy.deepcopy(own)
    use_data_preprocessor(cfg)
    cfg.data_preprocessor.mean = [1., 2., 3.]
    with pytest.raises(ConfigError, match='and model.data_preprocessor.mean='):
        use_data_preprocessor(cfg)
    cfg.data_preprocessor = 'SegDataPreProcessor'
    with pytest.raises(ConfigError, match='give a dict'):
        check_parts(cfg)


def test_preprocessors_that_agree():
    cfg = recipe()
    cfg.data_preprocessor = copy.deepcopy(cfg.model.student.data_preprocessor)
    before = cfg.pretty_text
    use_data_preprocessor(cfg)
    assert cfg.pretty_text == before


def test_the_wrapper_for_several_optimizers_is_refused():
    cfg = recipe(model_wrapper_cfg=dict(
        type='MMSeparateDistributedDataParallel'))
    with pytest.raises(ConfigError, match='MMDistributedDataParallel'):
        refuse_separate_wrapper(cfg)


@pytest.mark.parametrize('change', [
    lambda path: {'model.student.pretrained': path},
    lambda path: {'model.student.backbone.init_cfg': dict(
        type='Pretrained', checkpoint=path)}])
def test_pretrained_weights_that_do_not_fit(tmp_path, change):
    path = str(tmp_path / 'weights.pth')
    cfg = recipe(**change(path))
    init_default_scope('mmseg')
    model = torch.nn.Module()
    model.student = MODELS.build(cfg.model.student)
    weights = model.student.backbone.state_dict()
    torch.save({f'encoder.layer.{i}.attention.weight': torch.zeros(1)
                for i in range(12)}, path)
    with pytest.raises(ConfigError) as error:
        check_pretrained(cfg.model, model)
    assert 'encoder.layer.0.attention.weight' in str(error.value)
    assert 'layers.0.ln1.weight' in str(error.value)
    for prefix in ('', 'backbone.', 'module.backbone.'):
        torch.save({prefix + k: v for k, v in weights.items()}, path)
        check_pretrained(cfg.model, model)


def test_a_run_of_the_toolboxes_own_says_what_it_lacks(
        place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    cfg = recipe(work_dir=str(tmp_path / 'run'),
                 custom_imports=dict(imports=['mmsinger']))
    runner = Runner.from_cfg(cfg)
    runner.call_hook('before_run')
    runner.model.init_weights()
    log, = (tmp_path / 'run').glob('*/*.log')
    line, = [line for line in log.read_text().splitlines()
             if 'this run lacks' in line]
    for hook in runner.model.required_hooks:
        assert hook in line
    assert 'prepare_training(cfg)' in line


def test_random_images_are_of_the_pipelines_channels():
    for color, channels in (('color', 3), ('grayscale', 1)):
        images = RandomImages([
            dict(type='mmcv.LoadImageFromFile', color_type=color),
            dict(type='mmpretrain.PackInputs')], size=(8, 12))
        assert images[0]['inputs'].shape == (channels, 8, 12)


def test_dry_run_leaves_nothing(place):
    before = sorted(os.listdir(place))
    output = forked.run(
        'train.py', tiny.SEG_CONFIG, '--dry-run', '--cfg-options',
        'visualizer.save_dir=pictures', 'default_hooks.checkpoint.out_dir=out',
        "custom_hooks=[dict(type='EMAHook',begin_iter=5)]",  # of 6
        cwd=place).stdout
    assert [name for name in sorted(os.listdir(place)) if name not in before
            and not name.startswith('output_')] == []
    for pair in ('1 -> student layer 0', '3 -> student layer 1'):
        assert f'Teacher layer {pair}, projected by (32, 16)' in output
    assert 'Parameters by learning rate' in output
    assert 'A step: ' in output and 'GiB' in output
    assert 'The run: 6 steps, about ' in output
    assert 'Saving checkpoint' not in output
    assert 'System environment' not in output  # what matters is a few lines


def test_a_learning_rate_is_scaled_once():
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=64),
                      optim_wrapper=dict(accumulative_counts=4)))
    for _ in range(2):  # the second time by the dumped config
        scale_learning_rate(cfg)
        assert cfg.auto_scale_lr == dict(base_batch_size=16, enable=True)


def test_a_data_set_that_downloads_itself(tmp_path):
    cfg = Config(dict(train_dataloader=dict(dataset=dict(
        type='CIFAR10', data_root=str(tmp_path / 'nowhere'), split='train'))))
    init_default_scope('mmpretrain')
    check_data_folders(cfg, ('train_dataloader', ))
    cfg.train_dataloader.dataset.download = False
    with pytest.raises(ConfigError, match='nowhere'):
        check_data_folders(cfg, ('train_dataloader', ))


def test_the_students_config_has_no_strategy_of_ours():
    cfg = recipe(strategy=dict(type='mmsinger.FSDPStrategy'),
                 runner_type='FlexibleRunner')
    cfg.model.compile = dict(mode='default')
    plain = student_config(cfg)
    assert 'strategy' not in plain and 'runner_type' not in plain
    assert plain.compile == dict(mode='default')
    other = dict(type='DDPStrategy')
    assert student_config(recipe(strategy=other)).strategy == other


def test_test_time_augmentation(place):
    forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'tta', cwd=place)
    plain, augmented = (forked.run(
        'test.py', tiny.SEG_CONFIG, 'tta/iter_6_student.pth', '--work-dir',
        'tested', '--out', os.path.join(place, f'{len(args)}.pkl'), *args,
        cwd=place).stdout for args in ((), ('--tta', )))
    assert 'mIoU' in plain and 'mIoU' in augmented
    one, both = (torch.cat([
        sample['pred_sem_seg']['data'].flatten() for sample in load(
            os.path.join(place, f'{count}.pkl'))]) for count in (0, 1))
    assert one.shape == both.shape
    assert not torch.equal(one, both)  # a mean of two views
    assert (one == both).float().mean() > 0.5


def test_augmentation_with_mmsegs_own_model():
    from mmseg.models import SegTTAModel
    cfg = recipe()
    cfg.model.student.pretrained = cfg.model.student.backbone.init_cfg = None
    model = SegTTAModel(module=MODELS.build(cfg.model))
    assert model.module.out_channels == 3
    assert model.module.decode_head is model.module.student.decode_head
    images = torch.rand(1, 3, 32, 32)  # for mmpretrain's FeatureExtractor
    assert len(model.module.extract_feat(images)) == 2
    with pytest.raises(AttributeError, match='backbon'):
        model.module.backbon


def load(path):
    import pickle
    with open(path, 'rb') as file:
        return pickle.load(file)


def test_ctrl_c_while_a_config_is_formatted(monkeypatch):
    from yapf.yapflib import yapf_api

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(yapf_api, 'FormatCode', interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_config(tiny.SEG_CONFIG).pretty_text


def test_a_config_is_formatted_once_for_each_content(monkeypatch):
    from yapf.yapflib import yapf_api
    formatted = []
    plain = yapf_api.FormatCode
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **kwargs: (
        formatted.append(text), plain(text, **kwargs))[1])
    cfg = load_config(tiny.SEG_CONFIG)
    text = cfg.pretty_text
    copied = copy.deepcopy(cfg)  # as a Runner does
    assert cfg.pretty_text == copied.pretty_text == text
    assert len(formatted) == 1
    assert Config.pretty_text.fget(cfg) == text  # mmengine's own
    copied.model.task_loss_weight = 0.25
    assert 'task_loss_weight=0.25' in copied.pretty_text
    assert cfg.pretty_text == text
