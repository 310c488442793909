"""Planted artifacts: as many, where and as long as asked, and the same for
the same image."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.models import FrozenTeacher, PlantedArtifacts, SiNGERDistiller
from mmsinger.models.adapters import left_singular_directions, linearised_ffn
from mmsinger.models.backbones.planted_artifacts import choose_patches
from mmsinger.models.features.anatomy import (find_blocks, patch_stride,
                                              resolve_layer)
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.teachers.frozen import Normalisation
from tiny import build, seg_vit, timm_vit, vit, write_teacher

seeds = st.integers(0, 2**16)
PLAIN = Normalisation(None, None)
FAMILIES = dict(
    mmpretrain=vit(), distilled=vit('DistilledVisionTransformer'),
    no_cls=vit(with_cls_token=False, out_type='avg_featmap'),
    mae=vit('MAEViT'), eva02=vit('ViTEVA02'),
    beit=vit('BEiTViT', final_norm=True), mmseg=seg_vit(final_norm=True),
    timm=timm_vit('vit_tiny_patch16_224', reg_tokens=4,
                  dynamic_img_size=True))


def pictures(count=8, height=64, width=96, seed=0):
    """Images like ours: 8 bits, normalised, plain in some places."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 16, width // 16,
                        generator=generator)
    noise = torch.rand(count, 3, height, width, generator=generator)
    strength = nn.functional.interpolate(coarse[:, :1], (height, width))
    images = nn.functional.interpolate(coarse, (height, width))
    images = (255 * (0.7 * images + 0.3 * strength * noise)).floor()
    return (images - 127.5) / 64


def planter(backbone=None, **settings):
    return build(dict(type='mmsinger.PlantedArtifacts',
                      backbone=backbone or vit(), **settings))


def tokens_after(backbone, images, layer):
    with torch.no_grad(), BlockTaps(
            find_blocks(backbone, 'teacher'), [layer], stop=True) as taps:
        taps.run(backbone, images)
    return taps.tokens(layer)


def planted_vectors(model, images):
    """What was added, and the clean tokens."""
    clean = tokens_after(model.backbone_without, images, model.after)
    planted = tokens_after(model, images, model.after)
    assert torch.equal(clean.prefix, planted.prefix)
    return planted.patches - clean.patches, clean.patches


def with_clean(model):
    """Beside a copy of its backbone that plants nothing."""
    clean = copy.deepcopy(model)
    clean.share = 0
    object.__setattr__(model, 'backbone_without', clean)
    return model


# -- which patches -----------------------------------------------------------


@pytest.mark.parametrize('share', [0.03, 0.1, 0.3, 1 / 3])
def test_share_on_average(share):
    mask = choose_patches(pictures(150, 64, 96), (16, 24), (4, 4),
                          share).mask
    counts = mask.sum(dim=1) / mask.shape[1]
    assert counts.mean().item() == pytest.approx(share, rel=0.05)
    rounding = 0.5 / mask.shape[1]
    assert counts.min() >= 0.5 * share - rounding
    assert counts.max() <= 1.5 * share + rounding
    assert counts.std() > 0.2 * share


def test_at_least_one():
    mask = choose_patches(pictures(20), (8, 12), (8, 8), 1e-6).mask
    assert torch.equal(mask.sum(dim=1), torch.ones(20, dtype=torch.long))


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.03, 0.1, 1 / 3]))
def test_only_patches_of_little_variance(seed, share):
    images = pictures(4, seed=seed)
    mask = choose_patches(images, (8, 12), (8, 8), share).mask
    for image, planted in zip(images, mask.unflatten(1, (8, 12))):
        variance = torch.stack([
            image[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8].double().var()
            for i in range(8) for j in range(12)])
        assert variance[planted.flatten()].max() <= variance.quantile(0.5)


@settings(max_examples=15)
@given(seeds, st.integers(1, 7))
def test_an_image_is_chosen_for_alone(seed, count):
    images = pictures(8, seed=seed)
    whole = choose_patches(images, (8, 12), (8, 8), 0.1)
    order = torch.randperm(8)[:count]
    for found, expected in zip(
            choose_patches(images[order], (8, 12), (8, 8), 0.1), whole):
        assert torch.equal(found, expected[order])


