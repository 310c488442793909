"""The distillers: losses, gradients, what trains, what is saved, bad input."""
import copy
from collections import Counter

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mmsinger.engine.diagnostics import inlier_variance_ratio, inlier_variances
from mmsinger.errors import ConfigError
from mmsinger.models import FitNetDistiller, SiNGERDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.models.features.taps import BlockTaps
from mmsinger.registry import MODELS
from tiny import build, seg_vit, timm_vit, vit

SIZE = 32
SMALL = dict(embed_dims=16, num_layers=2, num_heads=2,
             feedforward_channels=32)
SMALL_VIT = vit(arch=SMALL)
SMALL_SEG_VIT = seg_vit(embed_dims=16, num_layers=2, num_heads=2,
                        final_norm=True)
SEG_DATA = dict(type='mmseg.SegDataPreProcessor', size=(SIZE, SIZE))
DISTILL = ['distill.loss_kd', 'distill.loss_outlier', 'distill.loss_info']

CLASSIFIER = dict(
    type='mmpretrain.ImageClassifier', backbone=SMALL_VIT,
    head=dict(type='mmpretrain.VisionTransformerClsHead', num_classes=5,
              in_channels=16))
SEGMENTOR = dict(
    type='mmseg.EncoderDecoder', data_preprocessor=SEG_DATA,
    backbone=dict(SMALL_SEG_VIT, out_indices=(0, 1)),
    neck=dict(type='mmseg.MultiLevelNeck', in_channels=[16, 16],
              out_channels=16, scales=[1, 1]),
    decode_head=dict(
        type='mmseg.FCNHead', in_channels=16, in_index=1, channels=16,
        num_convs=1, num_classes=3, norm_cfg=dict(type='BN')),
    auxiliary_head=dict(
        type='mmseg.FCNHead', in_channels=16, in_index=0, channels=16,
        num_convs=1, num_classes=3, norm_cfg=dict(type='BN')),
    test_cfg=dict(mode='whole'))
