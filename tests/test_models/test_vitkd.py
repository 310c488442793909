"""ViTKD: losses against the formulas, masks, layers, bad input."""
import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mmsinger.errors import ConfigError
from mmsinger.models import ViTKDDistiller
from mmsinger.models.distillers.vitkd import random_mask
from mmsinger.models.features.tokens import Tokens
from tiny import vit

DEEP = vit(arch=dict(embed_dims=32, num_layers=8, num_heads=4,
                     feedforward_channels=64))
CLIP = [dict(type='mmsinger.ClipNorms', quantile=0.9)]
MASK = [dict(type='mmsinger.MaskTokens', mad=2.)]
REFINE = [dict(type='mmsinger.Refine', adapter=dict(rank=4))]
NARROW = vit(arch=dict(embed_dims=16, num_layers=4, num_heads=2,
                       feedforward_channels=32))


def distiller(teacher=DEEP, **kwargs):
    torch.manual_seed(0)
    model = ViTKDDistiller(
        student=copy.deepcopy(NARROW), teacher=dict(backbone=teacher),
        task_loss_weight=0, **kwargs)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
        torch.nn.init.normal_(model.mask_token)
    return model.train()


def images(count=2, size=32):
    return torch.randn(count, 3, size, size,
                       generator=torch.Generator().manual_seed(1))


def losses_by_hand(model, x, mask):
    """The formulas, image by image."""
    taps = model.run_teacher(x)
    _, students = model.run_student(x, None)
    total = model.reduction == 'sum'
    mimic = 0.
    for layer in model.mimic_layers:
        pred = model.projectors[str(layer)](students[layer].patches)
        errors = (pred - taps.tokens(layer).patches)**2
        mimic += errors.sum() / len(x) if total else errors.mean()
    layer = model.generate_layer
    target = taps.tokens(layer).patches
    grid = taps.tokens(layer).grid
    errors = []
    for image in range(len(x)):
        tokens = model.projectors[str(layer)](students[layer].patches[image])
        rows = [model.mask_token if hidden else token
                for token, hidden in zip(tokens, mask[image])]
        picture = torch.stack(rows).T.reshape(1, -1, *grid)
        made = model.generator(picture)[0].flatten(1).T
        errors.append((made - target[image])[mask[image]]**2)
    errors = torch.cat(errors)
    generate = errors.sum() / len(x) / model.mask_ratio if total \
        else errors.mean()
    return model.mimic_weight * mimic, model.generate_weight * generate


@pytest.mark.parametrize('kwargs', [
    dict(), dict(mask_ratio=0.25), dict(mimic_layers=(0, 2, 3)),
    dict(reduction='mean', mimic_layers=(0, 2), layer_map='official',
         mimic_weight=1., generate_weight=1.)], ids=str)
def test_losses_by_hand(kwargs):
    model = distiller(**kwargs)
    x = images()
    torch.manual_seed(5)
    losses = model.loss(x, None)
    torch.manual_seed(5)
    mask = random_mask(torch.empty(2, 16, 32), model.mask_ratio)
    mimic, generate = losses_by_hand(model, x, mask)
    assert list(losses) == ['distill.loss_mimic', 'distill.loss_generate']
    assert torch.allclose(losses['distill.loss_mimic'], mimic, rtol=1e-4)
    assert torch.allclose(losses['distill.loss_generate'], generate,
                          rtol=1e-4)
    assert mimic > 0 and generate > 0


def test_defaults_are_the_originals():
    model = distiller()
    assert (model.mimic_weight, model.generate_weight) == (3e-5, 3e-6)
    assert (model.mask_ratio, model.reduction) == (0.5, 'sum')
    assert model.layers == [0, 1, 7]
    assert model.student_layers == [0, 1, 3]


@pytest.mark.parametrize('kwargs, layers, student_layers', [
    (dict(layer_map='relative'), [0, 1, 7], [0, 0, 3]),
    (dict(mimic_layers=(0, 2), layer_map='official'), [0, 2, 7], [0, 1, 3]),
    (dict(mimic_layers=('layers.1', ), generate_layer='layers.5'), [1, 5],
     [1, 2]),
    (dict(student_layers=(1, 2, -1)), [0, 1, 7], [1, 2, 3]),
    (dict(mimic_layers=()), [7], [3])])
def test_layers(kwargs, layers, student_layers):
    model = distiller(**kwargs)
    assert model.layers == layers
    assert model.student_layers == student_layers
    losses = model.loss(images(), None)
    assert ('distill.loss_mimic' in losses) == (len(layers) > 1)


@pytest.mark.parametrize('ratio, hidden', [(0.5, 8), (0.25, 4), (1.0, 16),
                                           (0.3, 5)])
def test_mask_takes_its_share_of_each_image(ratio, hidden):
    mask = random_mask(torch.empty(50, 16, 4), ratio)
    assert mask.dtype == torch.bool and mask.shape == (50, 16)
    assert (mask.sum(dim=1) == hidden).all()
    if ratio < 1:
        assert len({tuple(row.tolist()) for row in mask}) > 25
        assert mask.any(dim=0).all()  # every place at some time


