"""Each mistake ends in a clear error that names the key and the fix.

Through ``tools/train.py`` where the command line matters; the rest in this
process, through the same functions.
"""
import hashlib
import os
import shutil
from argparse import ArgumentParser
from contextlib import nullcontext
from types import SimpleNamespace
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

import forked
import tiny
from mmsinger.checkpoint import read_weights
from mmsinger.engine import checks, prepare
from mmsinger.engine.options import ConfigOptions
from mmsinger.engine.prepare import load_config, prepare_training
from mmsinger.engine.resume import (check_checkpoint_files,
                                    refuse_to_overwrite,
                                    resume_from_intact_checkpoint, take_up)
from mmsinger.errors import (ConfigError, check_output_file, near_matches,
                             readable_errors)
from mmsinger.models.features.anatomy import Blocks
from mmsinger.models.features.compiled import compile_blocks
from mmsinger.registry import MODELS


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize('word, choices, hint', [
    ('singer', ['SiNGER', 'FitNet'], " Did you mean 'SiNGER'?"),
    ('Loss_KD', ['loss_info', 'rank', 'loss_kd'],
     " Did you mean 'loss_kd', 'loss_info'?"),
    ('gian', ['Gain', 'gain', 'GAIN', 'gains'],
     " Did you mean 'Gain', 'gain', 'GAIN'?"),
    ('x', ['loss_kd'], '')])
def test_near_matches(word, choices, hint):
    assert near_matches(word, choices) == hint


def train(place, *options, work_dir='run', args=()):
    """Exit code and output of tools/train.py."""
    extra = ['--cfg-options', *options] if options else []
    result = forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', work_dir,
                        *args, *extra, cwd=place, check=False)
    return result.returncode, result.stdout


def message_of(output):
    """What the tool says in the end, without the log before it."""
    assert 'Traceback' not in output, output[-3000:]
    for kind in ('ConfigError: ', 'TrainingError: '):
        if kind in output:
            return output[output.index(kind):]
    raise AssertionError(output[-3000:])


# -- through the command line ----------------------------------------------

CHEAP = {  # found before a model is built
    'teacher-missing': (
        ['model.teacher.checkpoint=nowhere.pth'],
        ["model.teacher.checkpoint='nowhere.pth'", 'no such file', 'set ']),
    'misspelt-option': (
        ['model.adaptr.rank=8'],
        ['model.adaptr.rank', "Did you mean 'adapter'?"]),
    'misspelt-loader': (
        ['train_dataloadr.batch_size=8'],
        ["Did you mean 'train_dataloader'?"]),
    'misspelt-loss-key': (
        ['model.loss_outlier.quantil=0.9'],
        ['model.loss_outlier.quantil', "Did you mean 'quantile'"]),
    'misspelt-model-key': (
        ['model.layerz=[1]'], ['model.layerz', "Did you mean 'layers'"]),
    'quantile': (
        ['model.loss_outlier.quantile=1.5'],
        ['loss_outlier.quantile=1.5', 'between 0 and 1']),
    'hooks-no-dicts': (
        ['custom_hooks=[EMAHook]'],
        ["custom_hooks=['EMAHook']", 'must be a list of dict(type=']),
    'checkpoints-not-writable': (
        ['default_hooks.checkpoint.out_dir=/proc/x'],
        ["default_hooks.checkpoint.out_dir='/proc/x' is not writable"]),
    'nothing-to-train': (
        ['train_cfg=None'], ['has no train_cfg', 'nothing to train']),
    'data-missing': (
        ['train_dataloader.dataset.data_root=nowhere'],
        ['train_dataloader.dataset.data_root', "'nowhere'", 'Point']),
}


@pytest.mark.parametrize('options, texts', CHEAP.values(), ids=CHEAP)
def test_cheap_mistakes_end_before_a_model_is_built(place, options, texts):
    code, output = train(place, *options)
    message = message_of(output)
    assert code == 1
    for text in texts:
        assert text in message
    # the runner logs these before and after it builds the model
    assert 'Hooks will be executed' not in output
    assert 'Teacher VisionTransformer loaded' not in output