DEPTH_ESTIMATOR = dict(
    type='mmseg.DepthEstimator', data_preprocessor=SEG_DATA,
    backbone=dict(SMALL_SEG_VIT, num_layers=4, out_indices=(0, 1, 2, 3)),
    neck=dict(type='mmseg.MultiLevelNeck', in_channels=[16] * 4,
              out_channels=16, scales=[4, 2, 1, 0.5]),
    decode_head=dict(
        type='mmseg.VPDDepthHead', in_channels=[16] * 4, max_depth=10,
        embed_dim=8, feature_dim=64, num_deconv_filters=(16, 16, 16)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
WITH_HEAD = dict(classifier=CLASSIFIER, segmentor=SEGMENTOR,
                 depth=DEPTH_ESTIMATOR)
BACKBONES = dict(
    mmpretrain=SMALL_VIT,
    swiglu=vit(arch=SMALL, layer_cfgs=dict(ffn_type='swiglu_fused'),
               layer_scale_init_value=0.1),
    distilled=vit('DistilledVisionTransformer', arch=SMALL),
    eva02=vit('ViTEVA02', arch=SMALL, sub_ln=True),
    beit=vit('BEiTViT', arch=SMALL),
    mae=vit('MAEViT', arch=SMALL),
    mmseg=SMALL_SEG_VIT,
    mmseg_no_cls=dict(SMALL_SEG_VIT, with_cls_token=False),
    mmseg_checkpointing=dict(SMALL_SEG_VIT, with_cp=True),
    timm=timm_vit('vit_tiny_patch16_224', embed_dim=16, depth=2,
                  num_heads=2, reg_tokens=2),
)
FEATURES_ONLY = dict(
    headless=dict(type='mmpretrain.ImageClassifier', backbone=SMALL_VIT),
    **BACKBONES)
STUDENTS = ConfigDict({**WITH_HEAD, **FEATURES_ONLY})


def distiller(student='classifier', cls=SiNGERDistiller, ready=True,
              teacher=None, **kwargs):
    """A small distiller with random weights everywhere, in training mode."""
    if isinstance(student, str):
        if student in FEATURES_ONLY:
            kwargs.setdefault('task_loss_weight', 0)
        student = STUDENTS[student]
    if cls is SiNGERDistiller:
        kwargs.setdefault('adapter', dict(rank=4))
    model = cls(student=copy.deepcopy(student),
                teacher=teacher or dict(backbone=vit()),
                **{**dict(layers=(1, 3)), **kwargs})
    if ready:
        with torch.no_grad():
            for p in model.teacher.parameters():
                p.add_(0.1 * torch.randn_like(p))
        if cls is SiNGERDistiller:
            model.refinement.init_weights(model.teacher)
    return model.train()


def samples(name, count=2):
    if name == 'classifier':
        return [DataSample().set_gt_label(i) for i in range(count)]
    result = []
    for i in range(count):
        sample = SegDataSample(metainfo=dict(
            img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE),
            pad_shape=(SIZE, SIZE), img_path=f'{i}.png'))
        generator = torch.Generator().manual_seed(i)
        if name == 'segmentor':
            sample.gt_sem_seg = PixelData(data=torch.randint(
                0, 3, (1, SIZE, SIZE), generator=generator))
        else:
            sample.gt_depth_map = PixelData(data=1 + torch.rand(
                1, SIZE, SIZE, generator=generator))
        result.append(sample)
    return result


def images(count=2, height=SIZE, width=SIZE):
    return torch.randn(count, 3, height, width)


def total(losses):
    return sum(sum(v) if isinstance(v, list) else v
               for k, v in losses.items() if 'loss' in k)


def own_losses(model, *args):
    """Of the student alone, by the names that they have in the distiller."""
    return {'task.loss' if name == 'loss' else name: value
            for name, value in model.student.loss(*args).items()}


def calls_of(*modules):
    """Count how often modules run from now on; hooks, put in place now."""
    calls = Counter()
    for module in modules:
        module.register_forward_pre_hook(
            lambda m, _: calls.update([id(m)]))
    return calls


# -- losses ------------------------------------------------------------------


@pytest.mark.parametrize('name', WITH_HEAD)
def test_students_own_losses_and_distill(name):
    model = distiller(name)
    model.eval()  # the student has dropout
    x = images()
    losses = model.loss(x, samples(name))
    own = own_losses(model, x, samples(name))
    assert list(losses) == [*own, *DISTILL]
    for key, value in own.items():
        assert torch.allclose(losses[key], value, rtol=1e-4), key
    assert all(v.dim() == 0 and torch.isfinite(v) and v > 0
               for k, v in losses.items() if k in DISTILL)
    # … and they are what training sums
    loss, logs = model.parse_losses(losses)
    assert loss.item() == pytest.approx(total(losses).item(), rel=1e-5)
    assert logs['loss'] == loss


def test_fitnet_losses():
    losses = distiller('segmentor', cls=FitNetDistiller).loss(
        images(), samples('segmentor'))
    assert [k for k in losses if 'distill' in k] == ['distill.loss_kd']


@pytest.mark.parametrize('weight', [0.5, 1.0, 2])
@pytest.mark.parametrize('name', ['segmentor', 'classifier'])
def test_task_loss_weight_scales_the_students_losses_alone(name, weight):
    model = distiller(name, task_loss_weight=weight)
    model.eval()
    x = images()
    losses = model.loss(x, samples(name))
    own = own_losses(model, x, samples(name))
    for key, value in own.items():
        expected = value * weight if 'loss' in key else value  # accuracies
        assert torch.allclose(losses[key], expected, rtol=1e-4), key
    model.task_loss_weight = 1
    unscaled = model.loss(x, samples(name))
    for key in DISTILL:
        assert torch.equal(losses[key], unscaled[key])


def test_lists_of_losses_are_scaled():

    class Listed(torch.nn.Module):

        def loss(self, inputs, data_samples):
            self.backbone(inputs)
            return dict(loss_cls=[torch.ones(()), torch.ones(())],
                        acc=torch.ones(()))

    model = distiller('classifier', task_loss_weight=0.25)
    student = Listed()
    student.backbone = model.student.backbone
    model.student = student
    losses = model.loss(images(), None)
    assert losses['loss_cls'] == [0.25, 0.25] and losses['acc'] == 1


@pytest.mark.parametrize('name', WITH_HEAD)
def test_prediction_is_the_plain_students(name):
    model = distiller(name)
    model.eval()
    plain = MODELS.build(copy.deepcopy(STUDENTS[name]))
    plain.load_state_dict(model.student.state_dict(), strict=True)
    plain.eval()
    x = images()
    calls = calls_of(model.teacher.backbone, *model.adapters.values(),
                     *model.projectors.values())
    with torch.no_grad():
        assert same(model(x, mode='tensor'), plain(x, mode='tensor'))
        ours = model(x, samples(name), mode='predict')
        theirs = plain(x, samples(name), mode='predict')
    assert not calls
    for a, b in zip(ours, theirs):
        if name == 'classifier':
            assert torch.equal(a.pred_score, b.pred_score)
        elif name == 'segmentor':
            assert torch.equal(a.seg_logits.data, b.seg_logits.data)
        else:
            assert torch.equal(a.pred_depth_map.data, b.pred_depth_map.data)


def test_bare_backbone_predicts_its_features():
    model = distiller('mmpretrain')
    model.eval()
    x = images()
    with torch.no_grad():
        expected = model.student(x)
        for mode in ('tensor', 'predict'):
            assert same(model(x, mode=mode), expected)


def same(a, b):
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b)