def test_masks_follow_the_runs_seed():
    model = distiller()
    torch.manual_seed(3)
    first, second = (model.loss(images(), None) for _ in range(2))
    torch.manual_seed(3)
    again = model.loss(images(), None)
    key = 'distill.loss_generate'
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], second[key])
    assert torch.equal(first['distill.loss_mimic'],
                       second['distill.loss_mimic'])


def test_visible_tokens_are_not_asked_for():
    """Targets outside of the mask do not matter."""
    model = distiller()
    taps = model.run_teacher(images())
    _, students = model.run_student(images(), None)
    target = taps.tokens(7)
    torch.manual_seed(4)
    mask = random_mask(target.patches, 0.5)

    def loss(patches):
        torch.manual_seed(4)
        return model._generate(7, students[7], target.with_patches(patches))

    plain = loss(target.patches)
    assert torch.equal(
        loss(target.patches + 9. * ~mask.unsqueeze(-1)), plain)
    assert loss(target.patches + 9. * mask.unsqueeze(-1)) > 2 * plain


@pytest.mark.parametrize('kwargs', [
    dict(), dict(teacher=vit(patch_size=14, img_size=56)),
    dict(teacher=vit(with_cls_token=False, out_type='avg_featmap')),
    dict(targets=CLIP), dict(targets=MASK), dict(targets=CLIP + REFINE),
    dict(target_norm='layernorm'), dict(target_norm='standardise')], ids=str)
@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_everything_trains(kwargs, reduction):
    """Also where grids and prefixes differ, with a KD target changed."""
    model = distiller(reduction=reduction, **kwargs)
    if model.refinement:
        model.refinement.init_weights(model.teacher)
    if model.needs_calibration:
        model.calibrate([images()])
    x = torch.randn(2, 3, 32, 48)
    losses = model.loss(x, None)
    assert all(torch.isfinite(v) and v > 0 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all()
               for p in model.parameters() if p.requires_grad)
    for name in ('projectors', 'generator', 'mask_token', 'student'):
        assert any(p.grad.any() for key, p in model.named_parameters()
                   if key.startswith(name) and p.requires_grad), name


def test_masked_targets_do_not_count():
    """Of an artifact, whatever its value, nothing reaches the loss."""
    for reduction in ('sum', 'mean'):
        model = distiller(reduction=reduction, targets=[
            dict(type='mmsinger.MaskTokens', mad=6.)])
        outputs = model.run_teacher(images())
        _, students = model.run_student(images(), None)
        outcomes = []
        for size in (1e3, 1e4):
            targets = {}
            for layer in model.layers:
                tokens = outputs.tokens(layer)
                patches = tokens.patches.clone()
                patches[:, 5] += size
                targets[layer] = tokens.with_patches(patches)
            targets, _ = model.steps[0](targets, outputs)
            torch.manual_seed(0)
            outcomes.append(model.distill(targets, students))
        for name, value in outcomes[0].items():
            assert value > 0
            assert torch.equal(value, outcomes[1][name]), name


def test_autocast():
    model = distiller(reduction='mean', mimic_weight=1., generate_weight=1.)
    torch.manual_seed(0)
    exact = model.loss(images(), None)
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(images(), None)
    for key, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[key].item(), rel=0.1)


def test_nothing_depends_on_data():
    model = distiller(targets=MASK)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = Tokens(torch.empty(2, 17, 16), (4, 4))
        target = Tokens(torch.empty(2, 17, 32), (4, 4))
        assert model._mimic(1, student, target).shape == ()
        assert model._generate(7, student, target).shape == ()


@pytest.mark.parametrize('kwargs, words', [
    (dict(layers=(1, 3)), ['model.layers', 'mimic_layers']),
    (dict(loss_kd=dict()), ['model.loss_kd', 'reduction']),
    (dict(reduction='summ'), ["reduction='summ'", "Did you mean 'sum'"]),
    (dict(mask_ratio=0), ['mask_ratio=0']),
    (dict(mask_ratio=1.5), ['mask_ratio=1.5']),
    (dict(mimic_layers=0), ['model.mimic_layers=0', 'a list']),
    (dict(mimic_layers=(0, 9)), ['=9 is out of range']),
    (dict(mimic_layers=(0, 7)), ['ascending order']),
    (dict(mimic_layers=(0, 5)), ['student_layers=5 is out of range']),
    (dict(layer_map='sam'), ["layer_map='sam'", "Did you mean 'same'"]),
    (dict(mimic_layer=(0, )), ['model.mimic_layer', "'mimic_layers'"]),
])
def test_bad_input(kwargs, words):
    with pytest.raises(ConfigError) as error:
        distiller(**kwargs)
    for word in words:
        assert word in str(error.value), str(error.value)
