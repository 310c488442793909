"""Weights of images by the entropy of the teacher's own head."""
import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from tiny import ROOT, vit

from mmsinger.checkpoint import load_checkpoint
from mmsinger.engine.loading import load_distiller
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.models import FitNetDistiller
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.targets.entropy import WeighByEntropy
from mmsinger.registry import MODELS

DIGITS = dict(head='decode_head.conv_seg', num_classes=11, tokens='patches')
CLASSIFIER = dict(head='head.fc', num_classes=3, norm='backbone.ln1')


def checkpoint(path, scale=1., bias=0., drop=(), num_classes=3):
    torch.manual_seed(0)
    model = MODELS.build(vit())
    weights = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    weights['head.fc.weight'] = scale * torch.randn(
        num_classes, model.embed_dims)
    weights['head.fc.bias'] = torch.zeros(num_classes)
    weights['head.fc.bias'][0] = bias
    torch.save(dict(state_dict={
        k: v for k, v in weights.items() if k not in drop}), path)
    return str(path)


def distiller(path, targets=()):
    torch.manual_seed(1)
    model = FitNetDistiller(
        student=vit(), task_loss_weight=0, layers=(0, 1), targets=targets,
        teacher=dict(backbone=vit(), checkpoint=path, prefix='backbone.'))
    model.init_weights()
    return model


def weigh(**settings):
    return [dict(CLASSIFIER, type='mmsinger.WeighByEntropy', **settings)]


def like(model, targets=()):
    """A distiller with the student and teacher of another."""
    plain = distiller(model.teacher.checkpoint, targets)
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


def losses_of(model, images):
    with torch.no_grad():
        return model.loss(images, None)


@pytest.fixture
def images():
    torch.manual_seed(2)
    return torch.randn(6, 3, 32, 32)