# -- gradients and cost ------------------------------------------------------


@pytest.mark.parametrize('name, weight, cls', [
    *((name, 0, SiNGERDistiller) for name in STUDENTS),
    *((name, 1, SiNGERDistiller) for name in WITH_HEAD),
    ('classifier', 0, FitNetDistiller), ('segmentor', 1, FitNetDistiller)])
def test_every_trained_parameter_gets_a_gradient(name, weight, cls):
    """What DistributedDataParallel needs without find_unused_parameters."""
    model = distiller(name, cls=cls, task_loss_weight=weight)
    before = {k: v.clone() for k, v in
              model.teacher.backbone.state_dict().items()
              if 'rope' not in k}
    losses = model.loss(images(), samples(name) if weight else None)
    if not weight:  # no labels were needed
        assert all(key.startswith('distill.loss_') for key in losses)
    assert all(torch.isfinite(v).all() for v in losses.values())
    total(losses).backward()
    without = [key for key, p in model.named_parameters()
               if p.requires_grad and p.grad is None]
    assert not without
    parts = {key.split('.')[0] for key, p in model.named_parameters()
             if p.grad is not None and p.grad.abs().sum() > 0}
    assert parts == {'student', 'projectors'} | (
        {'adapters'} if cls is SiNGERDistiller else set())
    assert all(p.grad is None for p in model.teacher.parameters())
    theirs = model.teacher.backbone.state_dict()
    assert all(torch.equal(before[key], theirs[key]) for key in before)


@pytest.mark.parametrize('init', ['nullspace', 'random', 'zero'])
def test_adapter_gradients_whatever_the_start(init):
    model = distiller(adapter=dict(rank=4, init=init))
    total(model.loss(images(), samples('classifier'))).backward()
    for adapter in model.adapters.values():
        assert adapter.up.grad.abs().sum() > 0
        assert adapter.down.grad is not None
        assert (adapter.down.grad.abs().sum() > 0) == (init != 'zero')


def test_kd_gradient_reaches_the_adapter_too():
    model = distiller()
    model.loss(images(), samples('classifier'))['distill.loss_kd'].backward()
    for adapter in model.adapters.values():
        assert adapter.up.grad.abs().sum() > 0


@pytest.mark.parametrize('name', ['classifier', 'segmentor'])
def test_frozen_without_a_task_loss(name):
    model = distiller(name, task_loss_weight=0)
    frozen = {key for key, p in model.student.named_parameters()
              if not p.requires_grad}
    heads = {key for key, _ in model.student.named_parameters()
             if not key.startswith('backbone.')}
    assert frozen == heads | {'backbone.ln1.weight', 'backbone.ln1.bias'}
    # with a task loss nothing is
    assert all(p.requires_grad for p in
               distiller(name).student.parameters())


def test_blocks_after_the_last_distilled_one_are_frozen():
    model = distiller(vit(), task_loss_weight=0, student_layers=(0, 2))
    frozen = {key.split('.')[1] for key, p in
              model.student.named_parameters()
              if not p.requires_grad and key.startswith('layers.')}
    assert frozen == {'3'}
    total(model.loss(images(), None)).backward()
    assert all(p.grad is not None for p in model.parameters()
               if p.requires_grad)