UNKNOWN = {
    'unknown-type': (
        ['train_pipeline.0.type=LoadImageFromFil'],
        ["type='LoadImageFromFil'", 'no such transform',
         "Did you mean 'LoadImageFromFile'"]),
    'unknown-model': (
        ['model.type=mmsinger.SINGERDistiller'],
        ["model.type='mmsinger.SINGERDistiller'",
         "'mmsinger.SiNGERDistiller'"]),
    'unknown-argument': (
        ['train_dataloader.batch_sise=8'],
        ['train_dataloader.batch_sise: DataLoader has no such key',
         "Did you mean 'batch_size'"]),
    'unknown-argument-of-a-hook': (
        ["custom_hooks=[dict(type='EMAHook', momentm=0.1)]"],
        ['custom_hooks.0 (EMAHook)', "argument 'momentm'",
         "Did you mean 'momentum'"]),
}


@pytest.mark.parametrize('options, texts', UNKNOWN.values(), ids=UNKNOWN)
def test_what_mmengine_cannot_build(place, options, texts):
    code, output = train(place, *options)
    message = message_of(output)
    assert code == 1
    for text in texts:
        assert text in message


def test_the_tools_say_it_in_a_process_of_their_own(place):
    result = tiny.run_tool(
        'train.py', tiny.SEG_CONFIG, '--cfg-options', 'model.layers=[1,9]',
        cwd=place, check=False)
    assert result.returncode == 1
    message = message_of(result.stdout)
    assert 'layers=9 is out of range' in message
    assert 'choose from 0 to 3' in message


def test_config_that_is_not_there(place):
    result = forked.run('train.py', 'nowhere.py', cwd=place, check=False)
    assert result.returncode == 1
    assert "config 'nowhere.py': no such file" in message_of(result.stdout)


