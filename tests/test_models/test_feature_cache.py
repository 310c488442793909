"""Cached teacher tokens: the same training, fewer passes."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmsinger.errors import ConfigError
from mmsinger.engine.loading import load_distiller
from mmsinger.models import (FitNetDistiller, FrozenTeacher, SiNGERDistiller,
                             ViTKDDistiller)
from mmsinger.models.teachers.frozen import Normalisation
from tiny import seg_vit, timm_vit, vit, write_teacher

PLAIN = Normalisation(None, None)
# Blocks that get more than tokens: shared or own position bias, rotation
FAMILIES = dict(
    plain=vit(), mmseg=seg_vit(final_norm=True), eva02=vit('ViTEVA02'),
    beit_shared=vit('BEiTViT', use_rel_pos_bias=False, final_norm=True,
                    use_shared_rel_pos_bias=True),
    timm_eva02=timm_vit('eva02_tiny_patch14_224', dynamic_img_size=True),
    timm_beit_shared=timm_vit('beit_base_patch16_224', use_rel_pos_bias=False,
                              use_shared_rel_pos_bias=True),
    planted=dict(type='mmsinger.PlantedArtifacts', backbone=vit()))
ONE_SIZE = ('beit_shared', 'timm_beit_shared')


class Counted:
    """A teacher, and how many images its backbone was run on."""

    def __init__(self, feature_cache=100, backbone=None):
        self.teacher = FrozenTeacher(backbone=backbone or vit(),
                                     feature_cache=feature_cache)
        self.seen = 0
        self.teacher.backbone.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.seen += len(args[0])

    def __call__(self, images, layers=(1, 2)):
        taps = self.teacher(images, layers, PLAIN)
        return {layer: taps.tokens(layer).values for layer in layers}


def distiller(name, method=SiNGERDistiller, **kwargs):
    """Like its twin of another call, before a cache is set."""
    model = method(student=vit(), task_loss_weight=0,
                   teacher=dict(backbone=FAMILIES[name], layers=(1, 3)),
                   **kwargs)
    model.init_weights()
    if method is SiNGERDistiller:
        for adapter in model.adapters.values():
            torch.nn.init.normal_(adapter.down, std=0.1)
    model.eval()  # a student without dropout
    return model


def step(model, images):
    model.zero_grad()
    losses = model.loss(images, None)
    sum(losses.values()).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()
                 if p.grad is not None}
    return losses, gradients


@pytest.mark.parametrize('name', FAMILIES)
def test_losses_and_gradients_are_the_same(name):
    model = distiller(name)
    assert model.tapped_teacher_layers == [1, 2, 3]  # block 2 is run again
    data = torch.randn(6, 3, 32, 32)
    batches = [data[[0, 1]], data[[1, 2]], data[[3, 0, 4, 2]], data[[2]]]
    expected = [step(model, images) for images in batches]
    model.teacher.feature_cache = model.teacher._cached.capacity = 4
    for images, (losses, gradients) in zip(batches, expected):
        found, ours = step(model, images)
        assert set(found) == set(losses) and set(ours) == set(gradients)
        for key, value in losses.items():
            assert torch.allclose(found[key], value, atol=1e-5), key
        for key, value in gradients.items():
            assert torch.allclose(ours[key], value, atol=1e-5), key
    assert any('adapters' in key for key in ours)


@pytest.mark.parametrize('method', [FitNetDistiller, ViTKDDistiller])
def test_other_methods(method):
    torch.manual_seed(0)
    model = distiller('plain', method)
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(1)
    losses, _ = step(model, images)
    model.teacher.feature_cache = model.teacher._cached.capacity = 4
    for _ in range(2):
        torch.manual_seed(1)
        found, _ = step(model, images)
        for key, value in losses.items():
            assert torch.allclose(found[key], value, atol=1e-5)


def test_each_image_is_computed_once():
    teacher = Counted()
    images = torch.randn(5, 3, 32, 48)
    first = teacher(images)
    assert teacher.seen == 5
    order = [3, 1, 4]
    again = teacher(images[order].clone())
    assert teacher.seen == 5
    for layer, values in first.items():
        assert torch.equal(again[layer], values[order])
    teacher(torch.cat([images[:2], torch.randn(2, 3, 32, 48)]))
    assert teacher.seen == 7


def test_duplicates_in_a_batch_are_computed_once():
    teacher = Counted()
    images = torch.randn(3, 3, 32, 32)
    order = [0, 1, 0, 2, 0, 1]
    found = teacher(images[order])
    assert teacher.seen == 3
    single = teacher(images)
    assert teacher.seen == 3
    for layer, values in found.items():
        assert torch.equal(values, single[layer][order])


def test_capacity():
    teacher = Counted(feature_cache=3)
    images = torch.randn(5, 3, 32, 32)
    expected = teacher(images)
    for _ in range(2):
        teacher.seen = 0
        found = teacher(images)
        assert teacher.seen == 2
        for layer, values in found.items():
            assert torch.allclose(values, expected[layer], atol=1e-5)
    assert len(teacher.teacher._cached._tokens) == 3


def test_none_are_kept_without():
    teacher = Counted(feature_cache=0)
    for _ in range(2):
        teacher(torch.ones(1, 3, 32, 32))
    assert teacher.seen == 2
    assert not teacher.teacher._cached._tokens


@pytest.mark.parametrize('name', [n for n in FAMILIES if n not in ONE_SIZE])
def test_other_sizes(name):
    """Blocks are run again with the bias and rotation of their own size."""
    model = distiller(name)
    sizes = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 48),
             torch.randn(2, 3, 48, 32)]
    expected = [step(model, images) for images in sizes]
    model.teacher.feature_cache = model.teacher._cached.capacity = 10
    for _ in range(2):
        for images, (losses, _) in zip(sizes, expected):
            found, _ = step(model, images)
            for key, value in losses.items():
                assert torch.allclose(found[key], value, atol=1e-5), key


def test_what_else_makes_an_image_another():
    """Equal bytes are not enough."""
    teacher = Counted()
    images = torch.zeros(1, 3, 32, 48)
    teacher(images)
    teacher(images, (1, 3))
    teacher(images, (3, 1))
    teacher(images, (1, ))
    teacher(images.transpose(2, 3))
    assert teacher.seen == 4
    assert teacher(images, (1, 3))[3].shape == (1, 25, 32)
    teacher(images.contiguous(memory_format=torch.channels_last))
    assert teacher.seen == 4
    teacher.teacher.double()
    assert teacher(images.double())[1].dtype == torch.float64
    assert teacher.seen == 5


def test_half_precision():
    teacher = Counted()
    teacher.teacher.bfloat16()
    images = torch.randn(2, 3, 32, 32).bfloat16()
    first, again = teacher(images), teacher(images)
    assert teacher.seen == 2
    assert torch.equal(first[1], again[1])
    assert again[1].dtype == torch.bfloat16


def test_precision_may_change_on_the_way():
    """Statistics are taken in full precision, training may be mixed."""
    teacher = Counted()
    images = torch.randn(4, 3, 32, 32)
    teacher(images[:2])
    with torch.autocast('cpu', torch.bfloat16):
        found = teacher(images)
    assert torch.allclose(found[1].float(), teacher(images)[1].float())
    assert teacher.seen == 4


def test_what_is_cached_cannot_be_changed_from_outside():
    teacher = Counted()
    images = torch.randn(2, 3, 32, 32)
    first = teacher(images)
    expected = first[1].clone()
    first[1].zero_()
    again = teacher(images)
    assert torch.equal(again[1], expected)
    again[1].zero_()
    assert torch.equal(teacher(images)[1], expected)


def test_no_graph_is_kept():
    model = distiller('plain')
    model.teacher.feature_cache = model.teacher._cached.capacity = 10
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    for _ in range(2):  # a second backward pass meets no freed graph
        step(model, images)
    assert images.grad.any()  # through the student alone
    cache = model.teacher._cached
    kept = [t for tokens in cache._tokens.values() for t in tokens]
    assert len(kept) == 6
    assert not any(t.requires_grad for t in kept)
    # of a batch, nothing but what is cached
    assert not any(example._outputs for example in cache._examples.values())
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in kept)


def warnings_of(caplog, teacher, batches):
    logger = MMLogger.get_instance('cache')
    logger.addHandler(caplog.handler)
    try:
        for images in batches:
            teacher(images)
    finally:
        logger.removeHandler(caplog.handler)
    return [r.getMessage() for r in caplog.records
            if 'teacher.feature_cache' in r.getMessage()]


def test_warning_when_nothing_comes_again(caplog):
    teacher = Counted(feature_cache=2)
    said = warnings_of(caplog, teacher, torch.randn(33, 1, 3, 32, 32))
    assert len(said) == 2  # ever more seldom
    assert 'teacher.feature_cache=2: none of 8 images' in said[0]
    assert 'none of 32 images' in said[1]
    assert all('augmentation out' in text and 'feature_cache=0' in text
               and 'if it has more' in text for text in said)


def test_no_warning_in_calibration(caplog):
    model = distiller('plain', target_norm='standardise')
    model.teacher.feature_cache = 1
    model.teacher.forget_images()
    images = torch.randn(9, 3, 32, 32)
    assert not warnings_of(caplog, lambda batch: model.calibrate([batch]),
                           [images])


def test_no_warning_when_images_come_again(caplog):
    teacher = Counted(feature_cache=2)
    data = torch.randn(3, 1, 3, 32, 32)
    assert not warnings_of(caplog, teacher, [*data] * 8)


def test_other_weights_are_other_tokens(tmp_path):
    paths = [str(tmp_path / f'{seed}.pth') for seed in (0, 1)]
    for seed, path in enumerate(paths):
        write_teacher(path, vit(), '', seed)
    teacher = Counted()
    images = torch.randn(2, 3, 32, 32)
    found = []
    for path in paths:
        teacher.teacher.checkpoint = path
        teacher.teacher.load_weights()
        found.append(teacher(images)[1])
    assert teacher.seen == 4
    assert not torch.allclose(*found, atol=0.1)


def test_a_copied_distiller_shares_it():
    model = distiller('plain')
    model.teacher.feature_cache = model.teacher._cached.capacity = 10
    assert copy.deepcopy(model).teacher._cached is model.teacher._cached


def test_calibration_fills_it():
    model = distiller('plain', target_norm='standardise')
    model.teacher.feature_cache = model.teacher._cached.capacity = 10
    images = torch.randn(4, 3, 32, 32)
    model.calibrate([images[:2], images[2:]])
    assert model.teacher._cached.seen == 0  # no images of an epoch
    step(model, images)
    assert model.teacher._cached.recalled == 4


def test_measures_see_each_pass():
    """Some watch the teacher's blocks while they run."""
    cfg = Config(dict(model=dict(
        type='mmsinger.FitNetDistiller', student=vit(), layers=(1, 3),
        task_loss_weight=0, teacher=dict(backbone=vit(), feature_cache=10))))
    model = load_distiller(cfg)
    assert not model.teacher.feature_cache


def test_the_planted_mask_is_of_the_last_pass():
    teacher = dict(backbone=FAMILIES['planted'], feature_cache=10)
    with pytest.raises(ConfigError) as error:
        FitNetDistiller(
            student=vit(), layers=(1, 3), teacher=teacher,
            task_loss_weight=0,
            targets=[dict(type='mmsinger.MaskTokens', oracle=True)])
    for word in ('model.targets.0.oracle=True', 'teacher.feature_cache=10',
                 'teacher.feature_cache=0'):
        assert word in str(error.value)


@pytest.mark.parametrize('value', [-1, 1.5, '100', None, True])
def test_errors(value):
    with pytest.raises(ConfigError, match=r'teacher\.feature_cache='):
        FrozenTeacher(backbone=vit(), feature_cache=value)
