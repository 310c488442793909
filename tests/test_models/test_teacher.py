"""The frozen teacher: its weights, its input, and that it stays as it is."""
import copy

import pytest
import torch
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.models import FrozenTeacher, SiNGERDistiller
from mmsinger.models.features.anatomy import find_blocks
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.teachers.frozen import Normalisation, feature_settings
from tiny import build, renamed_timm, seg_vit, timm_vit, vit

PLAIN = Normalisation(None, None)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def features(teacher, images, normalisation=PLAIN, layer=2):
    return teacher(images, [layer], normalisation).tokens(layer).values


def reference_features(backbone, images, layer=2):
    """Of a plain backbone that is given just these images."""
    with torch.no_grad(), BlockTaps(
            find_blocks(backbone, 'teacher'), [layer]) as taps:
        taps.run(backbone, images)
    return taps.tokens(layer).values


@pytest.fixture
def distiller():
    model = SiNGERDistiller(
        student=vit(), task_loss_weight=0, layers=(1, 3),
        teacher=dict(backbone=vit(drop_rate=0.5, drop_path_rate=0.5)))
    model.init_weights()
    model.refinement.init_weights(model.teacher)
    return model


# -- frozen ------------------------------------------------------------------


def test_always_in_evaluation_mode(distiller):
    for mode in (True, False, True):
        distiller.train(mode)
        distiller.teacher.train(mode)
        assert not any(m.training for m in distiller.teacher.modules())
    assert distiller.student.training


def test_dropout_and_drop_path_are_off(distiller):
    distiller.train()
    images = torch.randn(2, 3, 32, 32)
    assert any(getattr(m, 'drop_prob', 0) for m in
               distiller.teacher.modules())
    assert torch.equal(features(distiller.teacher, images),
                       features(distiller.teacher, images))


def test_takes_no_gradient(distiller):
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    assert not features(distiller.teacher, images).requires_grad


def test_is_no_part_of_the_distiller(distiller):
    of_teacher = {id(p) for p in distiller.teacher.parameters()}
    assert of_teacher
    assert not any('teacher' in key for key in distiller.state_dict())
    assert not any(id(p) in of_teacher for p in distiller.parameters())
    assert not any('teacher' in name or module is distiller.teacher
                   for name, module in distiller.named_modules())


def test_a_copy_shares_it(distiller):
    twin = copy.deepcopy(distiller)
    assert twin.teacher is distiller.teacher
    assert twin.teacher.backbone is distiller.teacher.backbone
    # … and its own blocks are read, not the original's
    assert twin.student is not distiller.student
    assert twin.student_features.modules[0] is twin.student.layers[0]


def test_moves_with_the_distiller(distiller):
    distiller.to(torch.float64)
    assert {p.dtype for p in distiller.teacher.parameters()} == \
        {torch.float64}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    losses = distiller.loss(images, None)
    assert all(torch.isfinite(v) for v in losses.values())
    distiller.float()
    assert next(distiller.teacher.parameters()).dtype == torch.float32
    distiller.to('meta')
    assert next(distiller.teacher.parameters()).is_meta


def test_bare_teacher_warns_and_runs():
    teacher = FrozenTeacher(backbone=vit())
    teacher.load_weights()
    assert features(teacher, torch.randn(2, 3, 32, 32)).shape == (2, 17, 32)


# -- its input ---------------------------------------------------------------


@pytest.mark.parametrize('students', [
    PLAIN, Normalisation((127.5, ) * 3, (127.5, ) * 3),
    Normalisation(MEAN, STD)])
def test_own_normalisation(students):
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    seen = pixels
    if students.mean is not None:
        seen = (pixels - torch.tensor(students.mean).view(1, 3, 1, 1)) \
            / torch.tensor(students.std).view(1, 3, 1, 1)
    teacher = FrozenTeacher(backbone=vit(), mean=list(MEAN), std=list(STD))
    assert torch.allclose(teacher.prepare(seen, students),
                          (pixels - mean) / std, atol=1e-4)
    assert torch.allclose(
        features(teacher, seen, students),
        reference_features(teacher.backbone, (pixels - mean) / std),
        atol=1e-3)


def test_equal_normalisation_changes_nothing():
    teacher = FrozenTeacher(backbone=vit(), mean=MEAN, std=STD)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.prepare(images, Normalisation(MEAN, STD)) is images
    teacher = FrozenTeacher(backbone=vit())
    assert teacher.prepare(images, Normalisation(MEAN, STD)) is images
    assert teacher.prepare(images, PLAIN) is images