def damaged_teacher(place, kind):
    path = os.path.join(place, f'{kind}.pth')
    if kind == 'truncated':
        with open(os.path.join(place, 'teacher.pth'), 'rb') as file:
            content = file.read()
        with open(path, 'wb') as file:
            file.write(content[:len(content) // 2])
    elif kind == 'wider':
        cfg = load_config(tiny.SEG_CONFIG)
        backbone = cfg.model.teacher.backbone
        backbone.arch.embed_dims = 48
        tiny.write_teacher(path, backbone)
    elif kind == 'deeper':
        cfg = load_config(tiny.SEG_CONFIG)
        backbone = cfg.model.teacher.backbone
        backbone.arch.num_layers = 5
        tiny.write_teacher(path, backbone)
    elif kind == 'prefix':
        cfg = load_config(tiny.SEG_CONFIG)
        tiny.write_teacher(path, cfg.model.teacher.backbone, prefix='vit.')
    return os.path.basename(path)


@pytest.mark.parametrize('kind, texts', [
    ('truncated', ["teacher.checkpoint='truncated.pth'", 'truncated']),
    ('wider', ["teacher.checkpoint='wider.pth'", 'shapes differ',
               'teacher.backbone']),
    ('deeper', ["teacher.checkpoint='deeper.pth'", 'unexpected keys',
                'layers.4.ln1.weight', 'teacher.backbone']),
    ('prefix', ["teacher.prefix='backbone.'", "['vit.']"]),
])
def test_teacher_file_that_does_not_fit(place, kind, texts):
    name = damaged_teacher(place, kind)
    code, output = train(place, f'model.teacher.checkpoint={name}')
    message = message_of(output)
    assert code == 1
    for text in texts:
        assert text in message
    assert 'Iter(train)' not in output


@pytest.mark.parametrize('args', [('--work-dir', 'file/below'), ()],
                         ids=['option', 'config'])
def test_work_dir_that_is_not_writable(place, args):
    with open(os.path.join(place, 'file'), 'w'):
        pass  # a folder below a file cannot be made, by root neither
    options = [] if args else ['--cfg-options', 'work_dir=file/below']
    result = forked.run('train.py', tiny.SEG_CONFIG, *args, *options,
                        cwd=place, check=False)
    message = message_of(result.stdout)
    assert result.returncode == 1
    assert "work_dir='file/below' is not writable" in message
    assert '--work-dir' in message


def test_resume_from_a_checkpoint_that_is_not_there(place):
    code, output = train(place, args=('--resume', 'nowhere.pth'))
    assert code == 1
    assert "load_from (or --resume)='nowhere.pth'" in message_of(output)


@pytest.mark.parametrize('name', ['run', 'a [x] {0} %d ü*?'])
def test_resume_passes_over_a_checkpoint_that_was_cut_off(tmp_path, name):
    """… and over a pointer to where the folder was before."""
    tmp_path = tmp_path / name
    tmp_path.mkdir()
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.work_dir, cfg.resume = str(tmp_path), True
    resume_from_intact_checkpoint(cfg)  # nothing there: from the start
    assert not cfg.get('load_from')
    for step in (2, 4, 6):
        path = tmp_path / f'iter_{step}.pth'
        torch.save(dict(step=torch.full((5000, ), step)), path)
        os.utime(path, (step, step))
        for export in ('student', 'student_timm'):
            shutil.copy(path, tmp_path / f'iter_{step}_{export}.pth')
    (tmp_path / 'last_checkpoint').write_text('/gone/iter_4.pth')
    resume_from_intact_checkpoint(cfg)
    assert cfg.load_from == str(tmp_path / 'iter_4.pth')
    for step, kept in ((4, 2000), (6, 0)):
        path = tmp_path / f'iter_{step}.pth'
        path.write_bytes(path.read_bytes()[:kept])
    cfg.load_from = None
    resume_from_intact_checkpoint(cfg)
    assert cfg.load_from == str(tmp_path / 'iter_2.pth')
    path = tmp_path / 'iter_2.pth'
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    cfg.load_from = None
    with pytest.raises(ConfigError, match='none of the checkpoints'):
        resume_from_intact_checkpoint(cfg)


@pytest.mark.parametrize('options, text', [
    (dict(resume='run/iter_4.pth'), '--resume PATH'),
    (dict(resume='maybe'), 'neither True nor False'),
    (dict(load_from=5), 'load_from=5 is not valid'),
    (dict(load_from=''), "load_from='': no such file"),
    (dict(load_from='', resume=True), 'no such file'),
    (dict(val_evaluator=None), '--no-validate'),
    (dict(val_cfg=None, val_dataloader=None), 'belong together'),
])
def test_starts_that_mean_nothing(here, options, text):
    cfg = load_config(tiny.SEG_CONFIG)
    for key, value in options.items():
        cfg[key] = value
    with pytest.raises(ConfigError, match=text):
        prepare_training(cfg)


# -- in this process -------------------------------------------------------

def start(options):
    """As tools/train.py, up to where the teacher is loaded."""
    cfg = load_config(tiny.SEG_CONFIG, options)
    cfg.work_dir = 'in_process'
    prepare_training(cfg)
    MODELS.build(cfg.model).init_weights()


RESNET = dict(_delete_=True, type='mmpretrain.ResNet', depth=18)
SWIN = dict(_delete_=True, type='mmpretrain.SwinTransformer', arch='tiny',
            img_size=32)
MODEL_MISTAKES = {
    'layer-out-of-range': (
        {'model.layers': [1, 4]},
        ['layers=4 is out of range', 'choose from 0 to 3']),
    'layer-path': (
        {'model.layers': ['layers.1', 'layrs.3']},
        ["layers='layrs.3'", 'no such block', "Did you mean 'layers.3'"]),
    'layers-unsorted': ({'model.layers': [3, 1]}, ['layers', 'ascending']),
    'layers-empty': ({'model.layers': []}, ['layers=[]', 'must be a list']),
    'student-layer': (
        {'model.student_layers': [0, 5]},
        ['student_layers=5 is out of range', 'choose from 0 to 1']),
    'student-layer-path': (
        {'model.student_layers': ['layers.0', 'layer.1']},
        ["student_layers='layer.1'", "Did you mean 'layers.1'"]),
    'student-layers-count': (
        {'model.student_layers': [1]}, ['student_layers=[1]', 'each of']),
    'rank': (
        {'model.adapter.rank': 33},
        ['adapter.rank=33', 'between 1 and 32']),
    'rank-zero': ({'model.adapter.rank': 0}, ['adapter.rank=0']),
    'rank-text': ({'model.adapter.rank': 'many'}, ["adapter.rank='many'"]),
    'quantile-zero': (
        {'model.loss_outlier.quantile': 0.},
        ['loss_outlier.quantile=0.0', 'between 0 and 1']),
    'quantile-one': (
        {'model.loss_outlier.quantile': 1}, ['loss_outlier.quantile=1']),
    'init': (
        {'model.adapter.init': 'nulspace'},
        ["adapter.init='nulspace'", "'nullspace', 'random', 'zero'"]),
    'adapter-key': (
        {'model.adapter.rang': 8},
        ['model.adapter.rang', "Did you mean 'rank'"]),
    'teacher-key': (
        {'model.teacher.chekpoint': 'x.pth'},
        ['model.teacher.chekpoint', "Did you mean 'checkpoint'"]),
    'loss-type': (
        {'model.loss_info.type': 'GramInfoLoss'},
        ["model.loss_info.type='GramInfoLoss'"]),
    'loss-no-dict': ({'model.loss_kd': 1.0}, ['model.loss_kd', 'dict']),
    'target-norm': (
        {'model.target_norm': 'standardize'},
        ["target_norm='standardize'", "'standardise'"]),
    'task-weight': (
        {'model.task_loss_weight': -1},
        ['model.task_loss_weight=-1', '0 or more']),
    'channels': (
        {'model.student.backbone.in_channels': 1},
        ['no common input', '1 channels', '3', 'in_channels']),
    'no-head': (
        {'model.student': dict(
            _delete_=True, _scope_='mmpretrain', type='ImageClassifier',
            backbone=dict(
                type='VisionTransformer', img_size=32,
                patch_size=8, arch=dict(
                    embed_dims=16, num_layers=2, num_heads=2,
                    feedforward_channels=32)))},
        ['no head', 'task_loss_weight=0']),
    'teacher-cnn': (
        {'model.teacher.backbone': RESNET},
        ['teacher: ResNet is no vision transformer', 'Supported are']),
    'teacher-pyramid': (
        {'model.teacher.backbone': SWIN}, ['teacher', 'Swin']),
    'normalisation': (
        {'model.teacher.mean': None}, ['teacher.mean', 'teacher.std']),
    'normalisation-scale': (
        {'model.teacher.mean': [0.485, 0.456, 0.406],
         'model.teacher.std': [0.229, 0.224, 0.225]},
        ['0 to 255', 'mean=[123.675, 116.28, 103.53]',
         'std=[58.395, 57.12, 57.375]']),
}


@pytest.mark.parametrize('options, texts', MODEL_MISTAKES.values(),
                         ids=MODEL_MISTAKES)
def test_model_mistakes(here, options, texts):
    with pytest.raises(ConfigError) as error:
        start(options)
    for text in texts:
        assert text in str(error.value)


def test_inference_functions_are_for_students(here):
    cfg = load_config(tiny.SEG_CONFIG)
    with pytest.raises(ConfigError, match='NAME_student.py.*_student.pth'):
        MODELS.build(dict(  # what mmseg.apis.init_model adds
            cfg.model, pretrained=None, train_cfg=None))


def test_the_same_config_without_a_mistake(here):
    start({})


@pytest.mark.parametrize('name', ['train', 'val'])
@pytest.mark.parametrize('kind', ['missing', 'empty', 'no folder'])
def test_data_folders(here, tmp_path, name, kind):
    if kind != 'missing':
        (tmp_path / 'scenes' / 'images').mkdir(parents=True)
        if kind == 'empty':
            (tmp_path / 'scenes' / 'annotations').mkdir()
        else:
            (tmp_path / 'scenes' / 'images' / 'a.png').write_text('')
    key = f'{name}_dataloader.dataset.data_root'
    with pytest.raises(ConfigError, match='data_root') as error:
        start({key: str(tmp_path / 'scenes')})
    assert str(tmp_path) in str(error.value)
    assert f'{name}_dataloader.dataset' in str(error.value)


@pytest.mark.parametrize('options, text', [
    ({'optim_wraper.optimizer.lr': 1.}, "Did you mean 'optim_wrapper'?"),
    ({'model.techer.checkpoint': 'x'}, "Did you mean 'teacher'?"),
    ({'model.student.backbon.embed_dims': 8},
     "Did you mean 'backbone'?"),
    ({'model.layers.7': 1}, 'model.layers.7'),
])
def test_options_that_would_never_be_read(options, text):
    with pytest.raises(ConfigError, match='--cfg-options') as error:
        load_config(tiny.SEG_CONFIG, options)
    assert text in str(error.value)


@pytest.mark.parametrize('options', [
    {'find_unused_parameters': True},
    {'randomness.deterministic': True},
    {'default_hooks.early_stopping.type': 'EarlyStoppingHook'},
    {'model.student.backbone.qkv_bias': False},
    {'model.data_preprocessor.size': (32, 32)},
    {'param_scheduler.0.end': 3},
    {'test_pipeline.1.reduce_zero_label': False},
    {'compile': True},
])
def test_options_that_are_new_but_meant(options):
    cfg = load_config(tiny.SEG_CONFIG, options)
    (key, value), = options.items()
    node = cfg
    for name in key.split('.'):
        node = node[int(name) if name.isdigit() else name]
    assert node == value


@pytest.mark.parametrize('content, text', [
    ("_base_ = ['nowhere.py']\n", 'nowhere.py'),
    ('model = dict(\n', 'line 1'),
    ("_base_ = ['mmseg::vit/nowhere.py']\n", 'nowhere.py'),
])
def test_configs_that_cannot_be_read(tmp_path, content, text):
    path = tmp_path / 'broken.py'
    path.write_text(content)
    with pytest.raises(ConfigError, match='broken.py') as error:
        load_config(str(path))
    assert text in str(error.value)


def test_a_registry_that_wraps_errors_does_not_bury_them(capsys):
    """mmengine 0.10.7 raises a constructor's error anew."""
    with pytest.raises(SystemExit) as end, readable_errors():
        try:
            raise ConfigError('adapter.rank=99')
        except ConfigError as error:
            raise type(error)(f'class `X` in x.py: {error}')
    assert end.value.code == 1
    assert capsys.readouterr().err == '\nConfigError: adapter.rank=99\n'
    with pytest.raises(KeyError), readable_errors():
        raise KeyError('a bug keeps its traceback')


def test_a_config_that_cannot_be_printed_does_not_hide_an_error():
    cfg = Config(dict(model=object()))
    with pytest.raises(SyntaxError):
        cfg.pretty_text

    def fail(cfg):
        raise ValueError('what went wrong')

    with pytest.raises(ValueError, match='what went wrong'), \
            readable_errors():
        fail(cfg)


def test_pretrained_weights_that_cannot_be_fetched(capsys):
    with pytest.raises(SystemExit) as end, readable_errors():
        raise URLError('Name or service not known')
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert 'ConfigError: Weights cannot be fetched: Name or service' in said
    assert 'model.student.backbone.init_cfg' in said


# -- during training -------------------------------------------------------

def checksum(path):
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_non_finite_loss_stops_the_run(tmp_path, place):
    """The sixth image has a NaN; batches of one, in order."""
    shutil.copy(os.path.join(place, 'teacher.pth'), tmp_path)
    shutil.copytree(os.path.join(place, 'scenes'), tmp_path / 'scenes')
    bad = tmp_path / 'scenes' / 'images' / '5.png'
    image = cv2.imread(str(bad)).astype(np.float32)
    image[3, 3] = np.nan
    _, encoded = cv2.imencode('.tiff', image)
    bad.write_bytes(encoded.tobytes())
    options = [
        'train_dataloader.batch_size=1',
        'train_dataloader.sampler.shuffle=False',
        'train_dataloader.dataset.pipeline.0.color_type=unchanged',
        'default_hooks.checkpoint.interval=1', 'train_cfg.max_iters=8',
    ]
    code, output = train(tmp_path, *options, args=('--no-validate', ))
    message = message_of(output)
    assert code == 1
    assert 'Iteration 6' in message and 'not finite' in message
    assert 'distill.loss_kd' in message
    named = os.path.join('scenes', 'images', '5.png')
    assert f'The batch held {named}.' in message
    folder = tmp_path / 'run'
    assert str(folder / 'iter_5.pth') in message
    assert (folder / 'last_checkpoint').read_text() == \
        str(folder / 'iter_5.pth')
    assert not (folder / 'iter_6.pth').exists()
    assert not (folder / 'iter_6_student.pth').exists()

    good = torch.load(folder / 'iter_5.pth', weights_only=False)
    assert all(torch.isfinite(v).all() for v in good['state_dict'].values()
               if v.is_floating_point())

    # resumed, it stops again and leaves the checkpoint as it is
    before = checksum(folder / 'iter_5.pth')
    code, output = train(tmp_path, *options,
                         args=('--no-validate', '--resume'))
    assert code == 1 and 'Iteration 6' in message_of(output)
    assert checksum(folder / 'iter_5.pth') == before
    student = torch.load(folder / 'iter_5_student.pth', weights_only=True)
    cfg = load_config(tiny.SEG_CONFIG)
    init_default_scope('mmseg')
    MODELS.build(cfg.model.student).load_state_dict(student['state_dict'])


@pytest.mark.parametrize('name, content, words', [
    ('name.py', 'model = dict(type=undefined_name)',
     "NameError: name 'undefined_name' is not defined"),
    ('value.py', "size = int('x')", 'ValueError: invalid literal'),
    ('broken.json', '{"model": ', 'JSONDecodeError'),
    ('bytes.py', b'model = "\xff\xfe"', 'UnicodeDecodeError'),
    ('mark.py', '\ufeffmodel = 1', 'without a byte order mark'),
    ('picture.png', '', 'Only py/yml/yaml/json')])
def test_config_files_that_raise(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes)
                     else content.encode())
    with pytest.raises(ConfigError, match='cannot be read') as error:
        load_config(str(path))
    assert words in str(error.value)


def test_weights_that_are_not_finite(here):
    weights = torch.load('teacher.pth', weights_only=True)
    key = next(key for key in weights.get('state_dict', weights)
               if key.endswith('pos_embed'))
    weights.get('state_dict', weights)[key][:] = float('inf')
    torch.save(weights, 'inf.pth')
    with pytest.raises(ConfigError, match='inf.pth has weights that are not '
                                          f'finite, in {key}'):
        read_weights('inf.pth')


@pytest.mark.parametrize('options', [
    dict(backend='nonsense'), dict(mode='nonsense')])
def test_options_that_torch_cannot_compile_with(options):
    with pytest.raises(ConfigError, match='model.compile=.*nonsense'):
        compile_blocks(Blocks('layers', [torch.nn.Identity()],
                              torch.nn.Identity()), **options)


def test_braces_in_a_value():
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions)
    read = parser.parse_args([
        '--cfg-options', 'a=ck_{}.pth', 'b={"c": 1}', 'd=[{"e": 2}]'])
    assert read.cfg_options == dict(a='ck_{}.pth', b=dict(c=1),
                                    d=[dict(e=2)])


