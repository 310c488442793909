"""Outliers without their subspace, and adapters that L_KD does not move."""
import copy

import pytest
import torch
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.metrics import robust_threshold
from mmsinger.models import FitNetDistiller, OutlierSuppressionLoss
from mmsinger.models.targets.outlier_subspace import (OutlierSubspace,
                                                      _are_those)
from test_models.test_targets import batch, build
from tiny import vit

D = 24


def features(count=4000, share=0., dims=3, norm=40., seed=0):
    """Tokens (n, D), which of them are artifacts, and the artifacts'
    orthonormal directions (dims, D)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, D, generator=generator) + 0.3
    basis = torch.linalg.qr(torch.randn(D, dims, generator=generator)).Q.T
    far = torch.rand(count, generator=generator) < share
    mixture = nn.functional.normalize(
        torch.randn(count, dims, generator=generator), dim=-1)
    return tokens + far.unsqueeze(-1) * norm * (mixture @ basis), far, basis


def calibrated(tokens, mad=6., ratio=4., rank=8):
    part = OutlierSubspace(D, rank)
    norms = tokens.norm(dim=-1)
    part.calibrate(tokens, norms > robust_threshold(norms[None], mad)[1], mad,
                   ratio)
    return part


def test_outliers_that_do_not_show_in_the_norm():
    tokens, far, basis = features(share=0.1)
    known = far & (torch.rand(len(far)) < 0.2)
    hidden = torch.where((far & ~known).unsqueeze(-1),
                         tokens * 0.3, tokens)
    part = OutlierSubspace(D, 8)
    part.calibrate(hidden, known, 6., 4.)
    assert part.rank == 3
    component = part(hidden[None])[0] @ basis.T
    assert component[far].norm(dim=1).mean() < 1.5


def test_hidden_outliers_do_not_move_the_centre():
    """What the known ones lead to is left out of the others' mean too."""
    clean, far, basis = features(share=0.)
    far = torch.rand(len(clean), generator=torch.Generator().manual_seed(
        2)) < 0.1
    known = far & (torch.arange(len(far)) % 5 == 0)
    part = OutlierSubspace(D, 8)
    part.calibrate(clean + far.unsqueeze(-1) * 40. * basis[0], known, 6., 4.)
    assert (part.centre - clean[~far].mean(dim=0)).norm() < 0.05


def test_directions_are_those_in_which_outliers_exceed_the_others():
    """Not those in which they are longest."""
    tokens, _, _ = features(share=0.)
    tokens[:, 0] *= 10
    far = torch.arange(len(tokens)) % 10 < 2
    tokens[::10, 0] += 100.
    tokens[1::10, 1] += 40.
    part = OutlierSubspace(D, 1)
    part.calibrate(tokens, far, 6., 4.)
    assert part.rank == 1 and part.basis[0, 1].abs() > 0.9


@pytest.mark.parametrize('far, wrong, both, expected', [
    (10, 20, 6, True), (10, 20, 5, False),  # more than half of what stands out
    (10, 100, 10, True), (9, 100, 9, False),  # a tenth of the targets' own
    (0, 0, 0, False), (0, 20, 0, False), (10, 0, 0, False)])
def test_which_block_outliers_arise_in(far, wrong, both, expected):
    place = torch.arange(200)
    assert _are_those(place < far, (place >= far - both)
                      & (place < far - both + wrong)) is expected


def test_a_clean_teacher_keeps_its_tokens_to_the_bit():
    tokens, _, _ = features()
    part = calibrated(tokens)
    assert part.rank == 0
    assert torch.equal(part(tokens[None])[0], tokens)


@pytest.mark.parametrize('share', [0.01, 0.1, 0.3, 0.45])
@pytest.mark.parametrize('dims', [1, 3, 8])
def test_known_subspaces_are_found(share, dims):
    tokens, far, basis = features(share=share, dims=dims)
    part = calibrated(tokens)
    assert part.rank == dims
    found = part.basis[:dims]
    assert torch.allclose(found @ found.T, torch.eye(dims), atol=1e-5)
    # the same subspace: nothing of the one is outside the other
    assert (basis - basis @ found.T @ found).norm() < 0.15
    cleaned = part(tokens[None])[0]
    assert torch.equal(cleaned[~far], tokens[~far])
    # what is left of an artifact is what was there before, in all other
    # directions
    original, _, _ = features(share=0., dims=dims)
    rest = torch.eye(D) - basis.T @ basis
    assert ((cleaned[far] - original[far]) @ rest).norm(dim=1).mean() < 3
    assert cleaned[far].norm(dim=1).mean() < 1.5 * tokens[~far].norm(
        dim=1).mean()