def test_neither_the_order_of_sums_nor_precision_shows():
    """Other processors add in another order: here, pixels in another order
    within their patches."""
    images = pictures()
    expected = choose_patches(images, (8, 12), (8, 8), 0.1)
    turned = images.unflatten(2, (8, 8)).flip(3).flatten(2, 3)
    for other in (turned, images.half(), images.double(),
                  images.contiguous(memory_format=torch.channels_last)):
        for found, value in zip(
                choose_patches(other, (8, 12), (8, 8), 0.1), expected):
            assert torch.equal(found, value)
            assert found.dtype == value.dtype


def test_numbers_spread_over_images_and_patches():
    chosen = choose_patches(pictures(100), (8, 12), (8, 8), 0.1)
    for numbers in (chosen.of_patch, chosen.of_image):
        assert 0 <= numbers.min() and numbers.max() < 1
        counts = torch.histc(numbers, 10, 0, 1) / numbers.numel()
        assert counts.min() > 0.05 and counts.max() < 0.17
    # each place is planted now and then
    plain = choose_patches(torch.randn(1500, 3, 16, 24), (8, 12), (2, 2),
                           0.1).mask.float().mean(dim=0)
    assert plain.min() > 0.05 and plain.max() < 0.17


@pytest.mark.parametrize('value', [0., 0.3, -2., 255.])
def test_constant_images(value):
    """All variances are equal: any patch will do, as many as ever."""
    images = torch.full((1, 3, 64, 96), value)
    chosen = choose_patches(images, (8, 12), (8, 8), 0.1)
    assert 0.05 * 96 - 0.5 <= chosen.mask.sum() <= 0.15 * 96 + 0.5
    assert len(chosen.of_patch.unique()) > 90
    other = choose_patches(images + 0.125, (8, 12), (8, 8), 0.1)
    assert not torch.equal(chosen.mask, other.mask)


def test_ties_of_two_plain_colours():
    """Constant patches have no variance, whatever their colour."""
    images = torch.randn(1, 3, 64, 96)
    images[..., :40, :] = torch.linspace(0.1, 0.9, 12).repeat_interleave(8)
    planted = torch.zeros(8, 12, dtype=torch.bool)
    for shift in range(60):
        planted |= choose_patches(images + shift / 128, (8, 12), (8, 8),
                                  0.3).mask.view(8, 12)
    assert planted[:5].all() and not planted[5:].any()


def test_images_that_begin_alike_differ():
    images = pictures(50)
    images[..., :8, :16] = 1.
    numbers = choose_patches(images, (8, 12), (8, 8), 0.1).of_image
    assert len(numbers.unique()) == 50


def test_sizes_that_patches_do_not_divide():
    """mmseg pads, mmpretrain cuts: the cells stay where the patches are."""
    images = pictures()
    cut = choose_patches(images[..., :61, :90], (7, 11), (8, 8), 0.1)
    same = choose_patches(images[..., :56, :88], (7, 11), (8, 8), 0.1)
    padded = nn.functional.pad(images[..., :61, :90], (0, 6, 0, 3))
    for ours, theirs in ((cut, same), (
            choose_patches(images[..., :61, :90], (8, 12), (8, 8), 0.1),
            choose_patches(padded, (8, 12), (8, 8), 0.1))):
        assert all(map(torch.equal, ours, theirs))


# -- what is planted ---------------------------------------------------------


@pytest.mark.parametrize('name', FAMILIES)
def test_planted_tokens(name):
    model = with_clean(planter(FAMILIES[name], share=0.2, norm=(3., 5.)))
    square = name == 'beit'
    images = pictures(6, 32, 32 if square else 48)
    vectors, patches = planted_vectors(model, images)
    mask = model.planted_mask
    assert mask.shape == (6, 16 if square else 24)
    assert mask.any(dim=1).all()
    assert not vectors[~mask].any()
    lengths = vectors.norm(dim=-1) / patches.norm(dim=-1).median(
        dim=1, keepdim=True).values
    assert lengths[mask].min() >= 3 - 1e-4
    assert lengths[mask].max() <= 5 + 1e-4
    assert lengths[mask].std() > 0.2
    # one direction, the same in all images
    singular = torch.linalg.svdvals(vectors[mask].double())
    assert singular[1] < 1e-5 * singular[0]
    # and the later blocks carry it
    later = tokens_after(model, images, model.after + 1)
    clean = tokens_after(model.backbone_without, images, model.after + 1)
    assert not torch.allclose(later.patches, clean.patches, atol=0.1)


def test_a_whole_pass_plants_as_taps_do():
    model = planter(vit(out_type='raw', final_norm=False))
    images = pictures(3, 32, 48)
    with torch.no_grad():
        tokens, = model(images)
    assert torch.equal(tokens, tokens_after(model, images, 3).values)