@pytest.mark.parametrize('name', STUDENTS)
def test_building_leaves_the_student_as_it_is(name):
    """The probe for frozen parameters: no weight, buffer or mode changes,
    and the random state goes on as if it had not been."""
    torch.manual_seed(3)
    plain = MODELS.build(copy.deepcopy(STUDENTS[name])).state_dict()
    torch.manual_seed(3)
    model = distiller(name, task_loss_weight=0, ready=False, cls=(
        FitNetDistiller))
    ours = model.student.state_dict()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


@pytest.mark.parametrize('weight', [0, 1])
def test_nothing_is_computed_twice(weight):
    model = distiller('segmentor', task_loss_weight=weight)
    teacher = model.teacher.blocks.modules
    student = model.student_features.modules
    calls = calls_of(*teacher, *student, model.student.backbone,
                     model.teacher.backbone, model.teacher.backbone.ln1,
                     model.student.decode_head.conv_seg,
                     model.student.backbone.ln1)
    model.loss(images(), samples('segmentor') if weight else None)
    # layers 1 and 3: block 2 runs again, on the refined output of block 1
    assert [calls[id(b)] for b in teacher] == [1, 1, 2, 1]
    assert [calls[id(b)] for b in student] == [1, 1]
    assert calls[id(model.student.backbone)] == 1
    assert calls[id(model.teacher.backbone)] == 1
    assert calls[id(model.teacher.backbone.ln1)] == 0
    # without a task loss the student's pass stops too
    assert calls[id(model.student.decode_head.conv_seg)] == weight
    assert calls[id(model.student.backbone.ln1)] == weight


@pytest.mark.parametrize('layers, last_layer, expected', [
    ((0, ), 'final', [1, 2, 0, 0]), ((0, 1), 'final', [1, 2, 2, 0]),
    ((2, ), 'final', [1, 1, 1, 2]), ((3, ), 'final', [1, 1, 1, 1]),
    ((0, 2), 'listed', [1, 2, 1, 0])])
def test_teacher_runs_no_further_than_needed(layers, last_layer, expected):
    model = distiller('mmpretrain', layers=layers, last_layer=last_layer)
    calls = calls_of(*model.teacher.blocks.modules)
    model.loss(images(), None)
    assert [calls[id(b)] for b in model.teacher.blocks.modules] == expected


def test_fitnet_runs_no_block_again():
    model = distiller('mmpretrain', cls=FitNetDistiller, layers=(0, 2))
    calls = calls_of(*model.teacher.blocks.modules)
    model.loss(images(), None)
    assert [calls[id(b)] for b in model.teacher.blocks.modules] == \
        [1, 1, 1, 0]


def test_next_block_output_comes_from_the_same_pass():
    """With adapters that do nothing the re-run gives what the pass gave, so
    L_info is 0; for a teacher with position bias that needs its arguments."""
    for backbone in (vit(), vit('ViTEVA02'), vit(
            'BEiTViT', use_rel_pos_bias=False, use_shared_rel_pos_bias=True)):
        model = distiller('mmpretrain', teacher=dict(backbone=backbone),
                          adapter=dict(rank=4, init='zero'))
        losses = model.loss(images(), None)
        assert losses['distill.loss_info'] < 1e-9
        for adapter in model.adapters.values():
            torch.nn.init.normal_(adapter.up)
        assert model.loss(images(), None)['distill.loss_info'] > 1e-6


# -- layouts that differ -----------------------------------------------------


@pytest.mark.parametrize('teacher', [
    dict(backbone=vit(patch_size=14, img_size=56)),
    dict(backbone=vit(), input_size=(48, 24)),
    dict(backbone=timm_vit('vit_tiny_patch16_224', reg_tokens=4,
                           dynamic_img_size=True)),
    dict(backbone=vit('BEiTViT', img_size=48)),
    dict(backbone=vit(with_cls_token=False, out_type='avg_featmap')),
    dict(backbone=vit('DistilledVisionTransformer'))])
@pytest.mark.parametrize('name', ['mmpretrain', 'mmseg_no_cls', 'timm'])
def test_other_grids_and_prefixes(name, teacher):
    model = distiller(name, teacher=teacher)
    losses = model.loss(images(), None)
    assert all(torch.isfinite(v) and v > 0 for v in losses.values())
    total(losses).backward()
    assert all(p.grad is not None for p in model.parameters()
               if p.requires_grad)