def test_no_more_directions_than_rank():
    tokens, _, _ = features(share=0.2, dims=8)
    assert calibrated(tokens, rank=5).rank == 5


def test_tokens_of_other_batches_and_dtypes():
    tokens, _, _ = features(share=0.1)
    part = calibrated(tokens)
    whole = part(tokens.unflatten(0, (40, 100)))
    assert torch.equal(whole[3:5], part(tokens.unflatten(0, (40, 100))[3:5]))
    half = part(tokens[None].bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), part(tokens[None]), atol=0.5)


def removing(**kwargs):
    return dict(type='mmsinger.RemoveOutlierSubspace', **kwargs)


FITNET = dict(type='mmsinger.FitNetDistiller')


@pytest.mark.parametrize('norm', [None, 'standardise'])
def test_it_is_calibrated_saved_and_loaded(norm):
    model = build(FITNET, [removing(mad=0.5)], target_norm=norm)
    step, = model.steps
    assert not model.needs_calibration
    assert all(part.rank for part in step.subspaces.values())
    state = model.state_dict()
    assert 'subspaces.1.basis' in state and 'subspaces.3.threshold' in state
    other = build(FITNET, [removing(mad=3.)], target_norm=norm)
    other.load_state_dict(state)
    assert other.loss(**batch())['distill.loss_kd'] == \
        model.loss(**batch())['distill.loss_kd']
    # a checkpoint from before its calibration
    state['subspaces.1.threshold'] = torch.tensor(float('nan'))
    other.load_state_dict(state)
    assert other.needs_calibration


def test_without_outliers_it_is_plain_distillation():
    plain = build(FITNET, [])
    removed = build(FITNET, [removing(mad=100.)])
    for ours, theirs in ((removed, plain), ):
        ours, theirs = ours.loss(**batch()), theirs.loss(**batch())
        assert torch.equal(ours['distill.loss_kd'],
                           theirs['distill.loss_kd'])


def test_uncalibrated_use_is_an_error():
    model = build(FITNET, [removing()])
    step, = model.steps
    for part in step.subspaces.values():
        part.threshold.fill_(float('nan'))
    with pytest.raises(RuntimeError, match='calibrate'):
        model.loss(**batch())


# -- inside the teacher -------------------------------------------------------


def planted(share=0.2, targets=(), layers=(1, 3), **kwargs):
    """A distiller whose teacher plants artifacts after its first block."""
    torch.manual_seed(0)
    model = FitNetDistiller(
        student=vit(), task_loss_weight=0, layers=layers, targets=targets,
        teacher=dict(backbone=dict(
            type='mmsinger.PlantedArtifacts', backbone=vit(), after=0,
            share=share, norm=(20., 30.), dims=3), **kwargs))
    model.init_weights()
    if model.needs_calibration:
        model.calibrate(images(64, seed=1).split(16))
    return model.train()


def images(count=16, seed=2):
    return torch.randn(count, 3, 32, 32,
                       generator=torch.Generator().manual_seed(seed))


def patches(model, layer, count=16):
    outputs = model.run_teacher(images(count))
    return outputs.tokens(layer).patches


def uncalibrate(model):
    for part in model.steps[0].subspaces.values():
        part.load_state_dict(OutlierSubspace(*part.basis.T.shape).state_dict())


def inside():
    return [removing(inside=True)]


@pytest.mark.parametrize('layers', [(1, 3), (3, )])
def test_later_blocks_do_not_read_outliers(layers):
    """They are removed where they arise, so that all targets, and what the
    class token gathers, are nearly those of the clean teacher."""
    clean, raw, cured = (planted(**kwargs, layers=layers) for kwargs in (
        dict(share=0.), {}, dict(targets=inside())))
    found = {name: part.rank
             for name, part in cured.steps[0].subspaces.items()}
    assert found == {'0': 3, '1': 0, '2': 0, '3': 0}
    for layer in layers:
        clean_tokens, raw_tokens, cured_tokens = (
            model.run_teacher(images()).tokens(layer).values
            for model in (clean, raw, cured))
        assert (cured_tokens - clean_tokens).norm() < 0.1 * (
            raw_tokens - clean_tokens).norm()
        assert (cured_tokens - clean_tokens)[:, 0].norm() < 0.3 * (
            raw_tokens - clean_tokens)[:, 0].norm()
    targets, losses = cured.make_targets(cured.run_teacher(images()))
    assert torch.equal(targets[3].values, cured_tokens) and not losses


