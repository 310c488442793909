"""Distillation of logits: the loss, both tasks, the teacher, bad input."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mmsinger.checkpoint import student_state_dict
from mmsinger.errors import ConfigError
from mmsinger.models import FrozenClassifier, LogitKDDistiller, LogitKLLoss
from mmsinger.models.distillers import is_distiller
from mmsinger.models.teachers.frozen import Normalisation
from mmsinger.registry import MODELS
from tiny import seg_vit, vit

SIZE = 32
SMALL = dict(embed_dims=16, num_layers=2, num_heads=2,
             feedforward_channels=32)


def classifier(classes=5, dim=32, **kwargs):
    return {**dict(
        type='mmpretrain.ImageClassifier',
        backbone=vit(arch=dict(SMALL, embed_dims=dim)),
        head=dict(type='mmpretrain.VisionTransformerClsHead',
                  num_classes=classes, in_channels=dim)), **kwargs}


def segmentor(classes=3, dim=16, patch=8, **kwargs):
    head = dict(type='mmseg.FCNHead', in_channels=dim, channels=16,
                num_convs=1, num_classes=classes, norm_cfg=dict(type='BN'))
    return {**dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor',
                               size=(SIZE, SIZE)),
        backbone=seg_vit(embed_dims=dim, num_layers=2, num_heads=2,
                         patch_size=patch, final_norm=True,
                         out_indices=(0, 1)),
        decode_head=dict(head, in_index=1),
        auxiliary_head=dict(head, in_index=0),
        test_cfg=dict(mode='whole')), **kwargs}


def distiller(student, teacher, ready=True, **kwargs):
    torch.manual_seed(0)
    model = LogitKDDistiller(
        student=copy.deepcopy(student),
        teacher=dict(model=copy.deepcopy(teacher)), **kwargs)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.train()


def samples(name, count=2):
    if name == 'classifier':
        return [DataSample().set_gt_label(i) for i in range(count)]
    result = []
    for i in range(count):
        result.append(SegDataSample(metainfo=dict(
            img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE))))
        result[-1].gt_sem_seg = PixelData(data=torch.full(
            (1, SIZE, SIZE), i))
    return result


MODELS_OF = dict(classifier=(classifier(dim=16), classifier()),
                 segmentor=(segmentor(), segmentor(dim=32, patch=16)))
images = lambda: torch.randn(  # noqa: E731
    2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


# -- the loss ----------------------------------------------------------------


def kl_by_hand(student, teacher, temperature):
    """Of two rows of logits, in numpy."""
    p, q = (np.exp(v / temperature) / np.exp(v / temperature).sum()
            for v in (teacher.astype(float), student.astype(float)))
    return temperature**2 * (p * np.log(p / q)).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.5, 20), st.integers(2, 7),
       st.booleans())
def test_loss_by_hand(seed, temperature, classes, dense):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, classes, 2, 3) if dense else (2, classes)
    student, teacher = (3 * torch.randn(shape, generator=generator)
                        for _ in range(2))
    loss = LogitKLLoss(temperature, loss_weight=0.5)(student, teacher)
    rows = [v.numpy().reshape(2, classes, -1).transpose(0, 2, 1).reshape(
        -1, classes) for v in (student, teacher)]
    expected = 0.5 * np.mean([
        kl_by_hand(s, t, temperature) for s, t in zip(*rows)])
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    same = LogitKLLoss(temperature)(teacher, teacher + 7.)  # a constant
    assert abs(same.item()) < 1e-3


def test_dense_logits_are_compared_on_the_students_grid():
    student = torch.randn(1, 3, 8, 8)
    teacher = torch.randn(1, 3, 4, 4)
    loss = LogitKLLoss()
    larger = torch.nn.functional.interpolate(
        teacher, (8, 8), mode='bilinear', align_corners=False)
    assert torch.allclose(loss(student, teacher), loss(student, larger))


def test_gradient_hardly_depends_on_the_temperature():
    """T^2: for a large T it is that of a squared difference of logits."""
    teacher = torch.randn(4, 6)
    gradients = []
    for temperature in (30., 60.):
        student = torch.zeros(4, 6, requires_grad=True)
        LogitKLLoss(temperature)(student, teacher).backward()
        gradients.append(student.grad)
    assert torch.allclose(*gradients, rtol=0.1, atol=1e-3)


def test_loss_in_half_precision_is_float32():
    loss = LogitKLLoss()(torch.randn(2, 4).bfloat16(),
                         torch.randn(2, 4).bfloat16())
    assert loss.dtype == torch.float32


# -- the distiller -----------------------------------------------------------


@pytest.mark.parametrize('weight', [0, 0.5, 1])
@pytest.mark.parametrize('name', MODELS_OF)
def test_losses(name, weight):
    model = distiller(*MODELS_OF[name], task_loss_weight=weight)
    model.eval()  # no dropout, fixed batch norm
    x = images()
    losses = model.loss(x, samples(name) if weight else None)
    expected = model.loss_kd(
        model.student(x), model.teacher.model(x))
    assert torch.allclose(losses['distill.loss_kd'], expected, rtol=1e-4)
    assert expected > 0
    own = {k: v for k, v in losses.items() if 'distill' not in k}
    theirs = model.student.loss(x, samples(name)) if weight else {}
    if 'loss' in theirs:  # in whose place mmengine logs the sum
        theirs['task.loss'] = theirs.pop('loss')
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = weight if 'loss' in key else 1
        assert torch.allclose(own[key], scale * value, rtol=1e-4), key


@pytest.mark.parametrize('weight', [0, 1])
@pytest.mark.parametrize('name', MODELS_OF)
def test_every_trained_parameter_gets_a_gradient(name, weight):
    model = distiller(*MODELS_OF[name], task_loss_weight=weight)
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses = model.loss(images(), samples(name) if weight else None)
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    assert all((p.grad is not None) == p.requires_grad
               for p in model.parameters())
    frozen = {k.split('.')[1] for k, p in model.named_parameters()
              if not p.requires_grad}
    # without a task loss an auxiliary head has nothing to learn from
    assert frozen == ({'auxiliary_head'} if name == 'segmentor' and
                      not weight else set())
    assert all(torch.equal(before[k], v)  # batch norm does not move either
               for k, v in model.teacher.model.state_dict().items())


@pytest.mark.parametrize('name', MODELS_OF)
def test_students_pass_is_made_once(name):
    model = distiller(*MODELS_OF[name])
    calls = []
    model.student.backbone.register_forward_pre_hook(
        lambda *_: calls.append('backbone'))
    last = model.student.decode_head.conv_seg if name == 'segmentor' \
        else model.student.head.layers.head
    last.register_forward_pre_hook(lambda *_: calls.append('head'))
    model.loss(images(), samples(name))
    assert calls == ['backbone', 'head']
    assert not any(m._forward_hooks for m in model.student.modules())


def test_training_makes_the_student_agree():
    model = distiller(*MODELS_OF['classifier'], task_loss_weight=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    history = []
    for _ in range(25):
        loss = model.loss(images(), None)['distill.loss_kd']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]


def test_it_is_a_distiller_like_the_others():
    assert is_distiller(dict(type='mmsinger.LogitKDDistiller'))
    model = distiller(*MODELS_OF['classifier'])
    assert {key.split('.')[0] for key in model.state_dict()} == {'student'}
    plain = MODELS.build(copy.deepcopy(MODELS_OF['classifier'][0]))
    plain.load_state_dict(student_state_dict(model.state_dict()))
    plain.eval(), model.eval()
    assert torch.equal(model(images()), plain(images()))
    assert copy.deepcopy(model).teacher is model.teacher
    model.train()
    assert not any(m.training for m in model.teacher.modules())


# -- the teacher -------------------------------------------------------------


def test_teacher_is_loaded_strictly(tmp_path):
    torch.manual_seed(0)
    cfg = classifier()
    original = MODELS.build(copy.deepcopy(cfg)).state_dict()
    path = str(tmp_path / 'teacher.pth')
    torch.save(dict(state_dict=original), path)
    model = LogitKDDistiller(
        student=classifier(dim=16),
        teacher=dict(model=copy.deepcopy(cfg), checkpoint=path))
    with pytest.raises(RuntimeError, match='no weights yet'):
        model.loss(images(), samples('classifier'))
    model.init_weights()
    theirs = model.teacher.model.state_dict()
    assert all(torch.equal(original[k], theirs[k]) for k in original)
    # a backbone alone is no teacher here
    torch.save({k: v for k, v in original.items() if 'head' not in k}, path)
    with pytest.raises(ConfigError) as error:
        model.teacher.load_weights()
    for word in ('teacher.model (ImageClassifier)', '2 missing keys',
                 'head.layers.head.weight'):
        assert word in str(error.value)


def test_teachers_own_size_and_normalisation():
    teacher = FrozenClassifier(
        model=classifier(), mean=[127.5] * 3, std=[127.5] * 3, input_size=48)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE)).float()
    sizes = []
    teacher.model.backbone.register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].shape[-2:]))
    raw = teacher(pixels, Normalisation(None, None))
    done = teacher((pixels - 100.) / 50., Normalisation((100., ) * 3,
                                                        (50., ) * 3))
    assert torch.allclose(raw, done, atol=1e-3)
    assert sizes == [(48, 48)] * 2


DEPTH = dict(
    type='mmseg.DepthEstimator', backbone=seg_vit(out_indices=(0, 1, 2, 3)),
    data_preprocessor=dict(type='mmseg.SegDataPreProcessor'),
    neck=dict(type='mmseg.MultiLevelNeck', in_channels=[32] * 4,
              out_channels=16, scales=[4, 2, 1, 0.5]),
    decode_head=dict(type='mmseg.VPDDepthHead', in_channels=[16] * 4,
                     embed_dim=8, feature_dim=64,
                     num_deconv_filters=(16, 16, 16)),
    test_cfg=dict(mode='whole'))


@pytest.mark.parametrize('kwargs, words', [
    (dict(teacher=dict(model=classifier(classes=7))),
     ['same classes', '5', '7']),
    (dict(teacher=dict(backbone=vit())), ['teacher must be dict(model=']),
    (dict(teacher=dict(model=classifier(), layers=(1, ))),
     ['model.teacher.layers']),
    (dict(teacher=dict(model='vit')), ["teacher.model='vit'", 'a dict']),
    (dict(student=DEPTH), ['student: DepthEstimator', 'no class logits']),
    (dict(teacher=dict(model=DEPTH)), ['teacher.model: DepthEstimator']),
    (dict(student=classifier(head=None)), ['student: ImageClassifier',
                                           'no class logits']),
    (dict(student=vit()), ['student: VisionTransformer']),
    (dict(loss_kd=dict(temperature=0)), ['loss_kd.temperature=0']),
    (dict(loss_kd=dict(temprature=2)), ['loss_kd.temprature',
                                        "'temperature'"]),
    (dict(layers=(1, 3)), ['model.layers', 'LogitKDDistiller']),
    (dict(task_loss_weight=-1), ['task_loss_weight=-1', '0 or more']),
])
def test_bad_input(kwargs, words):
    kwargs = {**dict(student=classifier(), teacher=dict(model=classifier())),
              **kwargs}
    with pytest.raises(ConfigError) as error:
        LogitKDDistiller(**copy.deepcopy(kwargs))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_padding_is_not_compared():
    model = distiller(segmentor(), segmentor(dim=32), task_loss_weight=0)
    found = samples('segmentor')
    found[1].set_metainfo(dict(padding_size=(0, 16, 0, 8)))
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, SIZE, SIZE)
    (logits, padding), student = model.run_teacher(inputs, found), \
        model.run_student(inputs, found)[1]
    loss = model.distill((logits, padding), student)['loss_kd']
    wild = student.clone()
    wild[1, :, 3:], wild[1, :, :, 2:] = 1e3, -1e3
    assert torch.equal(loss, model.distill((logits, padding), wild)['loss_kd'])
    assert not torch.equal(loss, model.distill((logits, None), student)
                           ['loss_kd'])