# -- what would pass without a word -----------------------------------------


def prepared(change):
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.merge_from_dict(change)
    cfg.work_dir = 'in_process'
    prepare_training(cfg)


BY_EPOCH = dict(train_cfg=dict(_delete_=True, by_epoch=True, max_epochs=2))


@pytest.mark.parametrize('change, text', [
    (dict(param_scheduler=[dict(type='ConstantLR', factor=1.)]),
     'param_scheduler.0.by_epoch=True .* would never step'),
    ({'default_hooks.param_scheduler': None}, 'nothing would step'),
    ({'default_hooks.checkpoint.by_epoch': True},
     'no checkpoint would be written before the end'),
    (dict(default_hooks=dict(_delete_=True)), 'checkpoint.by_epoch=True'),
    ({'val_dataloader.sampler.type': 'InfiniteSampler'},
     "val_dataloader.sampler.type='InfiniteSampler' has no end"),
    ({'train_dataloader.sampler.type': 'InfiniteSampler', **BY_EPOCH},
     'train_dataloader.*by_epoch=False'),
    ({'optim_wrapper.clip_grad': dict(max_nrm=1.)}, "mean 'max_norm'"),
    ({'optim_wrapper.clip_grad': dict(type='nrom', max_norm=1.)},
     "mean 'norm'"),
    ({'env_cfg.mp_cfg': dict(mp_start_method='spwan')}, "mean 'spawn'"),
    ({'train_dataloader.prefetch_factor': 0}, 'prefetch_factor=0'),
    ({'model.student.backbone.drop_path_rate': 1.5}, 'drop_path_rate=1.5'),
])
def test_settings_that_mmengine_passes_over(here, change, text):
    with pytest.raises(ConfigError, match=text):
        prepared(change)


