"""What a GPU might do otherwise: precision, order, memory, waiting.

    CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py

Tests that need a GPU are skipped without one; the others run on a CPU too.
"""
import contextlib
import os

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from step_cost import AllocatedMemory, Steps, peak_memory
from tiny import vit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsinger.models import FitNetDistiller, SiNGERDistiller

# Read when CUDA starts: without it, matrix products are not repeatable
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
needs_cuda = pytest.mark.skipif(not CUDA, reason='needs a GPU')

METHODS = {
    'FitNet': dict(cls=FitNetDistiller),
    'SiNGER': dict(),
    'two grids': dict(teacher=dict(backbone=vit(img_size=64), input_size=64)),
    'half of L_info': dict(info_fraction=0.5),
    'gate and cap': dict(gate=dict(mad=8.0), cap=True),
    'filters': dict(targets=[
        dict(type='mmsinger.ClipNorms', mad=6.0),
        dict(type='mmsinger.ClipNorms', quantile=0.95)]),
    'masked, refined': dict(cls=FitNetDistiller, targets=[
        dict(type='mmsinger.MaskTokens', mad=6.0),
        dict(type='mmsinger.Refine', gate=dict(mad=8.0))]),
    'robust preset': dict(
        cls=FitNetDistiller,
        teacher=dict(backbone=dict(
            type='mmsinger.PlantedArtifacts', backbone=vit(), after=0,
            share=0.2, norm=(20., 30.))),
        targets=[dict(type='mmsinger.RemoveOutlierSubspace', inside=True)]),
}


def distiller(cls=SiNGERDistiller, teacher=dict(backbone=vit()), **kwargs):
    torch.manual_seed(0)
    model = cls(
        student=dict(type='mmpretrain.ImageClassifier', backbone=vit()),
        teacher=dict(teacher, layers=(1, 3)), task_loss_weight=0, **kwargs)
    model.init_weights()
    if model.needs_calibration:
        model.calibrate(images(64).cpu().split(16))
    return model.train().to(DEVICE)


def images(count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator).to(DEVICE)


def step(model, optimizer, inputs):
    """A training step as mmengine's, without clipping, which reads the norm
    of the gradient."""
    losses = model.loss(inputs, None)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return losses


# -- precision ----------------------------------------------------------------


def losses_and_gradient(model, inputs, dtype=None):
    """Losses, and the gradient of all parameters as one vector."""
    model.zero_grad()
    with torch.autocast(DEVICE, dtype or torch.bfloat16,
                        enabled=dtype is not None):
        losses = model.loss(inputs, None)
    scale = 1024  # as a loss scale, for the range of float16
    (scale * sum(losses.values())).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()
                          if p.grad is not None]) / scale
    return {name: loss.item() for name, loss in losses.items()}, gradient


@pytest.fixture(scope='module')
def steps():
    """ViT-S to ViT-T, in float32."""
    init_default_scope('mmpretrain')
    size = 224 if CUDA else 64
    return Steps('vit_s16', 'vit_t16', batch_size=4, size=size, device=DEVICE)