def test_images_that_are_not_square():
    model = distiller('mmpretrain', teacher=dict(
        backbone=vit(patch_size=14, img_size=56)))
    losses = model.loss(images(height=40, width=64), None)
    assert all(torch.isfinite(v) for v in losses.values())


def test_projected_tokens_are_compared_in_place():
    """A student that gives the projected refined tokens has no KD loss:
    nothing is shifted by a CLS or register token on the way."""
    teacher = timm_vit('vit_tiny_patch16_224', reg_tokens=4)
    model = distiller(vit(with_cls_token=False, out_type='avg_featmap'),
                      teacher=dict(backbone=teacher), task_loss_weight=0,
                      layers=(3, ))
    x = images()
    taps = model.teacher(x, [3], model.student_normalisation)
    tokens = taps.tokens(3)
    assert tokens.num_prefix == 5
    refined = tokens.with_patches(model.adapters['3'](tokens.patches))
    student = type(tokens)(refined.patches, tokens.grid)
    torch.nn.init.eye_(model.projectors['3'].weight)
    torch.nn.init.zeros_(model.projectors['3'].bias)
    assert model.kd_loss(3, student, refined) < 1e-10
    shifted = type(tokens)(refined.patches.roll(1, 1), tokens.grid)
    assert model.kd_loss(3, shifted, refined) > 1e-3


def test_students_normalisation_is_undone():
    """The teacher sees the same pixels whatever the student's preprocessor
    subtracts."""
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE)).float()
    own = dict(mean=[127.5] * 3, std=[127.5] * 3)
    outcomes = []
    for preprocessor in (dict(), dict(mean=[120., 110., 100.],
                                      std=[50., 60., 70.])):
        torch.manual_seed(0)
        model = distiller(
            dict(SEGMENTOR, data_preprocessor=dict(SEG_DATA,
                                                   **preprocessor)),
            teacher=dict(backbone=vit(), **own), task_loss_weight=0)
        data = model.data_preprocessor(
            dict(inputs=list(pixels), data_samples=samples('segmentor')),
            True)
        assert torch.equal(data['inputs'], pixels) != bool(preprocessor)
        taps = model.teacher(data['inputs'], [3],
                             model.student_normalisation)
        outcomes.append(taps.tokens(3).values)
    assert torch.allclose(*outcomes, atol=1e-4)


def test_derived_and_given_student_layers():
    assert distiller(vit(), task_loss_weight=0).student_layers == [1, 3]
    assert distiller('mmpretrain').student_layers == [0, 1]
    assert distiller('mmpretrain', layers=('layers.1', -1)).layers == [1, 3]
    model = distiller(vit(), task_loss_weight=0,
                      student_layers=('backbone.layers.0', -2))
    assert model.student_layers == [0, 2]


def test_two_teacher_layers_on_one_student_block():
    model = distiller('mmpretrain', student_layers=(1, 1))
    total(model.loss(images(), None)).backward()
    assert all(p.grad is not None for p in model.parameters()
               if p.requires_grad)


# -- target_norm, precision --------------------------------------------------


@pytest.mark.parametrize('cls', [SiNGERDistiller, FitNetDistiller])
@pytest.mark.parametrize('mode', [None, 'standardise', 'layernorm'])
def test_target_norms(mode, cls):
    model = distiller('mmpretrain', cls=cls, target_norm=mode)
    assert model.needs_calibration == (mode == 'standardise')
    if mode == 'standardise':
        with pytest.raises(RuntimeError, match='has not been calibrated.*'
                           'CalibrationHook'):
            model.loss(images(), None)
        found, = model.calibrate([images(), images()])
        assert found.startswith('scale by teacher layer: 1: ')
        assert not model.needs_calibration
    losses = model.loss(images(), None)
    assert all(torch.isfinite(v) for v in losses.values())
    total(losses).backward()


def test_standardised_targets_have_unit_size():
    model = distiller('mmpretrain', target_norm='standardise')
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.mul_(3)
    batches = [images(8) for _ in range(4)]
    model.calibrate(batches)
    assert sorted(model.target_norms) == ['1', '2', '3']
    outputs = model.run_teacher(batches[0])
    for layer in (1, 2, 3):
        raw = outputs.taps.tokens(layer).patches
        patches = outputs.tokens(layer).patches
        assert 0.8 < patches.norm(dim=-1).median() / 32**0.5 < 1.2
        assert patches.flatten(0, 1).median(0).values.abs().max() < 0.5
        norm = model.target_norms[str(layer)]
        assert torch.allclose(norm.restore(norm.normalise(raw)), raw,
                              atol=1e-4)


