"""What makes a step cheaper must not make it another step."""
import copy

import pytest
import torch
from mmengine.config import Config
from torch.utils._python_dispatch import TorchDispatchMode

from mmsinger.engine.prepare import compile_blocks_alone
from mmsinger.errors import ConfigError
from mmsinger.engine.loading import load_distiller
from mmsinger.models import FitNetDistiller, SiNGERDistiller
from mmsinger.models.adapters import linearised_ffn
from mmsinger.models.targets.refine import choose_images
from tiny import seg_vit, timm_vit, vit

TEACHERS = dict(mmpretrain=vit(), mmseg=seg_vit(),
                timm=timm_vit('vit_tiny_patch16_224'), beit=vit('BEiTViT'),
                eva02=vit('ViTEVA02'),
                swiglu=vit(layer_cfgs=dict(ffn_type='swiglu_fused')))


def distiller(cls=SiNGERDistiller, teacher=TEACHERS['mmpretrain'], **kwargs):
    torch.manual_seed(0)
    model = cls(
        student=dict(type='mmpretrain.ImageClassifier', backbone=vit()),
        teacher=dict(backbone=teacher, layers=(1, 3)), task_loss_weight=0,
        **kwargs)
    model.init_weights()
    model.train()
    return model


def losses(model, images):
    return {name: value.item()
            for name, value in model.loss(images, None).items()}


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32,
                       generator=torch.Generator().manual_seed(1))


# -- the teacher in its own precision ----------------------------------------


@pytest.mark.parametrize('name', TEACHERS)
def test_teacher_in_bf16(name, images):
    model = distiller(teacher=TEACHERS[name], teacher_dtype='bf16')
    floats = [p for p in model.teacher.parameters() if p.is_floating_point()]
    assert all(p.dtype == torch.bfloat16 for p in floats)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    taps = model.run_teacher(images)
    for layer in model.tapped_teacher_layers:
        assert taps.tokens(layer).values.dtype == torch.float32
    total = sum(model.loss(images, None).values())
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters()
               if p.requires_grad)
    assert all(a.up.grad.abs().sum() > 0 for a in model.adapters.values())
    full = losses(distiller(teacher=TEACHERS[name]), images)
    for key, value in losses(model, images).items():
        assert value == pytest.approx(full[key], rel=0.2, abs=2e-4), key


def test_teacher_keeps_its_precision_under_autocast(images):
    """float16 in and out: neither the student's autocast nor its dtype
    changes what the teacher computes."""
    model = distiller(teacher_dtype='bf16')
    alone = model.run_teacher(images).tokens(3).values
    with torch.autocast('cpu', torch.float16):
        inside = model.run_teacher(images)
        again = inside.next_block(1, inside.tokens(1)).values
    assert torch.equal(alone, inside.tokens(3).values)
    assert torch.equal(again, inside.tokens(2).values)


def test_nullspace_of_a_bf16_teacher_is_that_of_its_full_weights():
    rounded, full = distiller(teacher_dtype='bf16'), distiller()
    for layer in full.layers:
        for ours, theirs in zip(rounded.adapters[str(layer)].parameters(),
                                full.adapters[str(layer)].parameters()):
            assert torch.equal(ours, theirs)
    # … which rounding would have changed
    block = rounded.teacher.blocks.modules[2]
    assert not torch.equal(linearised_ffn(block),
                           linearised_ffn(full.teacher.blocks.modules[2]))


def test_loading_again_starts_from_full_precision():
    model = distiller(teacher_dtype='bf16')
    model.init_weights()
    assert next(model.teacher.parameters()).dtype == torch.bfloat16


def test_measuring_casts_the_teacher_too(tmp_path, images):
    cfg = Config(dict(
        default_scope='mmpretrain', model=dict(
            type='mmsinger.SiNGERDistiller', task_loss_weight=0,
            teacher_dtype='bf16',
            student=dict(type='mmpretrain.ImageClassifier', backbone=vit()),
            teacher=dict(backbone=vit(), layers=(1, 3)))))
    path = str(tmp_path / 'run.pth')
    torch.save(dict(state_dict=distiller().state_dict()), path)
    model = load_distiller(cfg, path)
    assert next(model.teacher.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize('dtype', ['bf61', 'fp16'])
def test_unknown_precision(dtype):
    with pytest.raises(ConfigError,
                       match=f"teacher_dtype='{dtype}'.*'bf16'"):
        distiller(teacher_dtype=dtype)


# -- L_info on a share of the batch ------------------------------------------


@pytest.mark.parametrize('batch', range(1, 9))
@pytest.mark.parametrize('fraction', [0.1, 0.25, 0.5, 0.75, 1.0])
def test_every_image_is_as_likely(batch, fraction):
    count = max(1, round(batch * fraction))
    torch.manual_seed(0)
    drawn = torch.zeros(batch)
    for _ in range(200 * batch):
        chosen = torch.cat([torch.arange(batch)[part] for part
                            in choose_images(batch, fraction)])
        assert len(set(chosen.tolist())) == len(chosen) == count
        drawn[chosen] += 1
    expected = 200 * count
    # 5 standard deviations of a binomial of 200 batch draws
    assert (drawn - expected).abs().max() <= 5 * (200 * count)**0.5


@pytest.mark.parametrize('last', ['self', 'previous'])
def test_info_loss_of_a_share_is_unbiased(images, last):
    """Its mean over all draws is L_info of the whole batch, the gradient's
    too."""
    whole = distiller(loss_info=dict(last=last))
    share = distiller(loss_info=dict(last=last), info_fraction=0.5)

    def info(model):
        model.zero_grad()
        loss = model.loss(images, None)['distill.loss_info']
        loss.backward()
        return loss.item(), model.adapters['1'].up.grad.clone()

    expected, gradient = info(whole)
    starts = {}
    for seed in range(60):
        torch.manual_seed(seed)
        start = int(torch.randint(4, ()))
        if start not in starts:
            torch.manual_seed(seed)
            starts[start] = info(share)
    assert len(starts) == 4
    values, gradients = zip(*starts.values())
    assert len(set(values)) > 1
    assert sum(values) / 4 == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.stack(gradients).mean(dim=0), gradient,
                               rtol=1e-4, atol=1e-8)