@pytest.mark.parametrize('dtype, bound', [
    (torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str)
@pytest.mark.parametrize('method', ['fitnet', 'singer'])
def test_mixed_precision(steps, method, dtype, bound, record_property):
    """Losses and the gradient differ from float32's by less than 3 %
    (bfloat16) or 0.5 % (float16): a few roundings, which are 0.4 % and
    0.05 %."""
    model = getattr(steps, method)
    exact, exact_gradient = losses_and_gradient(model, steps.images)
    losses, gradient = losses_and_gradient(model, steps.images, dtype)
    errors = {name: abs(losses[name] / exact[name] - 1) for name in exact}
    errors['gradient'] = float((gradient - exact_gradient).norm() /
                               exact_gradient.norm())
    for name, error in errors.items():
        record_property(name, f'{error:.2g}')
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize('dtype', [
    pytest.param('float16', marks=needs_cuda), 'bfloat16'])
def test_training_in_mixed_precision(dtype):
    """With clipping and, on a GPU, mmengine's loss scale."""
    model = distiller()
    wrapper = build_optim_wrapper(model, dict(
        type='AmpOptimWrapper' if CUDA else 'mmsinger.CPUAmpOptimWrapper',
        dtype=dtype, clip_grad=dict(max_norm=1.0),
        optimizer=dict(type='AdamW', lr=1e-3)))
    before = {name: p.detach().clone()
              for name, p in model.named_parameters()}
    data = dict(inputs=images(), data_samples=None)
    logs = [model.train_step(data, wrapper) for _ in range(20)]
    assert logs[-1]['loss'] < logs[0]['loss']
    moved = {name.split('.')[0] for name, p in model.named_parameters()
             if not torch.equal(p, before[name])}
    assert {'student', 'projectors', 'adapters'} <= moved


# -- the same again -----------------------------------------------------------


@pytest.fixture
def deterministic():
    """``randomness.deterministic=True``: torch raises an error where it has
    no repeatable algorithm."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('method', METHODS)
def test_steps_are_repeatable(deterministic, method):
    states = []
    for _ in range(2):
        model = distiller(**METHODS[method])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(2)
        for _ in range(3):
            step(model, optimizer, images())
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name])
               for name, value in states[0].items())


# -- memory -------------------------------------------------------------------


@needs_cuda
def test_memory_beside_fitnet(record_property):
    """SiNGER needs at most 1.15 times the memory of FitNet, weights included
    (the target of docs/cost.md)."""
    init_default_scope('mmpretrain')
    steps = Steps('vit_b16', 'vit_t16', batch_size=16, size=224, device='cuda')
    methods, weights = steps.methods(), steps.weight_bytes
    needed = {name: weights[name] + peak_memory(methods[name], 'cuda')[
        'process'] for name in ('FitNet', 'SiNGER')}
    ratio = needed['SiNGER'] / needed['FitNet']
    record_property('SiNGER over FitNet', f'{ratio:.3f}')
    assert ratio <= 1.15


def test_memory_of_tensors_beside_fitnet(monkeypatch):
    """The same of the tensors that steps make, which have no values."""
    init_default_scope('mmpretrain')
    steps = Steps('vit_b16', 'vit_t16', batch_size=1, size=224)
    monkeypatch.setattr(
        torch, 'autocast', lambda *_, **__: contextlib.nullcontext())
    inputs = torch.empty(16, 3, 224, 224, device='meta')
    models = dict(FitNet=steps.fitnet, SiNGER=steps.singer)
    needed = steps.weight_bytes
    for model in models.values():  # they share the teacher
        model.to('meta')
    for name, model in models.items():
        with AllocatedMemory() as memory:
            step(model, torch.optim.SGD(model.parameters()), inputs)
        needed[name] += memory.peak
    assert needed['SiNGER'] <= 1.15 * needed['FitNet']


# -- nothing waits for the device ---------------------------------------------


@needs_cuda
@pytest.mark.parametrize('method', METHODS)
def test_a_step_never_waits_for_the_gpu(method):
    model, inputs = distiller(**METHODS[method]), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, inputs)  # what is done once
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(model, optimizer, inputs)
    finally:
        torch.cuda.set_sync_debug_mode('default')


class Transfers(TorchDispatchMode):
    """Operators between the CPU and a device that has no values, ``meta``:
    each would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves(
            (args, kwargs, output)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            self.found.append(str(func))
        return output


@pytest.mark.parametrize('method', METHODS)
def test_a_step_moves_nothing_between_devices(monkeypatch, method):
    """Nor reads a value, which a tensor without any refuses."""
    model = distiller(**METHODS[method])
    model.loss(images(), None)  # what is done once
    model, inputs = model.to('meta'), images().to('meta')
    monkeypatch.setattr(  # torch has none for this device
        torch, 'autocast', lambda *_, **__: contextlib.nullcontext())
    model.loss(inputs, None)  # what is done once on a device
    with Transfers() as transfers:
        losses = model.loss(inputs, None)
        sum(losses.values()).backward()
    assert transfers.found == []


def test_transfers_are_seen():
    with Transfers() as transfers:
        torch.tensor([1.]).to('meta') + torch.ones((), device='meta')
    assert len(transfers.found) == 1