def test_metrics_step_a_schedule_in_iterations_too(here):
    prepared(dict(param_scheduler=[dict(type='ReduceOnPlateauLR',
                                        monitor='mIoU')]))


@pytest.mark.parametrize('change, text', [
    ({'param_scheduler.0.end': 7}, 'ends at 7, the run at 6'),
    ({'default_hooks.checkpoint': None}, 'writes no checkpoint'),
    ({'model.student.data_preprocessor.bgr_to_rgb': False,
      'model.teacher.mean': [1., 2., 3.], 'model.teacher.std': [1., 2., 3.]},
     'model.teacher.swap_channels=True')])
def test_warnings_before_a_run(here, monkeypatch, change, text):
    said = []
    for module in (checks, prepare):
        monkeypatch.setattr(module, 'print_log', lambda message, **how:
                            said.append(message) if 'level' in how else None)
    prepared(change)
    assert text in ''.join(said)


@pytest.mark.parametrize('content, text', [
    ([torch.ones(2)], 'holds a list'),
    (dict(state_dict=None), 'holds no weights'),
    ({1: torch.ones(2)}, 'holds no weights'),
    (dict(student=dict(weight=torch.ones(2, 2))), 'holds no weights'),
    ({'student.weight': torch.ones(2, 2)}, r'_student\.pth'),
    (dict(a=torch.ones(2)), r'0 of 2 tensors(.|\n)*init_cfg'),
    (dict(weight=torch.full((2, 2), float('nan'))), 'not finite'),
    (b'no checkpoint', "load_from='run.pth'"),
])
def test_load_from_a_file_that_a_plain_model_cannot_begin_with(
        tmp_path, monkeypatch, content, text):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / 'run.pth').write_bytes(content)
    else:
        torch.save(content, 'run.pth')
    runner = SimpleNamespace(_resume=False, _load_from='run.pth', hooks=[],
                             model=torch.nn.Linear(2, 2), cfg=Config())
    with pytest.raises(ConfigError, match=text):
        check_checkpoint_files(Config(dict(load_from='run.pth', model={})))
        take_up(runner, torch.load('run.pth', weights_only=True))


