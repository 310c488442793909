"""Linear and k-NN evaluation of frozen backbones."""
import glob
import json
import os
import re
import runpy
import shutil

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

import forked
import tiny
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.linear_eval import evaluation_config
from mmsinger.models import FrozenBackbone, KNNClassifier, LinearDepthHead
from mmsinger.registry import MODELS

CONFIGS = os.path.join(tiny.ROOT, 'configs', 'linear_eval')
DIGITS = os.path.join(tiny.ROOT, 'configs', 'demo', 'singer_digits.py')
# The student of a recipe, cut
SOURCE = '''
default_scope = 'mmpretrain'
model = dict(
    type='mmpretrain.ImageClassifier',
    data_preprocessor=dict(mean=[10., 20., 30.], std=[64., 65., 66.],
                           to_rgb=True),
    backbone=dict(
        type='VisionTransformer', img_size=32, patch_size=8,
        arch=dict(embed_dims=16, num_layers=2, num_heads=2,
                  feedforward_channels=32)))
'''


# -- the frozen backbone ---------------------------------------------------


def checkpoint(path, backbone, prefix='backbone.', **other):
    tiny.write_teacher(str(path), backbone, prefix)
    content = torch.load(path)
    content['state_dict'].update(other)
    torch.save(content, path)
    return str(path)


