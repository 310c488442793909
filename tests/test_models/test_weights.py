"""Tokens carry weights: what has weight 0 changes nothing, anywhere.

Each formula is compared with the same one on tensors that hold the tokens
that count alone; what stands in the others is then replaced by huge values.
"""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randn, vit
from torch.autograd import gradcheck

from mmsinger.engine.diagnostics import inlier_variance_ratio, inlier_variances
from mmsinger.metrics import (outlier_threshold, robust_outliers,
                              robust_threshold)
from mmsinger.models import (ClipNorms, FeatureCosineLoss, FeatureMSELoss,
                             FeatureSmoothL1Loss, FitNetDistiller,
                             GramInformationLoss, MaskTokens,
                             OutlierSuppressionLoss, SiNGERDistiller,
                             ViTKDDistiller)
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.distillers.vitkd import random_mask
from mmsinger.models.features.tokens import (Tokens, align_tokens,
                                             resample_patches)
from mmsinger.models.losses.information_loss import (_GramDifference,
                                                     gram_difference)
from mmsinger.models.targets import TeacherOutputs

BATCH, COUNT, KEPT, DIM = 3, 20, 12, 6
WILD = 1e6


def counting(seed=0, batch=BATCH, count=COUNT, kept=KEPT):
    """Which tokens count: as many in every image, in other places."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, count, generator=generator).argsort(dim=1)
    return order < kept


def cut(values, keep):
    """The tokens that count, (B, KEPT, …)."""
    return values[keep].unflatten(0, (len(keep), -1))


def wild(values, keep, seed=9):
    """Other values where tokens do not count."""
    noise = WILD * randn(*values.shape, seed=seed)
    return torch.where(keep.unsqueeze(-1), values, noise.to(values.dtype))


def with_gradient(function, *tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*tensors)
    value.backward()
    return value.detach(), [t.grad for t in tensors]


def check_ignored(loss, *tensors, keep, rtol=1e-5):
    """loss(*tensors, weight) is loss(*cut tensors), its gradient too, and the
    rest may be anything."""
    weight = keep.float()
    value, gradients = with_gradient(lambda *t: loss(*t, weight), *tensors)
    assert value.dtype == torch.float32 and value.shape == () and value > 0
    expected, cut_gradients = with_gradient(
        lambda *t: loss(*t, None), *(cut(t, keep) for t in tensors))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-8)
    for ours, theirs in zip(gradients, cut_gradients):
        assert not ours[~keep].any()
        torch.testing.assert_close(cut(ours, keep), theirs, rtol=1e-4,
                                   atol=1e-5 * theirs.abs().max().item())
    changed, changed_gradients = with_gradient(
        lambda *t: loss(*t, weight),
        *(wild(t, keep, seed) for seed, t in enumerate(tensors, 20)))
    assert torch.equal(changed, value)
    for ours, before in zip(changed_gradients, gradients):
        assert not ours[~keep].any()
        assert torch.equal(ours, before)
    assert loss(*tensors, torch.zeros_like(weight)) == 0


# -- losses -------------------------------------------------------------------


@pytest.mark.parametrize('loss', [
    FeatureMSELoss(), FeatureSmoothL1Loss(0.5), FeatureCosineLoss(),
    FeatureMSELoss(3.)], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize('seed', range(3))
def test_feature_losses(loss, seed):
    check_ignored(lambda pred, target, w: loss(pred, target, weight=w),
                  randn(BATCH, COUNT, DIM, seed=seed),
                  randn(BATCH, COUNT, DIM, seed=seed + 1),
                  keep=counting(seed))


@pytest.mark.parametrize('quantile', [0.5, 0.87])
def test_outlier_loss(quantile):
    """Padding is in no quantile and above none."""
    check_ignored(OutlierSuppressionLoss(quantile, 1.),
                  randn(BATCH, COUNT, DIM), keep=counting())


@pytest.mark.parametrize('kwargs', [
    dict(), dict(is_last=False)], ids=['last', 'intermediate'])
@pytest.mark.parametrize('intermediate', ['gram', 'mse'])
def test_information_loss(intermediate, kwargs):
    loss = GramInformationLoss(intermediate)
    check_ignored(lambda pred, target, w: loss(pred, target, weight=w,
                                               **kwargs),
                  randn(BATCH, COUNT, DIM), randn(BATCH, COUNT, DIM, seed=1),
                  keep=counting())


def test_information_loss_leaves_prefix_tokens_out_of_the_gram_matrix():
    pred, target = randn(BATCH, COUNT, DIM), randn(BATCH, COUNT, DIM, seed=1)
    keep = counting(count=COUNT - 2)
    weight = torch.cat([torch.ones(BATCH, 2), keep.float()], dim=1)
    loss = GramInformationLoss()
    torch.testing.assert_close(
        loss(pred, target, num_prefix=2, weight=weight),
        loss(cut(pred[:, 2:], keep), cut(target[:, 2:], keep)))


@settings(max_examples=30)
@given(st.integers(0, 2**16))
def test_fractional_weights(seed):
    """A weight of 2 is the token twice."""
    pred, target = randn(2, 7, DIM, seed=seed), randn(2, 7, DIM, seed=seed + 1)
    times = torch.randint(0, 4, (7, ), generator=torch.Generator(
        ).manual_seed(seed))
    if not times.any():
        return
    repeated = [t.repeat_interleave(times, dim=1) for t in (pred, target)]
    weight = 0.5 * times.float().expand(2, 7)  # a common factor is none
    for loss in (FeatureMSELoss(), FeatureSmoothL1Loss(),
                 FeatureCosineLoss()):
        torch.testing.assert_close(loss(pred, target, weight),
                                   loss(*repeated), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gram_difference(pred, target, weight),
                               gram_difference(*repeated), rtol=1e-4,
                               atol=1e-7)


def weighted_gram_by_hand(pred, target, weight):
    """Pair by pair."""
    total = pairs = 0.
    for a, b, w in zip(pred.double(), target.double(), weight.double()):
        for i in range(len(w)):
            for j in range(len(w)):
                cosines = [torch.dot(t[i], t[j]) / t[i].norm() / t[j].norm()
                           for t in (a, b)]
                total = total + w[i] * w[j] * (cosines[0] - cosines[1])**2
                pairs = pairs + w[i] * w[j]
    return total / pairs


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**16))
def test_weighted_gram_by_hand(batch, count, seed):
    pred, target = (randn(batch, count, DIM, seed=seed + i) for i in (0, 1))
    weight = torch.rand(batch, count, generator=torch.Generator(
        ).manual_seed(seed)) + 0.01
    value, gradients = with_gradient(
        lambda *t: gram_difference(*t, weight), pred, target)
    expected, by_hand = with_gradient(
        lambda *t: weighted_gram_by_hand(*t, weight), pred.double(),
        target.double())
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
    for ours, theirs in zip(gradients, by_hand):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-3,
            atol=1e-5 * max(1., theirs.abs().max().item()))


@pytest.mark.parametrize('count', [5, 150])  # at once, and in parts
def test_gradient_of_the_gram_difference(count):
    """In float64 against finite differences."""
    pred, target = (0.3 * randn(2, count, 3, seed=i).double()
                    .requires_grad_() for i in (0, 1))
    scale = torch.tensor(0.01, dtype=torch.float64)
    assert gradcheck(
        lambda x, y: _GramDifference.apply(x, y, scale, True, True),
        (pred, target), fast_mode=count > 5)


def test_all_weights_alike_are_none():
    pred, target = randn(2, 100, DIM), randn(2, 100, DIM, seed=1)
    weight = torch.full((2, 100), 0.3)
    for loss in (FeatureMSELoss(), GramInformationLoss()):
        torch.testing.assert_close(loss(pred, target, weight=weight),
                                   loss(pred, target))
    loss = OutlierSuppressionLoss(0.9)
    torch.testing.assert_close(loss(pred, weight), loss(pred))


# -- thresholds ---------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.floats(0.05, 0.95), st.floats(0.5, 8.))
def test_thresholds(seed, quantile, mad):
    norms, keep = randn(BATCH, COUNT, seed=seed).abs(), counting(seed)
    weight = keep.float()
    spoilt = torch.where(keep, norms, WILD * norms)
    for values in (norms, spoilt):
        threshold = outlier_threshold(values, quantile, weight)
        torch.testing.assert_close(
            threshold, outlier_threshold(cut(norms, keep), quantile))
        ours = robust_threshold(values, mad, weight)
        theirs = robust_threshold(cut(norms, keep), mad)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)
        outliers = robust_outliers(values, mad, weight)
        assert not outliers[~keep].any()
        assert torch.equal(cut(outliers, keep),
                           robust_outliers(cut(norms, keep), mad))


def test_thresholds_of_images_of_other_sizes():
    """Against numpy, image by image; without a token that counts there is no
    limit."""
    norms = randn(4, COUNT).abs()
    weight = torch.zeros(4, COUNT)
    for image, kept in enumerate((20, 7, 1, 0)):
        weight[image, :kept] = 1
    found = outlier_threshold(norms, 0.9, weight)[:, 0]
    for image, kept in enumerate((20, 7, 1)):
        assert found[image].item() == pytest.approx(
            np.quantile(norms[image, :kept].numpy(), 0.9), rel=1e-5)
    assert found[3] == float('inf')
    median, threshold = robust_threshold(norms, 6., weight=weight)
    counts = norms[weight > 0].numpy()
    assert median.item() == pytest.approx(
        np.sort(counts)[(len(counts) - 1) // 2])
    assert threshold > median
    nothing = robust_threshold(norms, 6., weight=torch.zeros(4, COUNT))
    assert all(value == float('inf') for value in nothing)


def test_inlier_variance():
    original, refined = randn(BATCH, COUNT, DIM), randn(BATCH, COUNT, DIM,
                                                        seed=1)
    keep = counting()
    ratio = inlier_variance_ratio(original, refined, 0.87, keep.float())
    torch.testing.assert_close(ratio, inlier_variance_ratio(
        cut(original, keep), cut(refined, keep), 0.87))
    assert torch.equal(ratio, inlier_variance_ratio(
        wild(original, keep), wild(refined, keep, 3), 0.87, keep.float()))


# -- steps --------------------------------------------------------------------


def weighted_tokens(seed=0, dim=32, count=16, kept=12):
    """Tokens with a CLS token, the tokens that count alone, and which patches
    these are. One of them, the first, is long."""
    values = randn(BATCH, 1 + count, dim, seed=seed)
    values[:, 1] *= 9
    keep = torch.cat([torch.ones(BATCH, 1, dtype=torch.bool),
                      counting(seed, BATCH, count - 1, kept - 1)], dim=1)
    tokens = Tokens(values, (4, count // 4)).weighed(keep)
    alone = Tokens(torch.cat([values[:, :1], cut(values[:, 1:], keep)], 1),
                   (4, kept // 4))
    return tokens, alone, keep


def spoilt(tokens, keep):
    return tokens.with_patches(wild(tokens.patches, keep))


@pytest.mark.parametrize('step', [
    ClipNorms(quantile=0.9), ClipNorms(mad=3.), MaskTokens(mad=3.)], ids=str)
@pytest.mark.parametrize('kept', [12, 8])
def test_filters(step, kept):
    tokens, alone, keep = weighted_tokens(kept=kept)
    expected = step.filter(alone)
    for given_tokens in (tokens, spoilt(tokens, keep)):
        found = step.filter(given_tokens)
        assert torch.equal(found.prefix, tokens.prefix)
        torch.testing.assert_close(cut(found.patches, keep),
                                   expected.patches)
        assert not found.patch_weight[~keep].any()
        assert (found.weight[:, 0] == 1).all()
        if expected.weight is None:
            assert torch.equal(found.weight, tokens.weight)
        else:
            assert torch.equal(cut(found.patch_weight, keep),
                               expected.patch_weight)
            assert 0 < (expected.weight == 0).sum() < 10


def distiller(cls=SiNGERDistiller, **kwargs):
    torch.manual_seed(0)
    if cls is not ViTKDDistiller:
        kwargs['layers'] = (1, 3)
    model = cls(student=vit(), teacher=dict(backbone=vit()),
                task_loss_weight=0, **kwargs)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if model.refinement:
        model.refinement.init_weights(model.teacher)
        for adapter in model.adapters.values():
            torch.nn.init.normal_(adapter.down, std=0.3)
    model.eval()
    return model


@pytest.mark.parametrize('kwargs', [
    {}, dict(gate=dict(mad=3.)), dict(gate=dict(mad=3.), cap=True)], ids=str)
def test_refinement(kwargs):
    """The gate's threshold and the cap's norm are those of what counts."""
    refinement = distiller(**kwargs).refinement
    tokens, alone, keep = weighted_tokens()
    refinement.calibrate({1: alone.patches, 3: alone.patches})
    refined, target, excess = refinement.refine(3, alone)
    assert excess > 0
    for given_tokens in (tokens, spoilt(tokens, keep)):
        found = refinement.refine(3, given_tokens)
        for ours, theirs in ((found.tokens, refined), (found.target, target)):
            torch.testing.assert_close(cut(ours.patches, keep),
                                       theirs.patches, rtol=1e-5, atol=1e-5)
            assert ours.weight is tokens.weight
        torch.testing.assert_close(found.loss_outlier, excess)


def test_last_information_loss_of_a_refinement():
    refinement = distiller().refinement
    tokens, alone, keep = weighted_tokens()

    def info(tokens):
        _, losses = refinement({3: tokens}, TeacherOutputs(None, None))
        return losses['loss_info']

    torch.testing.assert_close(info(tokens), info(alone))
    torch.testing.assert_close(info(spoilt(tokens, keep)), info(alone))


# -- in a distiller -----------------------------------------------------------


def test_records_keep_weights():
    """What watches for a collapse leaves masked tokens out."""
    targets = [dict(type='mmsinger.MaskTokens', mad=1.),
               dict(type='mmsinger.Refine', adapter=dict(rank=4))]
    model = distiller(FitNetDistiller, targets=targets)
    record = StepRecord()
    model.records.append(record)
    model.loss(randn(2, 3, 32, 32), None)
    values = record.layers[3]
    weight = values['refined'].patch_weight
    assert 0 < weight.sum() < weight.numel()
    assert not values['kd_gradient'].patches[weight == 0].any()
    ratio = inlier_variances(record, 0.95)[3]
    values['refined'] = spoilt(values['refined'], weight > 0)
    assert torch.equal(inlier_variances(record, 0.95)[3], ratio)


@pytest.mark.parametrize('grid', [(4, 4), (2, 3), (6, 5)])
@pytest.mark.parametrize('prefix', [0, 1, 2])
def test_kd_loss_of_a_padded_student(grid, prefix):
    """Also where its tokens are resampled: padding leaks into no
    neighbour."""
    model = distiller(FitNetDistiller)
    count = grid[0] * grid[1]
    target = Tokens(randn(2, 17, 32, seed=1), (4, 4))
    keep = torch.ones(2, count, dtype=torch.bool)
    keep[1].view(grid)[:, -1] = False
    student = Tokens(randn(2, prefix + count, 32), grid).weighed(keep)
    loss = model.kd_loss(3, student, target)
    assert loss > 0
    assert torch.equal(model.kd_loss(3, spoilt(student, keep), target), loss)
    # and that of a student without padding is the plain one
    whole = student._replace(weight=torch.ones_like(student.weight))
    torch.testing.assert_close(
        model.kd_loss(3, whole, target),
        model.kd_loss(3, student._replace(weight=None), target))


def test_weights_of_both_meet():
    student = Tokens(randn(1, 17, 4), (4, 4))
    teacher = Tokens(randn(1, 19, 6), (4, 4))
    first, second = (torch.rand(1, 16) > 0.5 for _ in range(2))
    _, target = align_tokens(student.weighed(first), teacher.weighed(second))
    assert torch.equal(target.patch_weight, (first & second).float())
    assert (target.weight[:, 0] == 1).all()


def test_resampled_tokens_are_means_by_weight():
    tokens = Tokens(randn(2, 16, 5), (4, 4), torch.rand(2, 16))
    teacher = Tokens(randn(2, 4, 5), (2, 2))
    student, target = align_tokens(tokens, teacher)
    weight = tokens.weight.unsqueeze(-1)
    expected = resample_patches(weight, (4, 4), (2, 2))
    torch.testing.assert_close(target.weight, expected.squeeze(-1))
    torch.testing.assert_close(
        student.values * expected,
        resample_patches(weight * tokens.values, (4, 4), (2, 2)))


@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_vitkd(reduction):
    """Mimicking is that of what counts alone; padding of the student is no
    context for what is generated either."""
    model = distiller(ViTKDDistiller, reduction=reduction, mimic_weight=1.,
                      generate_weight=1.)
    tokens, alone, keep = weighted_tokens()
    students, _, _ = weighted_tokens(seed=1)
    students = Tokens(students.values, (4, 4)).weighed(keep)

    def losses(target, student):
        torch.manual_seed(3)
        return model.distill(
            {layer: target for layer in model.layers},
            {layer: student for layer in model.layers})

    found = losses(tokens, students)
    changed = losses(spoilt(tokens, keep), spoilt(students, keep))
    assert found.keys() == {'loss_mimic', 'loss_generate'}
    for name, value in found.items():
        assert value > 0
        assert torch.equal(changed[name], value), name
    student_alone = Tokens(torch.cat([
        students.values[:, :1], cut(students.patches, keep)], 1), (4, 3))
    torch.testing.assert_close(
        found['loss_mimic'], losses(alone, student_alone)['loss_mimic'])
    # of what is generated, what is hidden and counts
    torch.manual_seed(3)
    hidden = random_mask(tokens.patches, model.mask_ratio) & keep
    for where in (hidden, keep & ~hidden):
        other = tokens.with_patches(tokens.patches + where.unsqueeze(-1))
        assert torch.equal(losses(other, students)['loss_generate'],
                           found['loss_generate']) == (where is not hidden)


@pytest.mark.parametrize('cls', [FitNetDistiller, ViTKDDistiller])
@pytest.mark.parametrize('loss', ['MSE', 'SmoothL1', 'Cosine'])
def test_a_whole_step(cls, loss):
    """A step of its own in front says what counts; its wild values reach
    neither losses nor gradients."""
    kwargs = {} if cls is ViTKDDistiller else dict(
        loss_kd=dict(type=f'mmsinger.Feature{loss}Loss'))
    model = distiller(cls, targets=[
        dict(type='mmsinger.MaskTokens', mad=8.),
        dict(type='mmsinger.ClipNorms', quantile=0.9)], **kwargs)
    keep = counting(batch=2, count=16, kept=9)
    outcomes = []
    for noisy in (False, True):
        twin = copy.deepcopy(model)
        made = twin.steps[0].filter

        def padded(tokens):
            tokens = spoilt(tokens, keep) if noisy else tokens
            return made(tokens.weighed(keep))

        twin.steps[0].filter = padded
        torch.manual_seed(2)
        losses = twin.loss(randn(2, 3, 32, 32), None)
        sum(losses.values()).backward()
        outcomes.append((losses, {
            key: p.grad for key, p in twin.named_parameters()
            if p.grad is not None}))
    for ours, theirs in zip(*outcomes):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