@pytest.mark.parametrize('key', ['state_dict', 'model'])
def test_load_from_where_the_weights_stand(key):
    model = torch.nn.Linear(2, 2)
    checkpoint = {key: model.state_dict()}
    take_up(SimpleNamespace(_resume=False, _load_from='x', hooks=[],
                            model=model, cfg=Config()), checkpoint)
    assert set(checkpoint['state_dict']) == {'weight', 'bias'}


def test_a_run_does_not_write_over_another(here):
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.work_dir = os.path.join(here, 'earlier')
    os.makedirs(cfg.work_dir)
    refuse_to_overwrite(cfg)
    for name in ('iter_4_student.pth', 'other.pth'):
        with open(os.path.join(cfg.work_dir, name), 'w'):
            pass
    refuse_to_overwrite(cfg)
    with open(os.path.join(cfg.work_dir, 'iter_4.pth'), 'w'):
        pass
    with pytest.raises(ConfigError, match='iter_4.pth.*--resume'):
        refuse_to_overwrite(cfg)
    code, output = train(here, work_dir='earlier')
    assert code == 1 and 'write over' in message_of(output)
    cfg.resume = True
    refuse_to_overwrite(cfg)


def test_a_pointer_of_odd_bytes(tmp_path):
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.work_dir, cfg.resume = str(tmp_path), True
    torch.save({}, tmp_path / 'iter_4.pth')
    (tmp_path / 'last_checkpoint').write_bytes(b'\xff\xfe\0x')
    resume_from_intact_checkpoint(cfg)
    assert cfg.load_from.endswith('iter_4.pth')