def test_the_block_runs_for_the_share_alone(images):
    model = distiller(info_fraction=0.5)
    seen = []
    model.teacher.blocks.modules[2].register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0])))
    model.loss(images, None)
    assert seen == [4, 2]


def test_no_block_runs_again_without_info_loss(images):
    model = distiller(loss_info=dict(loss_weight=0))
    seen = []
    model.teacher.blocks.modules[2].register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0])))
    assert model.loss(images, None)['distill.loss_info'] == 0
    assert seen == [4]


def test_the_whole_batch_draws_nothing(images):
    state = torch.get_rng_state()
    choose_images(4, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('value', [0, -0.1, 1.1, True, 'half'])
def test_bad_fraction(value):
    with pytest.raises(ConfigError, match='info_fraction=.*at most 1'):
        distiller(info_fraction=value)


# -- compilation --------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize('name', TEACHERS)
def test_compiled_blocks(name, images, dynamo):
    """No graph break in any family, and the same numbers."""
    plain = distiller(teacher=TEACHERS[name])
    model = distiller(teacher=TEACHERS[name],
                      compile=dict(backend='eager', fullgraph=True))
    expected = losses(plain, images)
    assert losses(model, images) == pytest.approx(expected, rel=1e-5)
    sum(model.loss(images, None).values()).backward()
    assert not dynamo['graph_break']
    assert dynamo['stats']['unique_graphs'] >= 2  # teacher and student
    # teacher, student, and the teacher's block again with gradients: blocks
    # of one class share their graphs
    assert dynamo['stats']['unique_graphs'] <= 4
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_copy_of_compiled_blocks_runs_its_own_weights(images, dynamo):
    model = distiller(compile=dict(backend='eager'))
    model.loss(images, None)
    copied = copy.deepcopy(model.student)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(images)[0].abs().sum() == 0
    assert model.student(images)[0].abs().sum() > 0


def test_mmengines_compile_goes_to_the_blocks():
    cfg = Config(dict(model=dict(type='mmsinger.SiNGERDistiller'),
                      compile=dict(mode='default')))
    compile_blocks_alone(cfg)
    assert cfg.model.compile == dict(mode='default') and 'compile' not in cfg
    for model, value in (('mmsinger.SiNGERDistiller', False),
                         ('mmsinger.LogitKDDistiller', True),
                         ('mmpretrain.ImageClassifier', True)):
        cfg = Config(dict(model=dict(type=model), compile=value))
        compile_blocks_alone(cfg)
        assert cfg.compile == value and 'compile' not in cfg.model


# -- nothing waits for the device ---------------------------------------------


class Waits(TorchDispatchMode):
    """Operators that bring a value from the device, or whose shapes depend
    on one."""

    NAMES = ('_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero',
             'equal', 'unique', '_unique2', 'item')

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES or (name == 'index' and any(
                i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('kwargs', [
    {}, dict(teacher_dtype='bf16'), dict(target_norm='layernorm'),
    dict(gate=dict(mad=8.0), cap=True), dict(cls=FitNetDistiller),
    dict(targets=[dict(type='mmsinger.ClipNorms', mad=6.0),
                  dict(type='mmsinger.ClipNorms', quantile=0.95)]),
    dict(cls=FitNetDistiller, targets=[
        dict(type='mmsinger.MaskTokens', mad=6.0),
        dict(type='mmsinger.Refine')])], ids=str)
def test_a_step_never_waits_for_the_device(images, kwargs):
    model = distiller(**kwargs)
    if model.needs_calibration:
        model.calibrate([images])
        model.loss(images, None)  # looks once whether that was done
    with Waits() as waits:
        sum(model.loss(images, None).values()).backward()
    assert waits.found == []


def test_the_watch_sees_what_waits():
    with Waits() as waits:
        x = torch.ones(3)
        x[x > 0]
        x.sum().item()
    assert len(waits.found) == 2