@pytest.mark.parametrize('dims', [2, 5, 12])
@pytest.mark.parametrize('direction', ['random', 'null'])
def test_rank(dims, direction):
    model = with_clean(planter(dims=dims, direction=direction, share=0.3))
    images = pictures(48, 32, 48)
    vectors, _ = planted_vectors(model, images)
    units = nn.functional.normalize(vectors[model.planted_mask].double(),
                                    dim=-1)
    singular = torch.linalg.svdvals(units)
    assert (singular > 1e-4 * singular[0]).sum() == dims
    # no direction is preferred
    assert singular[dims - 1] > 0.2 * singular[0]
    # in one image they are all the same
    for image, mask in zip(vectors, model.planted_mask):
        assert torch.linalg.matrix_rank(image[mask].double(),
                                        rtol=1e-5) == 1


@pytest.mark.parametrize('backbone', [
    vit(), seg_vit(final_norm=True), FAMILIES['timm'],
    vit(layer_cfgs=dict(ffn_type='swiglu_fused'))])
def test_null_directions_are_hardly_seen_by_the_next_ffn(backbone):
    model = planter(backbone, direction='null', dims=3, after=2)
    weight = linearised_ffn(find_blocks(model, 'teacher').modules[3])
    directions, values = left_singular_directions(weight)
    basis = model.basis()
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-5)
    coordinates = basis.double() @ directions
    assert coordinates[:, :-3].abs().max() < 1e-5
    assert (basis.double() @ weight).norm(dim=-1).max() <= \
        values[-3] * (1 + 1e-4) + 1e-6


def test_random_directions_follow_the_seed():
    first, again, other = (planter(dims=4, seed=s).basis() for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.allclose(first @ first.T, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize('name', FAMILIES)
def test_nothing_planted_is_the_clean_backbone_to_the_bit(name):
    model = planter(FAMILIES[name], share=0)
    clean = build(FAMILIES[name])
    clean.load_state_dict(model.backbone.state_dict())
    images = pictures(2, 32, 32)
    for layer in range(4):
        assert torch.equal(tokens_after(model, images, layer).values,
                           tokens_after(clean, images, layer).values)
    assert model.planted_mask.shape == (2, 16)
    assert not model.planted_mask.any()


@pytest.mark.parametrize('dims', [1, 4])
@pytest.mark.parametrize('count', [1, 3])
def test_the_same_image_gets_the_same_artifacts(dims, count):
    model = with_clean(planter(dims=dims))
    images = pictures(6, 32, 48)
    whole, _ = planted_vectors(model, images)
    mask = model.planted_mask
    part, _ = planted_vectors(model, images[-count:])
    assert torch.equal(model.planted_mask, mask[-count:])
    assert torch.allclose(part, whole[-count:], atol=1e-4)
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16,
                                   torch.float64])
@pytest.mark.parametrize('dims', [1, 4])
def test_other_precision(dtype, dims):
    model = with_clean(planter(dims=dims, norm=(5., 10.)))
    images = (pictures(6, 32, 48) * 8).round() / 8  # exact in bfloat16
    exact, _ = planted_vectors(model, images)
    mask = model.planted_mask
    model = with_clean(model.to(dtype))
    vectors, patches = planted_vectors(model, images.to(dtype))
    assert vectors.dtype == dtype
    assert torch.equal(model.planted_mask, mask)
    assert torch.allclose(vectors.float(), exact, rtol=0.1,
                          atol=0.1 * exact.abs().max().item())
    # lengths differ from each other in half precision, too
    lengths = vectors.float().norm(dim=-1) / patches.float().norm(
        dim=-1).median(dim=1, keepdim=True).values
    assert lengths[mask].std() > 0.5


def test_under_autocast():
    model = planter(dims=4)
    images = pictures(6, 32, 48)
    expected = tokens_after(model, images, 1)
    mask = model.planted_mask
    with torch.autocast('cpu', torch.bfloat16):
        found = tokens_after(model, images, 1)
    assert torch.equal(model.planted_mask, mask)
    cosine = torch.cosine_similarity(expected.patches[mask],
                                     found.patches[mask].float(), dim=-1)
    assert cosine.min() > 0.99


# -- in place of the backbone ------------------------------------------------