@pytest.mark.parametrize('students_mean', [MEAN, MEAN[::-1], (100., ) * 3])
def test_swapped_channels(students_mean):
    """A BGR student, a teacher with its own values for RGB, whether or not
    the two look the same as tuples."""
    rgb = torch.randint(0, 256, (2, 3, 32, 32)).float()
    bgr = rgb.flip(1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    students = Normalisation(students_mean, STD)
    seen = (bgr - torch.tensor(students_mean).view(1, 3, 1, 1)) / std
    teacher = FrozenTeacher(backbone=vit(), swap_channels=True, mean=MEAN,
                            std=STD)
    assert torch.allclose(teacher.prepare(seen, students), (rgb - mean) / std,
                          atol=1e-4)
    teacher = FrozenTeacher(backbone=vit(), swap_channels=True)
    assert torch.equal(teacher.prepare(seen, students), seen.flip(1))


def test_mean_without_std():
    with pytest.raises(ConfigError, match='mean and teacher.std belong'):
        FrozenTeacher(backbone=vit(), mean=MEAN)


@pytest.mark.parametrize('size, shape', [
    (48, (48, 48)), ((16, 48), (16, 48)), ([24, 8], (24, 8)),
    (None, (32, 64))])
def test_input_size(size, shape):
    teacher = FrozenTeacher(backbone=vit(), input_size=size)
    images = torch.rand(1, 3, 32, 64)
    prepared = teacher.prepare(images, PLAIN)
    assert prepared.shape[-2:] == shape
    assert prepared.mean() == pytest.approx(images.mean().item(), abs=0.02)
    tokens = teacher(images, [1], PLAIN).tokens(1)
    assert tokens.grid == (shape[0] // 8, shape[1] // 8)


def test_images_are_made_smaller_without_aliasing():
    teacher = FrozenTeacher(backbone=vit(), input_size=32)
    stripes = torch.zeros(1, 3, 128, 128)
    stripes[..., ::4] = 1.  # what a plain bilinear look-up would miss or hit
    prepared = teacher.prepare(stripes, PLAIN)[..., 4:-4]
    assert prepared.min() > 0.15 and prepared.max() < 0.35


@pytest.mark.parametrize('pixels, patch, rounded', [
    (224, 14, 224), (512, 14, 518), (32, 14, 28), (36, 14, 42), (4, 8, 8)])
def test_sizes_are_rounded_to_whole_patches(pixels, patch, rounded):
    teacher = FrozenTeacher(backbone=vit(patch_size=patch, img_size=56))
    images = torch.rand(1, 3, pixels, patch)
    assert teacher.prepare(images, PLAIN).shape[-2:] == (rounded, patch)


def test_patch_14_beside_patch_16():
    teacher = FrozenTeacher(backbone=vit(patch_size=14, img_size=56))
    tokens = teacher(torch.rand(1, 3, 64, 96), [1], PLAIN).tokens(1)
    assert tokens.grid == (5, 7)
    assert tokens.values.shape == (1, 36, 32)


@pytest.mark.parametrize('backbone', [
    vit('BEiTViT', img_size=(32, 48)),
    timm_vit('vit_tiny_patch16_224', img_size=(32, 48))])
def test_backbone_of_one_size_gets_it(backbone):
    teacher = FrozenTeacher(backbone=backbone)
    assert teacher.input_size == (32, 48)
    tokens = teacher(torch.rand(1, 3, 64, 64), [1], PLAIN).tokens(1)
    assert tokens.grid == (4, 6)


# -- weights -----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Writes a state dict to a file and gives a teacher's arguments."""

    def save(weights, name='teacher.pth', wrap='state_dict', **kwargs):
        path = str(tmp_path / name)
        torch.save({wrap: weights} if wrap else weights, path)
        return {**dict(backbone=vit(), checkpoint=path), **kwargs}

    return save


def weights(backbone=None, prefix=''):
    return {prefix + key: value for key, value in
            build(backbone or vit()).state_dict().items()}


def load(kwargs):
    teacher = FrozenTeacher(**kwargs)
    teacher.load_weights()
    assert teacher.loaded
    return teacher.backbone.state_dict()


def message(kwargs):
    with pytest.raises(ConfigError) as error:
        load(kwargs)
    assert 'teacher.' in str(error.value)
    return str(error.value)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize('wrap', ['state_dict', 'model', None])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.backbone.'])
def test_loads_from_any_place(saved, prefix, wrap):
    original = weights()
    file = {prefix + key: value for key, value in original.items()}
    if prefix == 'backbone.':
        file['head.fc.weight'] = torch.zeros(2, 2)
    assert_same(load(saved(file, wrap=wrap,
                           prefix=prefix.replace('module.', ''))), original)


def test_prefix_without_dot(saved):
    original = weights()
    assert_same(load(saved(weights(prefix='backbone.') | {
        f'backbone.{k}': v for k, v in original.items()},
        prefix='backbone')), original)


def test_a_pretrained_init_cfg_means_the_checkpoint(saved):
    original = weights()
    path = saved({f'backbone.{k}': v for k, v in original.items()}
                 )['checkpoint']
    assert_same(load(dict(backbone=vit(init_cfg=dict(
        type='Pretrained', checkpoint=path, prefix='backbone.')))), original)


def test_the_features_of_a_whole_model_in_a_config():
    backbone = dict(type='mmpretrain.VisionTransformer')
    whole = dict(type='mmpretrain.ImageClassifier', backbone=backbone)
    for prefix, expected in ((None, 'backbone.'), ('', 'backbone.'),
                             ('student', 'student.backbone.'),
                             ('student.', 'student.backbone.')):
        found = feature_settings(
            dict(model=whole, checkpoint='x.pth', prefix=prefix))
        assert found == dict(backbone=backbone, checkpoint='x.pth',
                             prefix=expected)
    whole['init_cfg'] = dict(type='Pretrained', checkpoint='y.pth',
                             prefix='module')
    assert feature_settings(dict(model=whole)) == dict(
        backbone=backbone, checkpoint='y.pth', prefix='module.backbone.')
    assert feature_settings(dict(model=whole, checkpoint='x.pth')) == dict(
        backbone=backbone, checkpoint='x.pth', prefix='backbone.')


def test_no_features_before_the_weights_are_there(saved):
    teacher = FrozenTeacher(**saved(weights()))
    with pytest.raises(RuntimeError, match='no weights yet.*init_weights'):
        features(teacher, torch.randn(1, 3, 32, 32))
    model = SiNGERDistiller(student=vit(), task_loss_weight=0, layers=(1, 3),
                            teacher=saved(weights()))
    with pytest.raises(RuntimeError, match='init_weights'):
        model.loss(torch.randn(1, 3, 32, 32), None)
    model.init_weights()
    assert model.loss(torch.randn(1, 3, 32, 32), None)


def test_missing_keys(saved):
    file = weights()
    for key in ('cls_token', 'layers.1.ln1.weight'):
        del file[key]
    text = message(saved(file))
    for word in ('2 missing keys', 'cls_token', 'layers.1.ln1.weight',
                 'does not fit teacher.backbone (VisionTransformer)',
                 'Make teacher.backbone the architecture'):
        assert word in text
    assert 'unexpected' not in text


def test_a_checkpoint_of_a_distillation_holds_no_teacher(saved):
    text = message(saved({'student.backbone.cls_token': torch.zeros(2),
                          'adapters.1.up': torch.zeros(2)}, prefix='teacher'))
    assert 'checkpoint of a distillation, which never holds the teacher' in \
        text and 'adapters.' not in text


def test_unexpected_keys(saved):
    file = dict(weights(), **{'head.weight': torch.zeros(2)})
    text = message(saved(file))
    assert '1 unexpected keys' in text and 'head.weight' in text
    assert "teacher.ignore_keys, for instance ['head.']" in text
    load(saved(file, ignore_keys=['head.']))
    load(saved(file, ignore_keys='head.'))


def test_wrong_shapes(saved):
    file = dict(weights(), **{'layers.0.ln1.weight': torch.zeros(7)})
    text = message(saved(file))
    assert 'shapes differ' in text
    assert 'layers.0.ln1.weight' in text and '[7]' in text


@pytest.mark.parametrize('other', [
    vit(arch=dict(embed_dims=16, num_layers=4, num_heads=4,
                  feedforward_channels=64)),
    vit(arch=dict(embed_dims=32, num_layers=6, num_heads=4,
                  feedforward_channels=64)),
    vit(patch_size=16), vit('DeiT3'), vit('BEiTViT'), seg_vit(),
    dict(type='mmpretrain.ResNet', depth=18)])
def test_another_architecture(saved, other):
    text = message(saved(weights(other)))
    assert 'does not fit teacher.backbone (VisionTransformer)' in text
    assert 'Make teacher.backbone the architecture' in text
    # it says what differs, whichever way the backbone's own hooks failed
    assert any(word in text for word in (
        'missing keys', 'unexpected keys', 'size mismatch', 'shape'))


def test_wrong_prefix_lists_the_right_ones(saved):
    file = weights(prefix='encoder.') | {'head.weight': torch.zeros(2)}
    text = message(saved(file, prefix='backbone.'))
    assert "teacher.prefix='backbone.'" in text
    assert "'encoder.'" in text and "'head.'" in text


def test_missing_prefix_is_suggested(saved):
    text = message(saved(weights(prefix='backbone.')))
    assert "set teacher.prefix='backbone.'" in text


def test_no_such_file(tmp_path):
    text = message(dict(backbone=vit(),
                        checkpoint=str(tmp_path / 'none.pth')))
    assert 'none.pth' in text and 'no such file' in text


def test_not_a_file(tmp_path):
    text = message(dict(backbone=vit(), checkpoint=str(tmp_path)))
    assert str(tmp_path) in text and 'folder' in text


@pytest.mark.parametrize('keep', [0, 1, 100, 0.5, 0.99])
def test_truncated_file(saved, keep):
    kwargs = saved(weights())
    with open(kwargs['checkpoint'], 'rb') as file:
        content = file.read()
    with open(kwargs['checkpoint'], 'wb') as file:
        file.write(content[:int(keep * len(content)) if keep < 1 else keep])
    text = message(kwargs)
    assert 'teacher.checkpoint' in text and kwargs['checkpoint'] in text
    assert 'damaged' in text


@pytest.mark.parametrize('content', [b'<html>not found</html>', b'\x80\x02',
                                     b'PK\x03\x04', b'version https://git-lfs'
                                     b'.github.com/spec/v1\n'])
def test_not_a_checkpoint(saved, content):
    kwargs = saved({})
    with open(kwargs['checkpoint'], 'wb') as file:
        file.write(content)
    assert kwargs['checkpoint'] in message(kwargs)


def test_no_code_is_run_from_a_file(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=weights(), extra=nn.Linear(1, 1)), path)
    text = message(dict(backbone=vit(), checkpoint=str(path)))
    assert 'cannot be loaded safely' in text


@pytest.mark.parametrize('content, word', [
    ([torch.zeros(2)], 'holds a list'), (dict(epoch=3), 'holds no weights')])
def test_no_weights_in_the_file(tmp_path, content, word):
    path = str(tmp_path / 'x.pth')
    torch.save(content, path)
    with pytest.raises(ConfigError, match=word):
        load(dict(backbone=vit(), checkpoint=path))


def test_timm_file_for_an_mmpretrain_backbone(saved):
    timm = build(timm_vit('vit_tiny_patch16_224', mlp_ratio=2))
    raw = timm.timm_model.state_dict()
    text = message(saved(raw))
    assert 'mmpretrain.TIMMBackbone' in text
    assert 'tools/convert_checkpoint.py' in text
    # the hint works, both ways
    images = torch.randn(1, 3, 32, 32)
    expected = reference_features(timm, images)
    same = timm_vit('vit_tiny_patch16_224', mlp_ratio=2)
    for kwargs in (saved(renamed_timm(raw), 'converted.pth'),
                   saved(raw, 'raw.pth', backbone=same),
                   saved(timm.state_dict(), 'whole.pth', backbone=same)):
        teacher = FrozenTeacher(**kwargs)
        teacher.load_weights()
        assert torch.allclose(features(teacher, images), expected, atol=1e-4)


def test_other_size_of_position_embeddings_is_resized(saved):
    load(saved(weights(vit(img_size=64))))


@pytest.mark.parametrize('kwargs, word', [
    (dict(backbone='mmpretrain.VisionTransformer'), 'a dict'),
    (dict(backbone=dict(arch='l')), 'with a type')])
def test_backbone_is_no_config(kwargs, word):
    with pytest.raises(ConfigError, match=word):
        FrozenTeacher(**kwargs)


def test_teachers_of_other_kinds():
    with pytest.raises(ConfigError, match='teacher: ResNet is no vision'):
        FrozenTeacher(backbone=dict(type='mmpretrain.ResNet', depth=18))
    with pytest.raises(ConfigError, match='teacher: SwinTransformer'):
        FrozenTeacher(backbone=dict(
            type='mmpretrain.SwinTransformer', img_size=64,
            arch=dict(embed_dims=8, depths=[1, 1, 1, 1],
                      num_heads=[1, 1, 2, 2])))