def test_calibration_uses_all_batches():
    model = distiller('mmpretrain', target_norm='standardise')
    other = copy.deepcopy(model)
    batches = [images(n) for n in (3, 1, 4)]
    model.calibrate(batches)
    other.calibrate([torch.cat(batches)])
    for ours, theirs in zip(model.target_norms.buffers(),
                            other.target_norms.buffers()):
        # batches of another size round otherwise
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_standardising_needs_images():
    model = distiller('mmpretrain', target_norm='standardise')
    with pytest.raises(ConfigError, match='needs images'):
        model.calibrate([])


@pytest.mark.parametrize('mode', [None, 'standardise', 'layernorm'])
def test_bf16_autocast(mode):
    model = distiller('segmentor', target_norm=mode)
    model.eval()
    x = images()
    if mode == 'standardise':
        model.calibrate([x])
    exact = model.loss(x, samples('segmentor'))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(x, samples('segmentor'))
    for key in DISTILL:
        assert losses[key].dtype == torch.float32
        assert losses[key].item() == pytest.approx(
            exact[key].item(), rel=0.05, abs=1e-4), key
    total(losses).backward()
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all()
               for p in model.parameters())


def test_bf16_step():
    model = distiller('segmentor')
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1e-3)))
    before = copy.deepcopy(model.state_dict())
    data = dict(inputs=list(images()), data_samples=samples('segmentor'))
    with torch.autocast('cpu', torch.bfloat16):
        logs = model.train_step(data, wrapper)
    assert all(torch.isfinite(v).all() for v in logs.values())
    after = model.state_dict()
    for part in ('student.backbone', 'projectors', 'adapters'):
        changed = [key for key in after if key.startswith(part)
                   and not torch.equal(before[key], after[key])]
        assert changed, part
        assert all(after[key].dtype == torch.float32 for key in changed)


# -- saving, copying, optimising ---------------------------------------------


def test_state_dict():
    model = distiller('segmentor')
    plain = MODELS.build(copy.deepcopy(SEGMENTOR)).state_dict()
    expected = {f'student.{key}' for key in plain}
    for layer in (1, 3):
        expected |= {f'projectors.{layer}.weight', f'projectors.{layer}.bias',
                     f'adapters.{layer}.down', f'adapters.{layer}.up'}
    assert set(model.state_dict()) == expected
    standardised = distiller('segmentor', target_norm='standardise')
    assert set(standardised.state_dict()) - expected == {
        f'target_norms.{layer}.{name}' for layer in (1, 2, 3)
        for name in ('centre', 'scale')}


def test_state_dict_comes_back():
    model = distiller('segmentor', target_norm='standardise')
    model.calibrate([images()])
    twin = distiller('segmentor', target_norm='standardise', ready=False)
    assert twin.needs_calibration
    twin.load_state_dict(model.state_dict(), strict=True)
    assert not twin.needs_calibration
    twin.__dict__['teacher'] = model.teacher
    model.eval(), twin.eval()
    x = images()
    ours, theirs = (m.loss(x, samples('segmentor')) for m in (model, twin))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_does_not_fit_does_not_count_as_loaded():
    from mmengine.runner.checkpoint import load_state_dict
    model = distiller('mmpretrain', target_norm='standardise', ready=False)
    other = distiller('mmpretrain', target_norm='standardise',
                      adapter=dict(rank=8), teacher=dict(backbone=vit(
                          arch=dict(embed_dims=64, num_layers=4, num_heads=4,
                                    feedforward_channels=64))))
    other.calibrate([images()])
    load_state_dict(model, other.state_dict(), strict=False)
    assert model.needs_calibration
    uncalibrated = distiller('mmpretrain', target_norm='standardise')
    model.load_state_dict(uncalibrated.state_dict())
    assert model.needs_calibration