def test_what_the_head_predicts_is_what_the_whole_teacher_does():
    cfg = load_config(f'{ROOT}/configs/digits/fitnet_vitl_to_vits.py')
    cfg.model.teacher.backbone.share = 0.
    cfg.model.target_norm = None
    cfg.model.targets = dict(
        entropy=dict(type='mmsinger.WeighByEntropy', **DIGITS))
    init_default_scope('mmpretrain')
    model = load_distiller(cfg)
    step, = model.steps
    cfg = load_config(f'{ROOT}/configs/demo/digits_teacher.py')
    cfg.model.data_preprocessor = None
    init_default_scope('mmseg')
    whole = MODELS.build(cfg.model).eval()
    whole.load_state_dict(
        load_checkpoint('mmsinger://digits_teacher.pth')['state_dict'])

    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    outputs = model.run_teacher(images)
    with torch.no_grad():
        logits = whole.decode_head(whole.extract_feat(
            model.teacher.prepare(images, model.student_normalisation)))
        ours = step.readout(outputs.taps.tokens(5).patches)
    torch.testing.assert_close(
        ours, logits.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert step.readout.norm.eps == whole.backbone.ln1.eps
    entropy = torch.distributions.Categorical(logits=ours).entropy().mean(1)
    torch.testing.assert_close(step.image_weights(outputs),
                               1 - entropy / math.log(11))


def test_the_loss_is_the_mean_over_images_by_weight(tmp_path, images):
    model = distiller(checkpoint(tmp_path / 'teacher.pth'), weigh())
    weight = model.steps[0].image_weights(model.run_teacher(images))
    assert weight.shape == (6, ) and 0 < weight.min() < weight.max() < 1
    by_image = torch.stack([
        losses_of(like(model), image[None])['distill.loss_kd']
        for image in images])
    torch.testing.assert_close(
        losses_of(model, images)['distill.loss_kd'],
        (weight * by_image).sum() / weight.sum())


@pytest.mark.parametrize('bias, strength, factor', [
    (100., 1., 1.),  # sure of all
    (0., 0.5, 1.),  # half a weight for all is no difference
    (0., 1., 0.),  # knows nothing: nothing is learnt
])
def test_images_alike_count_alike(tmp_path, images, bias, strength, factor):
    path = checkpoint(tmp_path / 'teacher.pth', scale=0., bias=bias)
    model = distiller(path, weigh(strength=strength))
    torch.testing.assert_close(
        losses_of(model, images)['distill.loss_kd'],
        factor * losses_of(like(model), images)['distill.loss_kd'],
        atol=1e-6, rtol=1e-5)


def test_outlier_loss_of_a_refinement_after_it(tmp_path, images):
    refine = [dict(type='mmsinger.Refine', adapter=dict(rank=2))]
    model = distiller(checkpoint(tmp_path / 'teacher.pth'), weigh() + refine)
    weight = model.steps[0].image_weights(model.run_teacher(images))
    plain = like(model, refine)
    # The mean square excess over the outliers of all images
    excess, above = [], []
    tokens = plain.run_teacher(images).tokens(1)
    for image in plain.refinement.adapters['1'](tokens.patches):
        norms = image.norm(dim=-1)
        threshold = norms.quantile(0.95)
        excess.append(((norms - threshold).clamp(min=0)**2).sum())
        above.append((norms > threshold).sum())
    expected = 0.01 * (weight * torch.stack(excess)).sum() / (
        weight * torch.stack(above)).sum()
    torch.testing.assert_close(
        plain.refinement.refine(
            1, tokens.weighed_by_image(weight)).loss_outlier, expected)
    assert losses_of(model, images)['distill.loss_outlier'] != losses_of(
        plain, images)['distill.loss_outlier']


def test_padding_is_not_uncertain(tmp_path, images):
    """The entropy of an image is that of its own patches."""
    model = distiller(checkpoint(tmp_path / 'teacher.pth'),
                      weigh(tokens='patches'))
    step, = model.steps
    sizes = [(32, 32)] * 5 + [(16, 24)]
    outputs = model.run_teacher(images, [
        BaseDataElement(metainfo=dict(
            img_shape=size, batch_input_shape=(32, 32))) for size in sizes])
    assert outputs.padding is not None
    with torch.no_grad():
        logits = step.readout(outputs.taps.tokens(step.last).patches)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    grid = outputs.taps.tokens(step.last).grid
    own = entropy[5].view(grid)[:grid[0] // 2, :3 * grid[1] // 4]
    expected = torch.stack([*entropy[:5].mean(dim=1), own.mean()])
    torch.testing.assert_close(step.image_weights(outputs),
                               1 - expected / math.log(3))


def test_nothing_of_the_head_is_trained_and_all_of_it_is_saved(tmp_path):
    model = distiller(checkpoint(tmp_path / 'teacher.pth'), weigh())
    assert not any(p.requires_grad for p in model.readout.parameters())
    assert 'readout.linear.weight' in model.state_dict()


@pytest.mark.parametrize('settings, message', [
    (dict(head='head.fcc'), "no head.fcc.weight in .*Did you mean 'head.fc'"),
    (dict(norm='backbone.norm'), 'no backbone.norm.weight in .*backbone.ln1'),
    (dict(num_classes=7), r'shape \(3, .*expected \(7, .*num_classes'),
    (dict(num_classes=1), 'num_classes=1'),
    (dict(strength=0), 'strength=0'),
    (dict(tokens='cl'), "tokens='cl'.*Did you mean 'cls'"),
])
def test_mistakes(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        distiller(checkpoint(tmp_path / 'teacher.pth'), weigh(**settings))


def test_a_teacher_without_weights_has_no_head():
    with pytest.raises(ConfigError, match='no checkpoint to take its head'):
        distiller(None, weigh())


@pytest.mark.parametrize('classes', [2, 7, 19, 1000, 21841])
def test_no_weight_is_negative(classes):
    """By rounding, that of a uniform prediction is below 0."""
    step = WeighByEntropy('head', classes)
    step.last = 0
    step.readout = lambda tokens: torch.zeros(*tokens.shape[:2], classes)
    outputs = SimpleNamespace(padding=None, taps=SimpleNamespace(
        tokens=lambda layer: Tokens(torch.zeros(1, 5, 8), (2, 2))))
    assert 0 <= step.image_weights(outputs) < 1e-6