@pytest.mark.parametrize('name, prefix', [
    ('mmpretrain', 'backbone.'), ('mmpretrain', ''), ('mmseg', 'backbone.'),
    ('eva02', 'model.encoder.'), ('timm', 'backbone.')])
def test_clean_checkpoints_load_with_and_without(tmp_path, name, prefix):
    path = str(tmp_path / 'clean.pth')
    write_teacher(path, FAMILIES[name], prefix)
    content = torch.load(path)
    content['state_dict'][prefix + 'head.weight'] = torch.zeros(2)
    torch.save(content, path)
    teachers = [FrozenTeacher(backbone=backbone, checkpoint=path,
                              prefix=prefix, ignore_keys=['head.'])
                for backbone in (FAMILIES[name], dict(
                    type='mmsinger.PlantedArtifacts',
                    backbone=FAMILIES[name]))]
    for teacher in teachers:
        teacher.load_weights()
    clean, planted = (t.backbone for t in teachers)
    state = planted.backbone.state_dict()
    assert set(state) == set(clean.state_dict())
    assert all(torch.equal(value, state[key])
               for key, value in clean.state_dict().items())
    # before the artifacts nothing differs, after them all does
    images = pictures(2, 32, 32)
    first, second = ([t(images, [0, 1], PLAIN).tokens(layer).values
                      for t in teachers] for layer in (0, 1))
    assert torch.equal(*first) and not torch.equal(*second)


@pytest.mark.parametrize('prefix', ['', 'timm.'])
def test_timms_own_checkpoints_load(tmp_path, prefix):
    path = str(tmp_path / 'timm.pth')
    clean = build(FAMILIES['timm'])
    torch.save({prefix + k: v for k, v in
                clean.timm_model.state_dict().items()}, path)
    teacher = FrozenTeacher(checkpoint=path, prefix=prefix, backbone=dict(
        type='mmsinger.PlantedArtifacts', backbone=FAMILIES['timm']))
    teacher.load_weights()
    assert all(torch.equal(value, clean.state_dict()[key]) for key, value
               in teacher.backbone.backbone.state_dict().items())


@pytest.mark.parametrize('change, words', [
    (lambda w: w.pop('layers.1.ln1.weight'), ['1 missing', 'layers.1.ln1']),
    (lambda w: w.update(extra=torch.zeros(1)), ['1 unexpected', 'extra']),
])
def test_loading_is_strict(tmp_path, change, words):
    path = str(tmp_path / 'clean.pth')
    write_teacher(path, vit(), '')
    content = torch.load(path)
    change(content['state_dict'])
    torch.save(content, path)
    teacher = FrozenTeacher(checkpoint=path, backbone=dict(
        type='mmsinger.PlantedArtifacts', backbone=vit()))
    with pytest.raises(ConfigError) as error:
        teacher.load_weights()
    assert all(word in str(error.value) for word in words)


def test_its_own_state_dict_loads_too():
    model, other = planter(), planter()
    other.load_state_dict(model.state_dict())
    whole = nn.ModuleDict(dict(backbone=planter()))
    whole.load_state_dict({f'backbone.{k}': v for k, v in
                           model.backbone.state_dict().items()})
    for loaded in (other, whole['backbone']):
        assert all(torch.equal(value, loaded.state_dict()[key])
                   for key, value in model.state_dict().items())


def test_directions_are_of_the_weights_that_were_loaded(tmp_path):
    path = str(tmp_path / 'timm.pth')
    clean = build(FAMILIES['timm'])
    torch.save(clean.timm_model.state_dict(), path)
    teacher = FrozenTeacher(backbone=dict(
        type='mmsinger.PlantedArtifacts', backbone=FAMILIES['timm'],
        direction='null'))
    images = pictures(2, 32, 32)
    teacher(images, [1], PLAIN)
    teacher.checkpoint = path
    teacher.load_weights()
    model = with_clean(teacher.backbone)
    vectors, _ = planted_vectors(model, images)
    vectors = nn.functional.normalize(vectors[model.planted_mask], dim=-1)
    directions, _ = left_singular_directions(
        linearised_ffn(find_blocks(clean, 'teacher').modules[2]))
    assert torch.allclose((vectors.double() @ directions[:, -1]).abs(),
                          torch.ones(len(vectors)).double(), atol=1e-5)


@pytest.mark.parametrize('path', ['layers.2', 'backbone.layers.2',
                                  'backbone.backbone.layers.2'])
def test_layers_by_name(path):
    model = planter(after='layers.1')
    assert resolve_layer(path, find_blocks(model, 'teacher'), 'layers') == 2