def test_averaged_copy():
    model = distiller('segmentor')
    average = ExponentialMovingAverage(model, momentum=0.5,
                                       update_buffers=True)
    assert average.module.teacher is model.teacher
    assert not any('teacher' in key for key in average.state_dict())
    start = copy.deepcopy(model.student.state_dict())
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.)
    average.update_parameters(model)
    key = next(k for k in start if k.endswith('attn.attn.in_proj_weight'))
    assert torch.allclose(average.module.student.state_dict()[key],
                          start[key] + 0.5)
    losses = average.module.loss(images(), samples('segmentor'))
    assert all(torch.isfinite(v).all() for v in losses.values())
    # each reads its own student
    with BlockTaps(average.module.student_features, [0]) as taps:
        average.module.student.backbone(images())
    assert taps.tokens(0).values.shape == (2, 17, 16)


def test_adapters_have_their_own_learning_rate():
    model = distiller()
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1),
        paramwise_cfg=dict(custom_keys={
            'adapters': dict(lr_mult=0.1, decay_mult=0.)})))
    adapters = {id(p) for p in model.adapters.parameters()}
    seen = 0
    for group in wrapper.optimizer.param_groups:
        for p in group['params']:
            seen += 1
            assert group['lr'] == pytest.approx(
                1e-3 if id(p) in adapters else 1e-2)
            assert group['weight_decay'] == pytest.approx(
                0. if id(p) in adapters else 0.1)
    assert seen == len(list(model.parameters()))