def reference_tokens(backbone, images, layer):
    """Output of a block, read without mmsinger."""
    outputs = []
    handle = backbone.layers[layer].register_forward_hook(
        lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        backbone(images)
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize('layer', [-1, 1, 'layers.2'])
def test_outputs_are_the_blocks_raw_tokens(tmp_path, layer):
    path = checkpoint(tmp_path / 'a.pth', tiny.vit(), **{
        'head.fc.weight': torch.zeros(3, 32)})
    images = torch.randn(2, 3, 32, 48)
    for output in ('cls_token', 'mean_patch', 'featmap', 'featmap_cls'):
        frozen = FrozenBackbone(tiny.vit(), path, layer=layer, output=output)
        frozen.init_weights()
        index = layer if isinstance(layer, int) else 2
        values = reference_tokens(frozen.backbone, images, index)
        cls_token, patches = values[:, 0], values[:, 1:]
        grid = patches.reshape(2, 4, 6, 32).permute(0, 3, 1, 2)
        expected = dict(
            cls_token=cls_token, mean_patch=patches.mean(1), featmap=grid,
            featmap_cls=torch.cat(
                [grid, cls_token[:, :, None, None].expand_as(grid)], 1))
        found, = frozen(images)
        torch.testing.assert_close(found, expected[output])
        assert not found.requires_grad


def test_it_stays_frozen_and_complete():
    frozen = FrozenBackbone(tiny.vit(drop_rate=0.5))
    frozen.train()
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {f'backbone.{k}' for k in frozen.backbone.state_dict()} == \
        set(frozen.state_dict())


@pytest.mark.parametrize('written, given', [
    ('backbone.', 'backbone.'),              # plain, or *_student.pth
    ('student.backbone.', 'backbone.'),      # a distiller's checkpoint
    ('student.backbone.', 'student.backbone.'),
    ('', ''),
    ('student.', ''),                        # the student is a backbone alone
])
def test_kinds_of_checkpoints(tmp_path, written, given):
    path = checkpoint(tmp_path / 'a.pth', tiny.vit(), written, **(
        {'adapters.17.up': torch.zeros(2), 'student.head': torch.zeros(2)}
        if written == 'student.backbone.' else {}))
    frozen = FrozenBackbone(tiny.vit(), path, given)
    with pytest.raises(RuntimeError, match='backbone has no weights'):
        frozen(torch.zeros(1, 3, 32, 32))
    frozen.init_weights()
    weights = torch.load(path)['state_dict']
    for key, value in frozen.backbone.state_dict().items():
        assert torch.equal(value, weights[written + key])


def test_a_whole_models_checkpoint_is_enough(tmp_path):
    path = checkpoint(tmp_path / 'a.pth', tiny.vit())
    trained = FrozenBackbone(tiny.vit(), path)
    trained.init_weights()
    other = nn.ModuleDict(dict(backbone=FrozenBackbone(tiny.vit(), path)))
    other.load_state_dict(
        nn.ModuleDict(dict(backbone=trained)).state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(other.backbone(images)[0], trained(images)[0])


def test_errors_of_the_backbone(tmp_path):
    with pytest.raises(ConfigError, match='tools/linear_eval.py'):
        FrozenBackbone(None)
    with pytest.raises(ConfigError, match="Did you mean 'cls_token'"):
        FrozenBackbone(tiny.vit(), output='cls_tokn')
    with pytest.raises(ConfigError, match='0 to 3'):
        FrozenBackbone(tiny.vit(), layer=4)
    with pytest.raises(ConfigError, match='input_size'):
        FrozenBackbone(tiny.vit(), input_size=(32, 32, 32))
    path = checkpoint(tmp_path / 'a.pth', tiny.vit())
    with pytest.raises(ConfigError, match='backbone.checkpoint.*does not fit '
                       'backbone.backbone'):
        FrozenBackbone(tiny.vit(patch_size=16), path).init_weights()
    with pytest.raises(ConfigError, match="backbone.prefix='vit.'"):
        FrozenBackbone(tiny.vit(), path, 'vit.').init_weights()
    bare = tiny.vit(with_cls_token=False, out_type='featmap')
    with pytest.raises(ConfigError, match='no CLS token.*mean_patch'):
        FrozenBackbone(bare)(torch.zeros(1, 3, 32, 32))
    mean, = FrozenBackbone(bare, output='mean_patch')(
        torch.zeros(1, 3, 32, 32))
    assert mean.shape == (1, 32)


@pytest.mark.parametrize('student', ['convnext', 'pyramid'])
def test_a_backbone_without_a_cls_token(student):
    """Its last stage is evaluated, as plain modules show it."""
    source = load_config(os.path.join(
        tiny.ROOT, 'configs', 'digits', f'singer_vitl_to_{student}.py'))
    cfg = evaluation_config(task('depth_patch_digits'), source, 'x.pth')
    assert cfg.model.decode_head.in_channels == 96
    cfg = evaluation_config(task('cls_mean_digits'), source, 'x.pth')
    assert cfg.model.head.in_channels == 96
    cfg.model.backbone.checkpoint = None
    init_default_scope(cfg.default_scope)
    frozen = MODELS.build(cfg.model.backbone)
    shown = []
    frozen.backbone.stages[-1].register_forward_hook(
        lambda module, args, output: shown.append(output))
    mean, = frozen(torch.randn(2, 3, 32, 32))
    if student == 'convnext':
        expected = shown[0].mean((2, 3))  # (B, C, h, w)
    else:
        expected = shown[0][0].mean(1)  # (B, N, C), and the grid
    torch.testing.assert_close(mean, expected)
    frozen.output = 'featmap'
    assert frozen(torch.randn(2, 3, 32, 32))[0].shape == (2, 96, 4, 4)
    frozen.output = 'cls_token'
    with pytest.raises(ConfigError, match=r'no CLS token.*cls_mean_\*'):
        frozen(torch.randn(2, 3, 32, 32))


# -- heads -----------------------------------------------------------------


def depth_sample(depth):
    return SegDataSample(gt_depth_map=PixelData(data=depth))


def brute_force_depth(features, head, size):
    """As in the official evaluation: features are upsampled first."""
    large = nn.functional.interpolate(
        features, size=size, mode='bilinear', align_corners=False)
    return head.conv(large)


@given(seed=st.integers(0, 99), bins=st.integers(2, 9),
       grid=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_depth_head_against_brute_force(seed, bins, grid):
    torch.manual_seed(seed)
    head = LinearDepthHead(6, num_bins=bins, temperature=0.6).double()
    features = torch.randn(2, 6, *grid, dtype=torch.float64)
    size = (4 * grid[0], 4 * grid[1])
    depth = 12 * torch.rand(2, *size, dtype=torch.float64)
    depth[0, 0, 0], depth[1, 1, 1], depth[1, 2, 2] = 0, float('nan'), -1
    logits = brute_force_depth(features, head, size)

    total = count = 0
    for b, y, x in np.ndindex(2, *size):
        metres = depth[b, y, x].item()
        if not metres > 0:
            continue
        nearest = min(range(bins), key=lambda i: abs(
            10 * i / (bins - 1) - min(metres, 10)))
        total -= logits[b, :, y, x].log_softmax(0)[nearest]
        count += 1
    found = head.loss((features, ), [depth_sample(d[None]) for d in depth])
    torch.testing.assert_close(found['loss_ce'], total / count)

    weights = (logits / 0.6).softmax(1)
    expected = sum(10 * i / (bins - 1) * weights[:, i] for i in range(bins))
    predicted = head.predict((features, ), [dict(img_shape=size)])
    torch.testing.assert_close(predicted[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_depth_head_in_a_window():
    """mmseg's slide inference gives its size as img_shape, a torch.Size."""
    head = LinearDepthHead(4)
    metas = dict(img_shape=torch.Size([8, 12]), pad_shape=(32, 32))
    assert head.predict((torch.randn(1, 4, 2, 3), ), [metas]).shape == \
        (1, 1, 8, 12)
    metas['img_shape'] = (8, 12)
    assert head.predict((torch.randn(1, 4, 2, 3), ), [metas]).shape == \
        (1, 1, 32, 32)


def test_depth_head_without_a_valid_pixel():
    head = LinearDepthHead(4)
    loss = head.loss((torch.randn(1, 4, 2, 2), ),
                     [depth_sample(torch.zeros(1, 8, 8))])['loss_ce']
    loss.backward()
    assert loss == 0
    assert not head.conv.weight.grad.any()


@pytest.mark.parametrize('key, value', [
    ('num_bins', 1), ('max_depth', 0.), ('temperature', 0.)])
def test_errors_of_the_depth_head(key, value):
    with pytest.raises(ConfigError, match=f'LinearDepthHead.{key}={value}'):
        LinearDepthHead(4, **{key: value})


def test_segmentation_head_is_a_linear_layer():
    """mmseg's FCNHead without convolutions, on upsampled features."""
    cfg = load_config(os.path.join(CONFIGS, 'seg_digits.py'))
    head = MODELS.build(dict(cfg.model.decode_head, in_channels=6, channels=6))
    assert {k for k, _ in head.named_parameters()} == \
        {'conv_seg.weight', 'conv_seg.bias'}
    features = torch.randn(2, 6, 4, 4)
    labels = torch.randint(0, 11, (2, 16, 16))
    labels[0, :3] = 255
    loss = head.loss((features, ), [
        SegDataSample(gt_sem_seg=PixelData(data=label[None]))
        for label in labels], None)['loss_ce']
    large = nn.functional.interpolate(features, size=(16, 16),
                                      mode='bilinear', align_corners=False)
    expected = nn.functional.cross_entropy(
        head.conv_seg(large), labels, ignore_index=255)
    torch.testing.assert_close(loss, expected)


# -- nearest neighbours ----------------------------------------------------


@given(seed=st.integers(0, 99), k=st.integers(1, 12),
       chunk=st.integers(1, 20))
def test_knn_against_brute_force(seed, k, chunk):
    torch.manual_seed(seed)
    model = KNNClassifier(
        dict(type='mmsinger.FrozenBackbone', backbone=tiny.vit()), 4, k,
        chunk_size=chunk)
    bank, labels = torch.randn(15, 5), torch.randint(0, 4, (15, ))
    queries = torch.randn(3, 5)
    model.fill_bank(nn.functional.normalize(bank), labels)
    found = model.scores(nn.functional.normalize(queries))
    for query, scores in zip(queries, found):
        similarity = [(torch.cosine_similarity(query, row, 0).item(), label)
                      for row, label in zip(bank, labels.tolist())]
        votes = np.zeros(4)
        for value, label in sorted(similarity, reverse=True)[:k]:
            votes[label] += np.exp(value / 0.07)
        np.testing.assert_allclose(scores, votes / votes.sum(), rtol=1e-3,
                                   atol=1e-6)


def test_errors_of_knn():
    backbone = dict(type='mmsinger.FrozenBackbone', backbone=tiny.vit())
    model = KNNClassifier(backbone, 2, k=3)
    with pytest.raises(ConfigError, match='KNNBankHook'):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match='only 2 images'):
        model.fill_bank(torch.eye(2), torch.zeros(2).long())
    with pytest.raises(ConfigError, match='has a label 2'):
        model.fill_bank(torch.eye(3), torch.arange(3))
    with pytest.raises(ConfigError, match='has a label -1'):
        model.fill_bank(torch.eye(3), torch.tensor([0, 1, -1]))
    with pytest.raises(ConfigError, match='not trained'):
        model(torch.zeros(1, 3, 32, 32), [], mode='loss')
    with pytest.raises(ConfigError, match='is a map'):
        KNNClassifier(dict(backbone, output='featmap'), 2)(
            torch.zeros(1, 3, 32, 32))


# -- composing -------------------------------------------------------------


def task(name='seg_digits'):
    return load_config(os.path.join(CONFIGS, f'{name}.py'))


def test_student_of_a_recipe():
    source = load_config(DIGITS)
    cfg = evaluation_config(task(), source, 'iter_400_student.pth')
    backbone = cfg.model.backbone
    assert (backbone.checkpoint, backbone.prefix) == \
        ('iter_400_student.pth', 'backbone.')
    assert backbone.backbone.arch == source.model.student.backbone.arch
    assert cfg.model.decode_head.in_channels == 64
    assert cfg.model.decode_head.channels == 64
    assert cfg.model.data_preprocessor.mean == [127.5] * 3
    assert cfg.model.data_preprocessor.bgr_to_rgb is True
    depth = evaluation_config(task('depth_digits'), source, 'x.pth')
    assert depth.model.decode_head.in_channels == 128
    knn = evaluation_config(task('knn_digits'), source, 'x.pth')
    assert knn.model.backbone.checkpoint == 'x.pth'


def test_teacher_of_a_recipe():
    source = load_config(DIGITS)
    teacher = source.model.teacher
    cfg = evaluation_config(task('cls_digits'), source, teacher=True)
    assert cfg.model.backbone.checkpoint == teacher.checkpoint
    assert cfg.model.head.in_channels == 96
    teacher.update(mean=[1., 2., 3.], std=[4., 5., 6.], swap_channels=True,
                   prefix='x.', ignore_keys=['x'], input_size=64)
    cfg = evaluation_config(task('cls_digits'), source, 'other.pth', True)
    assert cfg.model.data_preprocessor.mean == [1., 2., 3.]
    assert cfg.model.data_preprocessor.std == [4., 5., 6.]
    assert cfg.model.data_preprocessor.to_rgb is False
    assert cfg.model.backbone.checkpoint == 'other.pth'
    assert cfg.model.backbone.prefix == 'x.'
    assert cfg.model.backbone.input_size == 64


def test_teacher_that_sees_the_students_channels_swapped():
    source = load_config(DIGITS)
    source.model.teacher.update(mean=None, std=None, swap_channels=True)
    source.model.student.data_preprocessor.update(
        mean=[1., 2., 3.], std=[4., 5., 6.], bgr_to_rgb=True)
    cfg = evaluation_config(task('cls_digits'), source, teacher=True)
    assert cfg.model.data_preprocessor.mean == [3., 2., 1.]
    assert cfg.model.data_preprocessor.std == [6., 5., 4.]
    assert cfg.model.data_preprocessor.to_rgb is False


def test_teacher_that_swaps_channels_on_its_own():
    """Fed as tools/analyze_teacher.py feeds it: RGB, where no student says
    what its teacher gets."""
    teacher = dict(backbone=tiny.vit(), mean=[1., 2., 3.], std=[4., 5., 6.],
                   swap_channels=True)
    cfg = evaluation_config(task('cls_digits'), Config(dict(teacher=teacher)),
                            teacher=True)
    assert cfg.model.data_preprocessor.mean == [1., 2., 3.]
    assert cfg.model.data_preprocessor.to_rgb is True


def test_a_prefix_of_the_tasks_own():
    cfg = task()
    cfg.model.backbone.prefix = ''
    cfg = evaluation_config(cfg, load_config(DIGITS), 'x.pth')
    assert cfg.model.backbone.prefix == ''


def test_teacher_with_a_head():
    """Of a LogitKDDistiller: its backbone is evaluated."""
    source = load_config(os.path.join(tiny.ROOT, 'configs', '_base_',
                                      'teachers', 'vit_l16_in1k_cls.py'))
    teacher = source.teacher
    cfg = evaluation_config(task('cls_digits'), source, teacher=True)
    assert cfg.model.backbone.backbone.type == teacher.model.backbone.type
    assert cfg.model.backbone.prefix == \
        teacher.get('prefix', '') + 'backbone.'
    assert cfg.model.backbone.checkpoint == teacher.checkpoint


def test_backbone_of_another_scope_is_the_same():
    source = Config(dict(default_scope='mmseg', model=dict(
        type='EncoderDecoder', backbone={
            **tiny.seg_vit(), 'type': 'VisionTransformer'})))
    cfg = evaluation_config(task('cls_digits'), source, 'x.pth')
    init_default_scope('mmpretrain')
    cfg.model.backbone.checkpoint = None
    model = MODELS.build(cfg.model)
    assert type(model.backbone.backbone).__module__.startswith('mmseg.')


def test_errors_of_composing():
    source = load_config(DIGITS)
    with pytest.raises(ConfigError, match='_student.pth.*--teacher'):
        evaluation_config(task(), source)
    with pytest.raises(ConfigError, match='configs/linear_eval'):
        evaluation_config(source, source, 'x.pth')
    plain = Config(dict(model=source.model.student))
    with pytest.raises(ConfigError, match='EncoderDecoder, which has no tea'):
        evaluation_config(task(), plain, teacher=True)


# -- whole runs ------------------------------------------------------------


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Twelve scenes in the digit scenes' layout, and a backbone."""
    folder = tmp_path_factory.mktemp('place')
    rng = np.random.default_rng(0)
    root = folder / 'data' / 'digit_scenes'
    (root / 'meta').mkdir(parents=True)
    for split, name, count in (('training', 'train', 12),
                               ('validation', 'val', 6)):
        lines = []
        for kind in ('images', 'annotations', 'depth'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = i % 3
            classes = np.full((32, 32), label)
            classes[:16] = 10
            image = rng.integers(0, 40, (32, 32, 3)) + 20 * classes[..., None]
            for kind, picture in (
                    ('images', image.astype(np.uint8)),
                    ('annotations', classes.astype(np.uint8)),
                    ('depth', (classes * 900 + 500).astype(np.uint16))):
                cv2.imwrite(str(root / kind / split / f'{i:02d}.png'), picture)
            lines.append(f'{i:02d}.png {label}\n')
        (root / 'meta' / f'{name}.txt').write_text(''.join(lines))
    (folder / 'source.py').write_text(SOURCE)
    init_default_scope('mmpretrain')
    backbone = load_config(str(folder / 'source.py')).model.backbone
    checkpoint(folder / 'student.pth', backbone, **{
        'head.fc.weight': torch.zeros(3, 16)})
    return str(folder)


SHORT = ['train_cfg.max_iters=5', 'train_cfg.val_interval=5',
         'train_dataloader.batch_size=4', 'default_hooks.logger.interval=1']


def evaluate(place, name, folder, *options, check=True, source='source.py'):
    return forked.run(
        'linear_eval.py', os.path.join(CONFIGS, f'{name}_digits.py'), source,
        'student.pth', '--work-dir', folder, '--cfg-options',
        *(options or SHORT), cwd=place, check=check)


def logged(place, folder):
    """All that a run's vis_data has."""
    path, = glob.glob(os.path.join(place, folder, '2*', 'vis_data', '2*.json'))
    with open(path) as file:
        return [json.loads(line) for line in file]


METRICS = dict(cls='accuracy/top1', cls_mean='accuracy/top1', seg='mIoU',
               depth='rmse')


@pytest.fixture(scope='module')
def runs(place):
    return {name: evaluate(place, name, name).stdout for name in METRICS}


@pytest.mark.parametrize('name', METRICS)
def test_tool_from_recipe_to_metrics(place, runs, name):
    value = logged(place, name)[-1][METRICS[name]]
    with open(os.path.join(place, name, 'metrics.json')) as file:
        assert json.load(file)[METRICS[name]] == pytest.approx(value)
    assert np.isfinite(value)
    assert f'source on {name}_digits: ' in runs[name]
    assert f'{METRICS[name]} {value:.4f}' in runs[name]
    content = torch.load(os.path.join(place, name, 'iter_5.pth'),
                         weights_only=False)
    assert 'optimizer' not in content
    student = torch.load(os.path.join(place, 'student.pth'))['state_dict']
    state = content['state_dict']
    for key, value in student.items():
        if key.startswith('backbone.'):
            assert torch.equal(state[f'backbone.{key}'], value)
    losses = [line['loss'] for line in logged(place, name) if 'loss' in line]
    assert losses[-1] < losses[0]
    cfg = load_config(os.path.join(place, name, f'{name}_digits.py'))
    assert cfg.model.data_preprocessor.mean == [10., 20., 30.]


def test_metrics_of_each_class(place):
    """Logs leave lists out, metrics.json does not."""
    forked.run('linear_eval.py',
               os.path.join(CONFIGS, 'cls_digits_longtail.py'), 'source.py',
               'student.pth', '--work-dir', 'classwise', '--cfg-options',
               *SHORT, 'train_dataloader.dataset.ann_file=meta/train.txt',
               cwd=place)
    with open(os.path.join(place, 'classwise', 'metrics.json')) as file:
        recall = json.load(file)['single-label/recall_classwise']
    assert len(recall) == 10 and all(0 <= r <= 100 for r in recall)


def test_each_checkpoint_has_a_folder_of_its_own(place, tmp_path):
    for name in ('first.pth', 'second.pth'):
        shutil.copy(os.path.join(place, 'student.pth'), tmp_path / name)
        forked.run('linear_eval.py', os.path.join(CONFIGS, 'cls_digits.py'),
                   'source.py', str(tmp_path / name), '--cfg-options', *SHORT,
                   cwd=place)
    for name in ('first', 'second'):
        folder = os.path.join('work_dirs/linear_eval/source', name,
                              'cls_digits')
        assert METRICS['cls'] in logged(place, folder)[-1]


def test_each_image_passes_the_backbone_once(runs):
    for name in ('cls', 'seg', 'depth'):  # training images, then the others
        assert re.findall(r'(\d+) images passed the backbone',
                          runs[name]) == ['12', '6']


def test_dumped_config_repeats_the_run(place, runs):
    forked.run('train.py', os.path.join('seg', 'seg_digits.py'),
               '--work-dir', 'again', cwd=place)
    same_weights(place, 'seg', 'again', 0)


def same_weights(place, first, second, tolerance):
    first, second = (torch.load(
        os.path.join(place, folder, 'iter_5.pth'),
        weights_only=False)['state_dict'] for folder in (first, second))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0,
                                   atol=tolerance)


@pytest.mark.parametrize('name', ['cls', 'depth'])
def test_stored_features_train_the_same_head(place, runs, name):
    """With the same data order."""
    with open(os.path.join(place, 'plain_digits.py'), 'w') as file:
        file.write(f"_base_ = [{os.path.join(CONFIGS, f'{name}_digits.py')!r}]"
                   '\ncustom_hooks = []\n')
    result = forked.run(
        'linear_eval.py', 'plain_digits.py', 'source.py', 'student.pth',
        '--work-dir', f'{name}_plain', '--cfg-options', *SHORT, cwd=place)
    assert 'passed the backbone' not in result.stdout
    same_weights(place, name, f'{name}_plain', 1e-6)
    stored, plain = (logged(place, folder)[-1] for folder in (
        name, f'{name}_plain'))
    assert plain[METRICS[name]] == pytest.approx(stored[METRICS[name]],
                                                 abs=1e-5)


def test_a_checkpoint_is_tested_without_the_students_file(place, runs):
    forked.run('test.py', os.path.join('seg', 'seg_digits.py'),
               os.path.join('seg', 'iter_5.pth'), '--work-dir', 'tested',
               '--cfg-options', 'model.backbone.checkpoint=gone.pth',
               cwd=place)
    path, = glob.glob(os.path.join(place, 'tested', '2*', '2*.json'))
    with open(path) as file:
        assert json.load(file)['mIoU'] == \
            pytest.approx(logged(place, 'seg')[-1]['mIoU'], abs=0.01)


def test_a_head_is_for_the_backbone_it_was_trained_on(place, runs):
    def evaluated(student):
        return forked.run(
            'linear_eval.py', os.path.join(CONFIGS, 'cls_digits.py'),
            'source.py', student, '--head', 'cls/iter_5.pth', '--work-dir',
            'with_head', cwd=place, check=False)

    value = logged(place, 'cls')[-1]['accuracy/top1']
    assert f'accuracy/top1 {value:.4f}' in evaluated('student.pth').stdout
    content = torch.load(os.path.join(place, 'student.pth'))
    content['state_dict']['backbone.cls_token'] += 1
    torch.save(content, os.path.join(place, 'another.pth'))
    refused = evaluated('another.pth')
    assert refused.returncode == 1 and 'Traceback' not in refused.stdout
    assert "trained on other weights than 'another.pth'" in refused.stdout
    refused = forked.run(
        'linear_eval.py', os.path.join(CONFIGS, 'cls_digits.py'), 'source.py',
        'student.pth', '--head', 'cls/iter_5.pth', '--resume', cwd=place,
        check=False)
    assert refused.returncode == 2
    assert '--head trains nothing' in refused.stdout


def test_resumed(place, runs):
    """From what is there, or from the start."""
    def evaluated(steps):
        return forked.run(
            'linear_eval.py', os.path.join(CONFIGS, 'cls_digits.py'),
            'source.py', 'student.pth', '--work-dir', 'resumed', '--resume',
            '--cfg-options', *SHORT, f'train_cfg.max_iters={steps}',
            'default_hooks.checkpoint.interval=3', cwd=place).stdout

    assert 'Iter(train) [1/3]' in evaluated(3)
    output = evaluated(5)
    assert 'Iter(train) [3/5]' not in output
    assert 'Iter(train) [4/5]' in output and 'Iter(train) [5/5]' in output

    content = torch.load(os.path.join(place, 'student.pth'),
                         weights_only=True)
    for value in content['state_dict'].values():
        value.mul_(1.01) if value.is_floating_point() else None
    torch.save(content, os.path.join(place, 'retrained.pth'))
    refused = forked.run(
        'linear_eval.py', os.path.join(CONFIGS, 'cls_digits.py'),
        'source.py', 'retrained.pth', '--work-dir', 'resumed', '--resume',
        cwd=place, check=False)
    assert refused.returncode == 1 and 'Traceback' not in refused.stdout
    assert "trained on other weights than 'retrained.pth'" in refused.stdout
    assert 'another --work-dir' in refused.stdout


@pytest.mark.parametrize('images, processes, expected', [
    (64, 1, 64), (64, 4, 16), (64, 3, None)])
def test_images_of_a_step_are_divided(monkeypatch, images, processes,
                                      expected):
    cfg = Config(dict(launcher='pytorch',
                      train_dataloader=dict(batch_size=images)))
    monkeypatch.setenv('WORLD_SIZE', str(processes))
    divide = runpy.run_path(os.path.join(
        tiny.ROOT, 'tools', 'linear_eval.py'), run_name='tool')['divide_batch']
    if expected is None:
        with pytest.raises(ConfigError, match='among 3 processes'):
            divide(cfg)
    else:
        divide(cfg)
        assert cfg.train_dataloader.batch_size == expected


@pytest.mark.parametrize('scope, kind, expected', [
    ('mmpretrain', 'VisualizationHook',
     dict(enable=True, out_dir='painted', interval=1)),
    ('mmseg', 'SegVisualizationHook', dict(draw=True))])
def test_show_dir_is_what_the_toolbox_reads(scope, kind, expected):
    cfg = Config(dict(default_scope=scope, visualizer=dict(), default_hooks=(
        dict(visualization=dict(type=kind)))))
    paint = runpy.run_path(os.path.join(tiny.ROOT, 'tools', 'test.py'),
                           run_name='tool')['paint']
    paint(cfg, 'painted')
    hook = dict(cfg.default_hooks.visualization)
    assert hook == dict(type=kind, **expected)
    assert 'enable' in expected or cfg.visualizer.save_dir == 'painted'


def test_knn(place, runs):
    output = evaluate(place, 'knn', 'knn', 'model.k=3').stdout
    value = logged(place, 'knn')[-1]['accuracy/top1']
    assert f'accuracy/top1 {value:.4f}' in output
    forked.run('test.py', os.path.join('knn', 'knn_digits.py'),
               '--work-dir', 'knn_tested', cwd=place)
    path, = glob.glob(os.path.join(place, 'knn_tested', '2*', '2*.json'))
    with open(path) as file:
        assert json.load(file)['accuracy/top1'] == pytest.approx(value)
    refused = forked.run('test.py', os.path.join('seg', 'seg_digits.py'),
                         '--work-dir', 'none', cwd=place, check=False)
    assert refused.returncode == 1
    assert 'needs a checkpoint' in refused.stdout


def test_random_pipeline_is_refused(place):
    path = os.path.join(place, 'random_task.py')
    with open(path, 'w') as file:
        file.write(f'''
_base_ = [{os.path.join(CONFIGS, 'cls_digits.py')!r}]
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
''')
    result = forked.run('linear_eval.py', path, 'source.py', 'student.pth',
                        '--work-dir', 'random', cwd=place, check=False)
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout
    assert 'pipeline of CustomDataset is random' in result.stdout
    assert 'RandomCrop' in result.stdout


def test_wrong_checkpoint_is_refused(place):
    with open(os.path.join(place, 'wider.py'), 'w') as file:
        file.write(SOURCE.replace('feedforward_channels=32',
                                  'feedforward_channels=64'))
    result = evaluate(place, 'cls', 'wider', check=False, source='wider.py')
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout
    assert "backbone.checkpoint='student.pth' does not fit" in result.stdout
    missing = forked.run(
        'linear_eval.py', os.path.join(CONFIGS, 'cls_digits.py'),
        'source.py', 'nowhere.pth', cwd=place, check=False)
    assert missing.returncode == 1
    assert "checkpoint='nowhere.pth': no such file" in missing.stdout


# -- recipes ---------------------------------------------------------------

RECIPES = sorted(glob.glob(os.path.join(CONFIGS, '*.py')))
EPOCHS = dict(cls=150, seg=200, depth=200)


def name_of(path):
    return os.path.splitext(os.path.basename(path))[0]


@pytest.mark.parametrize('path', RECIPES, ids=name_of)
def test_recipe_fits_a_student(path):
    """One model for each, with a head as wide as the student."""
    with open(path) as file:
        lines = file.read().splitlines()
    assert lines[0].startswith('#') and len(lines) <= 25
    cfg = evaluation_config(load_config(path), load_config(DIGITS), 'x.pth')
    cfg.model.backbone.checkpoint = None
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    inputs = torch.randn(2, 3, 32, 32)
    if isinstance(model, KNNClassifier):
        assert model.features(inputs).shape == (2, 64)
        return
    logits = model(inputs, mode='tensor')
    if hasattr(model, 'decode_head'):
        assert logits.shape == (2, model.decode_head.num_classes, 8, 8)
    else:
        assert logits.shape == (2, model.head.num_classes)
    trained = {name.split('.')[0] for name, p in model.named_parameters()
               if p.requires_grad}
    assert trained == {'decode_head' if logits.dim() == 4 else 'head'}


@pytest.mark.parametrize(
    'path', [p for p in RECIPES if not re.search('digits|photos|knn', p)],
    ids=name_of)
def test_full_recipe_is_the_official_one(path):
    cfg = load_config(path)
    epochs = EPOCHS[name_of(path).split('_')[0]]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay,
            optimizer.momentum) == ('SGD', 0.5, 1e-6, 0.)
    schedule, = cfg.param_scheduler
    assert (schedule.type, schedule.eta_min, schedule.end) == \
        ('CosineAnnealingLR', 1e-8, epochs)
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.train_dataloader.batch_size == 64
    assert cfg.train_dataloader.sampler.type == 'DefaultSampler'


@pytest.mark.parametrize('name', ['inverted', 'blurred'])
def test_transforms_that_draw_numbers_are_not_cached(name):
    cfg = load_config(os.path.join(CONFIGS, f'cls_digits_{name}.py'))
    assert not cfg.custom_hooks