@pytest.mark.parametrize('name', ['mmpretrain', 'mmseg', 'timm'])
def test_taps_read_it(name):
    model = planter(FAMILIES[name], after=-2)
    blocks = find_blocks(model, 'teacher')
    assert model.after == 2 and len(blocks) == 4 and blocks.dim == 32
    assert patch_stride(blocks.patch_embed) == (8, 8)
    tokens = tokens_after(model, pictures(2, 32, 48), 3)
    assert tokens.grid == (4, 6)
    assert model.planted_mask.shape == (2, 24)


def test_a_copy_plants_by_itself():
    model = planter(direction='null')
    images = pictures(2, 32, 48)
    trained = (images.clone().requires_grad_() * 1)
    model(trained)  # what it keeps of a pass can be copied
    expected = tokens_after(model, images, 3).values
    twin = copy.deepcopy(model)
    model.planted_mask = None
    assert torch.equal(tokens_after(twin, images, 3).values, expected)
    assert twin.planted_mask.any() and model.planted_mask is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(tokens_after(twin, images, 3).values, expected)


def test_gradients_pass():
    """A trained backbone with artifacts learns in front of them, too."""
    model = planter(vit(out_type='raw'))
    model(pictures(2, 32, 32))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any()
               for p in model.backbone.layers[0].parameters())


@pytest.mark.parametrize('kwargs', [
    {}, dict(gate=dict(mad=8.0), cap=True)], ids=['paper', 'gated'])
def test_in_a_distiller(kwargs):
    model = SiNGERDistiller(
        student=vit(), task_loss_weight=0, layers=(1, 3),
        target_norm='standardise', teacher=dict(backbone=dict(
            type='mmsinger.PlantedArtifacts', backbone=vit())), **kwargs)
    model.init_weights()
    model.calibrate([pictures(4, 32, 32)])
    losses = model.loss(pictures(4, 32, 32), None)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()


def test_the_block_it_plants_after_is_not_run_alone():
    model = SiNGERDistiller(
        student=vit(), task_loss_weight=0, layers=(0, 3),
        teacher=dict(backbone=dict(type='mmsinger.PlantedArtifacts',
                                   backbone=vit(), after=1)))
    model.init_weights()
    with pytest.raises(ConfigError, match='block 1 was run on its own.*'
                       'Distil block 1 or later'):
        model.loss(pictures(2, 32, 32), None)
    model.teacher.backbone.share = 0  # clean, there is no need of the image
    assert torch.isfinite(
        sum(model.loss(pictures(2, 32, 32), None).values()))


@pytest.mark.parametrize('settings, words', [
    (dict(share=0.4), ['share=0.4', 'at most 0.33']),
    (dict(share=-0.1), ['share=-0.1', '0 or more']),
    (dict(norm=(9., 7.)), ['norm=(9.0, 7.0)', '(7.0, 9.0)']),
    (dict(norm=(0., 7.)), ['norm.0=0.0', 'above 0']),
    (dict(norm=7.), ['norm=7.0']),
    (dict(dims=0), ['dims=0', '1 or more']),
    (dict(dims=33), ['dims=33', '32 channels']),
    (dict(dims=1.5), ['dims=1.5', 'a whole number']),
    (dict(direction='nul'), ["direction='nul'", "Did you mean 'null'"]),
    (dict(after=4), ['after=4', '0 to 3']),
    (dict(after=3), ['after=3', 'last block']),
    (dict(after='layer.1'), ["'layer.1'", "'layers.1'"]),
])
def test_errors(settings, words):
    with pytest.raises(ConfigError) as error:
        PlantedArtifacts(**{**dict(backbone=vit()), **settings})
    assert all(word in str(error.value) for word in words)


def test_a_pyramid_is_refused():
    with pytest.raises(ConfigError, match='PlantedArtifacts.backbone.*'
                       'pyramid'):
        PlantedArtifacts(dict(type='mmpretrain.SwinTransformer', arch='tiny'))


def test_on_content_of_the_other_half():
    images = pictures(8, 64, 96)
    args = ((8, 12), (8, 8), 0.3)
    plain = choose_patches(images, *args).mask
    content = choose_patches(images, *args, 'content').mask
    assert not (plain & content).any()
    for image, mask in zip(images, content.unflatten(1, (8, 12))):
        variance = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(
            1, 2, 0, 3, 4).flatten(2).var(dim=-1)
        assert variance[mask].min() >= variance.flatten().median()