@pytest.mark.parametrize('name, taken', [
    ('iter_4.pth', True), ('best_mIoU_iter_4.pth', True),
    ('epoch_1.pth', True), ('iter_4_student.pth', False),
    ('metrics.json', False)])
def test_out_does_not_replace_a_checkpoint(tmp_path, name, taken):
    path = str(tmp_path / name)
    check_output_file(path)
    (tmp_path / name).touch()
    with pytest.raises(ConfigError) if taken else nullcontext():
        check_output_file(path)


def test_a_lazy_config_with_a_name_that_is_not_there(tmp_path):
    (tmp_path / 'base.py').write_text('lr = 1.')
    path = tmp_path / 'lazy.py'
    path.write_text('from mmengine.config import read_base\n'
                    'with read_base():\n    from .base import *\n'
                    'from mmsinger.models import SiNGERDistillr\n'
                    'model = dict(type=SiNGERDistillr)\n')
    with pytest.raises(ConfigError, match='cannot be read(.|\n)*Distillr'):
        load_config(str(path))


def test_an_epoch_without_a_batch(capsys):
    loader = torch.utils.data.DataLoader([1], batch_size=2, drop_last=True)
    with pytest.raises(SystemExit), readable_errors():
        PARAM_SCHEDULERS.build(dict(
            type='LinearLR', start_factor=.1, by_epoch=True, end=1,
            convert_to_iter_based=True, epoch_length=len(loader),
            optimizer=torch.optim.SGD([torch.ones(1)], 1.)))
    assert 'an epoch has no batch' in capsys.readouterr().err