def test_training_lowers_the_loss():
    model = distiller('mmpretrain')
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, history = images(4), []
    for _ in range(15):
        loss = total(model.loss(x, None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]


def test_inlier_variance():
    """Against the formula, token by token."""
    original, refined = torch.randn(2, 3, 20, 8).unbind(0)
    original[:, 0] *= 50
    kept_original, kept_refined = [], []
    for image in range(3):
        norms = original[image].norm(dim=-1)
        threshold = norms.sort().values[int(0.9 * 19)] * (1 - 0.1) + \
            norms.sort().values[int(0.9 * 19) + 1] * 0.1
        for token in range(20):
            if norms[token] <= threshold:
                kept_original.append(original[image, token])
                kept_refined.append(refined[image, token])

    def variance(tokens):
        tokens = torch.stack(tokens)
        return (tokens - tokens.mean(0)).square().sum(-1).mean()

    assert len(kept_original) == 54
    assert inlier_variance_ratio(original, refined, 0.9).item() == \
        pytest.approx((variance(kept_refined)
                       / variance(kept_original)).item(), rel=1e-4)


def test_inlier_variance_is_measured_on_request():
    model = distiller('mmpretrain')

    def measure():
        model.records = [StepRecord()]
        model.loss(images(), None)
        return inlier_variances(model.records.pop(), 0.95)

    ratios = measure()
    assert sorted(ratios) == [1, 3]
    assert all(0.5 < v < 2 for v in ratios.values())
    with torch.no_grad():
        for adapter in model.adapters.values():  # projects everything away
            adapter.down.zero_()
            adapter.down[:, :4] = -torch.eye(32)[:, :4]
            adapter.up.copy_(torch.eye(32)[:4])
    assert all(v < 1 for v in measure().values())


# -- bad input ---------------------------------------------------------------


@pytest.mark.parametrize('kwargs, words', [
    (dict(layers=(1, 24)), ['layers=24 is out of range', 'from 0 to 3']),
    (dict(layers=('layrs.1', )), ["'layrs.1'", "Did you mean 'layers.1'"]),
    (dict(layers=(3, 1)), ['ascending order']),
    (dict(layers=(1, 1)), ['ascending order, each once']),
    (dict(layers=(3, -1)), ['ascending order, each once']),
    (dict(layers=()), ['must be a list']),
    (dict(layers=3), ['model.layers=3', 'a list']),
    (dict(layers='layers.3'), ["model.layers='layers.3'", 'a list']),
    (dict(student_layers=(0, 2)), ['student_layers=2 is out of range',
                                   '2 blocks']),
    (dict(student_layers=(1, )), ['one student block for each of the 2']),
    (dict(student_layers=1), ['model.student_layers=1', 'a list']),
    (dict(student_layers=('layers.0', 'layer.1')), [
        'student_layers', "Did you mean 'layers.1'"]),
    (dict(layer_map='oficial'), ['layer_map', "Did you mean 'official'"]),
    (dict(task_loss_weight=-1), ['task_loss_weight=-1', '0 or more']),
    (dict(target_norm='standardize'), ["Did you mean 'standardise'"]),
    (dict(last_layer='final_one'), ["last_layer='final_one'", "'listed'"]),
    (dict(layer=(1, 3)), ['model.layer:', "Did you mean", "'layers'"]),
    (dict(task_weight=1), ['model.task_weight', 'task_loss_weight']),
    (dict(adapter=dict(rnk=3)), ['model.adapter.rnk', "'rank'"]),
    (dict(adapter=dict(rank=33)), ['adapter.rank=33', '32 channels']),
    (dict(adapter=dict(rank=0)), ['adapter.rank=0']),
    (dict(adapter=dict(init='nulspace')), [
        'model.adapter.init', "Did you mean 'nullspace'"]),
    (dict(adapter=dict(selection='small')), ['model.adapter.selection']),
    (dict(loss_outlier=dict(quantile=1.)), ['loss_outlier.quantile=1.0']),
    (dict(loss_info=dict(last='next')), ["loss_info.last='next'"]),
    (dict(teacher=dict(backbone=vit(), checkpiont='x')), [
        'teacher.checkpiont', "Did you mean 'checkpoint'"]),
    (dict(teacher=dict(checkpoint='x.pth')), ['teacher must be dict('
                                              'backbone=']),
    (dict(teacher=dict(backbone=dict(type='mmpretrain.ResNet', depth=18))),
     ['teacher: ResNet is no vision transformer']),
    (dict(teacher=dict(backbone=vit(in_channels=1))), [
        'no common input', '3 channels', 'teacher of 1', 'in_channels']),
    (dict(student=vit(arch=SMALL, in_channels=4)), [
        'no common input', 'takes images of 4 channels']),
    (dict(student=dict(type='mmpretrain.RevVisionTransformer', arch=SMALL,
                       img_size=32, patch_size=8)),
     ['reaches no parameter of RevVisionTransformer']),
    (dict(student=vit(arch=SMALL, frozen_stages=2)),
     ['reaches no parameter', 'all its parameters are frozen']),
    (dict(projector=dict(type='MLPProjektor')), [
        'model.projector.type', "Did you mean 'MLPProjector'"]),
    (dict(resample='techer'), ['resample', "Did you mean 'teacher'"]),
    (dict(student='mmpretrain'), ["student='mmpretrain'", 'a dict']),
    (dict(student=FEATURES_ONLY['headless'], task_loss_weight=1.),
     ['task_loss_weight=1.0', 'ImageClassifier has no head',
      'task_loss_weight=0']),
    (dict(student=SMALL_VIT, task_loss_weight=0.5),
     ['VisionTransformer has no head']),
])
def test_bad_input(kwargs, words):
    kwargs = {**dict(student=SMALL_VIT, task_loss_weight=0, layers=(1, 3),
                     teacher=dict(backbone=vit()), adapter=dict(rank=4)),
              **kwargs}
    with pytest.raises(ConfigError) as error:
        SiNGERDistiller(**copy.deepcopy(kwargs))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_adapters_start_with_the_weights(tmp_path):
    weights = vit()
    torch.save(build(weights).state_dict(), tmp_path / 'teacher.pth')
    model = SiNGERDistiller(
        student=SMALL_VIT, task_loss_weight=0, layers=(1, 3),
        adapter=dict(rank=4), teacher_dtype='bf16',
        teacher=dict(backbone=weights, checkpoint=str(
            tmp_path / 'teacher.pth')))
    for adapter in model.adapters.values():
        assert not adapter.up.any()
    model.init_weights()
    for layer, block in ((1, 2), (3, 3)):
        null = model.refinement.ffn_directions[layer]
        assert model.refinement.ffn_block(layer) == block
        # from the full weights, whatever the teacher is cast to
        expected = null.directions[:, -4:].flip(1).T.float()
        assert torch.equal(model.adapters[str(layer)].up, expected)


def test_unlinearisable_teacher():
    model = distiller('mmpretrain', ready=False)
    block = model.teacher.blocks.modules[2]
    with torch.no_grad():
        block.ffn.layers[1].weight[0, 0] = float('nan')
    with pytest.raises(ConfigError, match='not finite'):
        model.refinement.init_weights(model.teacher)