@pytest.mark.parametrize('cache', [0, 1000])
def test_images_of_several_sizes(cache):
    """What is recalled has its own grid, not that of the last pass."""
    model = planted(targets=[*inside(), dict(type='mmsinger.Refine')],
                    feature_cache=cache)
    large, small = images(2), images(2)[..., :16]

    def next_block():
        outputs = model.run_teacher(large)
        return outputs.taps.rerun(2, outputs.tokens(1).values)

    parts = model.steps[0].subspaces
    parts['2'].load_state_dict(parts['0'].state_dict())
    parts['2'].threshold.fill_(1e-3)
    before = next_block()
    model.run_teacher(small)
    assert torch.equal(next_block(), before)


def test_a_teacher_without_outliers_stays_as_it_is():
    clean, cured = planted(share=0.), planted(share=0., targets=inside())
    assert not any(part.rank for part in cured.steps[0].subspaces.values())
    assert torch.equal(*(m.run_teacher(images()).tokens(3).values
                         for m in (clean, cured)))
    assert cured.calibrate([images()]) == []  # once is enough


def test_what_does_not_reach_the_targets_stays():
    """Long tokens that a later block shortens again are the teacher's own
    affair."""
    model = planted(share=0.)
    cured = planted(share=0., targets=inside())
    for distiller in (model, cured):
        first, second = distiller.teacher.blocks.modules[:2]
        long = torch.zeros(1, 17, 32)
        long[:, 5] = 100.
        first.register_forward_hook(lambda _, args, output: output + long)
        second.register_forward_hook(lambda _, args, output: output - long)
    uncalibrate(cured)
    said = cured.calibrate(images(64, seed=1).split(16))
    assert said == ['no outliers to remove from the teacher']
    assert torch.equal(*(m.run_teacher(images()).tokens(3).values
                         for m in (model, cured)))


def test_two_places_where_outliers_arise():
    cured = planted(targets=inside())
    generator = torch.Generator().manual_seed(3)
    direction = 40 * nn.functional.normalize(
        torch.randn(32, generator=generator), dim=0)
    third = cured.teacher.blocks.modules[2]
    first = next(iter(third._forward_hooks))

    def more(_, args, output):
        output = output.clone()
        output[:, 7] += direction
        return output

    third.register_forward_hook(more, prepend=True)
    uncalibrate(cured)
    said, = cured.calibrate(images(64, seed=1).split(16))
    assert said.startswith('outliers removed after teacher block')
    ranks = {k: part.rank for k, part in cured.steps[0].subspaces.items()}
    assert ranks['0'] == 3 and ranks['2'] == 1 and not ranks['3'], said
    assert first in third._forward_hooks


def test_a_large_mean_hides_no_outliers():
    """Norms are taken about the median token."""
    cured = planted(targets=inside())
    mean = 3000 * nn.functional.normalize(torch.randn(
        32, generator=torch.Generator().manual_seed(5)), dim=0)
    cured.teacher.blocks.modules[1].register_forward_pre_hook(
        lambda _, args: (args[0] + mean, *args[1:]))
    uncalibrate(cured)
    cured.calibrate(images(64, seed=1).split(16))
    assert cured.steps[0].subspaces['0'].rank == 3


def test_it_goes_on_from_a_checkpoint():
    cured = planted(targets=inside())
    expected = patches(cured, 3)
    fresh = planted(targets=inside())
    uncalibrate(fresh)
    assert fresh.needs_calibration
    assert not any(part.rank for part in fresh.steps[0].subspaces.values())
    assert not torch.equal(patches(fresh, 3), expected)
    fresh.load_state_dict(cured.state_dict())
    assert not fresh.needs_calibration
    assert torch.equal(patches(fresh, 3), expected)


def test_cached_tokens_are_those_of_the_changed_teacher():
    cured = planted(targets=inside())
    cached = planted(targets=inside(), feature_cache=1000)
    for _ in range(2):
        assert torch.allclose(patches(cached, 3), patches(cured, 3),
                              atol=1e-5)
    assert [part.rank for part in cached.steps[0].subspaces.values()] == \
        [part.rank for part in cured.steps[0].subspaces.values()]
    raw = planted(feature_cache=1000)
    assert not torch.allclose(patches(raw, 3), patches(cured, 3), atol=1.)


@pytest.mark.parametrize('kwargs, word', [
    (dict(mad=0), 'targets.0.mad=0'), (dict(mad=True), 'mad=True'),
    (dict(rank=0), 'rank=0'), (dict(rank=1.5), 'rank=1.5'),
    (dict(inside=1), 'inside=1'), (dict(ratio=0.5), 'ratio=0.5'),
    (dict(ratio='4'), "ratio='4'")])
def test_bad_values(kwargs, word):
    with pytest.raises(ConfigError, match=word):
        build(FITNET, [removing(**kwargs)])


# -- what moves the adapters --------------------------------------------------


def singer(**kwargs):
    return build(dict(type='mmsinger.SiNGERDistiller', adapter=dict(rank=4),
                      loss_outlier=dict(quantile=0.8)), [], **kwargs)


def gradients(model, *losses):
    found = model.loss(**batch())
    sum(found[f'distill.{name}'] for name in losses).backward()
    return [None if p.grad is None else p.grad.clone()
            for p in model.adapters.parameters()]


def test_without_kd_gradient_the_other_losses_move_the_adapters():
    attached, detached = singer(), singer(kd_gradient=False)
    assert all(g.abs().sum() > 0 for g in gradients(attached, 'loss_kd'))
    assert all(g is None for g in gradients(detached, 'loss_kd'))
    rest = gradients(singer(), 'loss_outlier', 'loss_info')
    for ours, theirs in zip(
            gradients(singer(kd_gradient=False), 'loss_kd', 'loss_outlier',
                      'loss_info'), rest):
        assert torch.equal(ours, theirs)


def test_kd_itself_is_the_same():
    losses = [model.loss(**batch())['distill.loss_kd']
              for model in (singer(), singer(kd_gradient=False))]
    assert torch.equal(*losses)


def test_a_fixed_up_projection_stays_in_the_nullspace():
    model = build(dict(type='mmsinger.SiNGERDistiller', adapter=dict(
        rank=4, train_up=False)), [])
    before = copy.deepcopy(model.adapters['1'].up)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model.loss(**batch()).values()).backward()
    optimizer.step()
    assert torch.equal(model.adapters['1'].up, before)
    tokens = torch.randn(2, 5, 32)
    change = model.adapters['1'](tokens) - tokens
    null = before.T @ torch.linalg.pinv(before.T)
    assert torch.allclose(change @ null, change, atol=1e-4)


def test_the_teachers_quantile_does_not_fall():
    tokens = torch.randn(3, 50, 8)
    loss = OutlierSuppressionLoss(quantile=0.8, of='teacher')
    # refined to below the teacher's quantile, nothing is pulled any more
    assert loss(0.5 * tokens, original=tokens) == 0
    assert OutlierSuppressionLoss(quantile=0.8)(0.5 * tokens) > 0
    assert loss(tokens, original=tokens) == \
        OutlierSuppressionLoss(quantile=0.8)(tokens)


def test_an_outlier_loss_of_ones_own_takes_two_arguments():
    model = singer()
    model.refinement.loss_outlier = OnlyTwo()
    model.refinement.loss_outlier.loss_weight = 1.
    assert model.loss(**batch())['distill.loss_outlier'] == 7


class OnlyTwo(nn.Module):

    def forward(self, patches, weight=None):
        return patches.new_tensor(7.)


def test_a_teacher_that_is_not_finite_is_refused():
    model = FitNetDistiller(
        student=vit(), teacher=dict(backbone=vit()), layers=(1, 3),
        targets=inside(), task_loss_weight=0)
    with torch.no_grad():
        model.teacher.blocks.modules[2].ffn.layers[1].bias[0] = float('inf')
    with pytest.raises(ConfigError, match='Teacher block 2 .*not finite'):
        model.calibrate([images()])
