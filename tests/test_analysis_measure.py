"""The numbers of a distiller, against their definitions; tools/measure.py."""
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import init_default_scope

import forked
import tiny
from mmsinger.analysis.measure import (METRICS, applicable_metrics,
                                       check_metrics, measure)
from mmsinger.analysis.nullspace import distilled_null_directions
from mmsinger.engine.loading import ImageBatches
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.metrics.jacobian import random_signs
from mmsinger.models import FitNetDistiller, SiNGERDistiller, ViTKDDistiller
from mmsinger.models.adapters import (left_nullspace, left_singular_directions,
                                      linearised_ffn)
from mmsinger.models.features.taps import BlockTaps

STUDENT = tiny.vit(arch=dict(embed_dims=16, num_layers=2, num_heads=2,
                             feedforward_channels=32))
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def distiller(cls=SiNGERDistiller, target_norm=None, **kwargs):
    """A small one with random weights, as after some training."""
    torch.manual_seed(0)
    if cls is SiNGERDistiller:
        kwargs.setdefault('adapter', dict(rank=4))
    if cls is not ViTKDDistiller:
        kwargs.setdefault('layers', (1, 3))
    model = cls(teacher=dict(backbone=tiny.vit()), task_loss_weight=0,
                target_norm=target_norm, **{'student': STUDENT, **kwargs})
    with torch.no_grad():
        for parameter in (*model.teacher.parameters(),
                          *model.student.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
        if cls is SiNGERDistiller:
            model.refinement.init_weights(model.teacher)
            for parameter in model.adapters.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if target_norm == 'standardise':
        model.calibrate([IMAGES])
    return model


def batches(size=2):
    return lambda: iter(IMAGES.split(size))


@pytest.fixture(scope='module', params=[None, 'standardise'])
def case(request):
    """A distiller, its results, and raw teacher tokens of all layers."""
    model = distiller(target_norm=request.param)
    results = measure(model, batches(), METRICS, seed=3, jacobian_images=2)
    with torch.no_grad(), BlockTaps(model.teacher.blocks, range(4)) as taps:
        taps.run(model.teacher.backbone, IMAGES)
    return model, results, [taps.tokens(i).values for i in range(4)]


def normalise(model, layer, values):
    norm = model.target_norms[str(layer)]
    return values if norm.mode is None else (values - norm.centre) / norm.scale


def refine(model, layer, values):
    """F_hat in raw and in the method's space, CLS untouched."""
    adapter = model.adapters[str(layer)]
    values = normalise(model, layer, values)
    change = values @ adapter.down @ adapter.up
    change[:, 0] = 0
    refined = values + change
    norm = model.target_norms[str(layer)]
    raw = refined if norm.mode is None else refined * norm.scale + norm.centre
    return raw, refined


def spread(values):
    return {'mean': pytest.approx(values.mean().item(), abs=1e-4),
            'std': pytest.approx(values.std(correction=0).item(), abs=1e-3)}


def mean_cosine(a, b):
    a, b = a[:, 1:], b[:, 1:]
    return ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean(dim=1)


@torch.no_grad()
def test_cosine(case):
    model, results, tokens = case
    raw, refined = refine(model, 1, tokens[1])
    following = model.teacher.blocks.modules[2](raw)
    assert results['cosine'] == {
        '1': dict(
            refined=spread(mean_cosine(
                normalise(model, 1, tokens[1]), refined)),
            next_block=spread(mean_cosine(
                normalise(model, 2, tokens[2]),
                normalise(model, 2, following)))),
        '3': dict(refined=spread(mean_cosine(
            normalise(model, 3, tokens[3]), refine(model, 3, tokens[3])[1])))}
    assert results['cosine']['1']['next_block']['mean'] < 0.999


def gram_distances(a, b):
    def gram(values):
        unit = values[:, 1:] / values[:, 1:].norm(dim=-1, keepdim=True)
        return torch.einsum('bid,bjd->bij', unit, unit)

    return (gram(a) - gram(b)).square().sum(dim=(1, 2)).sqrt()


@torch.no_grad()
def test_gram(case):
    model, results, tokens = case
    backbone, student = model.student, []
    handles = [layer.register_forward_hook(
        lambda module, args, output: student.append(output))
        for layer in backbone.layers]
    backbone(IMAGES)
    for handle in handles:
        handle.remove()
    assert model.student_layers == [0, 1]
    for layer, own in zip((1, 3), student):
        teacher = normalise(model, layer, tokens[layer])
        projector = model.projectors[str(layer)]
        assert results['gram'][str(layer)] == dict(
            teacher_refined=spread(gram_distances(
                teacher, refine(model, layer, tokens[layer])[1])),
            teacher_student=spread(gram_distances(teacher, own)),
            teacher_projected=spread(gram_distances(
                teacher, own @ projector.weight.T + projector.bias)))


def test_nullspace(case):
    model, results, _ = case
    for layer, block in ((1, 2), (3, 3)):
        weight = linearised_ffn(model.teacher.blocks.modules[block])
        u = torch.linalg.svd(weight)[0]
        adapter = model.adapters[str(layer)]
        found = results['nullspace'][str(layer)]
        assert found['block'] == block and found['rank'] == 4
        for name, rows in (('up', adapter.up), ('down', adapter.down.T)):
            energy = (rows.detach().double() @ u).square().sum(dim=0)
            assert found[name] == dict(
                e_prob=pytest.approx((energy[:8].sum() / energy.sum()).item()),
                e_safe=pytest.approx((energy[-8:].sum() / energy.sum()
                                      ).item()))
            assert found[name]['e_safe'] > found['random']['e_safe']


@torch.no_grad()
def test_inflation_is_of_raw_patch_tokens_of_every_block(case):
    model, results, tokens = case
    inflation = results['inflation']
    assert list(inflation) == ['0', '1', '2', '3', 'all']
    ratios = []
    for i in (1, 2, 3):
        block = model.teacher.blocks.modules[i]
        before = tokens[i - 1]
        middle = before + block.attn(block.ln1(before))
        growth = (middle.norm(dim=-1) / before.norm(dim=-1) - 1)[:, 1:]
        ratios.append(growth.flatten())
        assert inflation[str(i)]['delta_sa'] == dict(
            mean=pytest.approx(growth.mean().item(), abs=1e-5),
            median=pytest.approx(growth.quantile(0.5).item(), abs=1e-5),
            p95=pytest.approx(growth.quantile(0.95).item(), abs=1e-5))
    means = [inflation[str(i)]['g_ffn1']['mean'] for i in range(4)]
    assert inflation['all']['g_ffn1']['mean'] == pytest.approx(sum(means) / 4)


@torch.no_grad()
def test_deviation(case):
    model, results, tokens = case
    assert list(results['deviation']) == ['1']  # the last has no next block
    assert results['deviation']['1']['block'] == 2
    directions = distilled_null_directions(model, batches()(), 2, seed=3)[1]
    generator = torch.Generator().manual_seed(3)
    draws = torch.cat([torch.randn(len(b), 16, 4, generator=generator)
                       for b in batches()()])
    norm = model.target_norms['1']
    values = normalise(model, 1, tokens[1])
    original = normalise(model, 2, tokens[2])[:, 1:]
    for name, rows in zip(('ours', 'jacobian', 'random'), directions):
        step = draws / draws.norm(dim=-1, keepdim=True) @ rows.float()
        moved = values.clone()
        moved[:, 1:] += 0.3 * values[:, 1:].norm(dim=-1, keepdim=True) * step
        if norm.mode is not None:
            moved = moved * norm.scale + norm.centre
        output = normalise(
            model, 2, model.teacher.blocks.modules[2](moved))[:, 1:]
        relative = (output - original).flatten(1).norm(dim=1) / \
            original.flatten(1).norm(dim=1)
        found = results['deviation']['1'][name]
        assert found['relative_l2'] == spread(relative)
        assert 0 < found['cosine']['mean'] < 1 and 0 < found['cka']['mean'] < 1


def test_null_directions_by_dense_matrices(case):
    model, _, tokens = case
    directions = distilled_null_directions(model, batches()(), 2, seed=3)[1]
    block = model.teacher.blocks.modules[2]
    expected = left_nullspace(left_singular_directions(
        linearised_ffn(block)), 4).basis
    assert torch.allclose(directions.ffn.T @ directions.ffn,
                          expected.T @ expected, atol=1e-9)
    gramian = 0
    for i in range(2):  # 17 tokens of 32 channels; column: one patch channel
        dense = torch.autograd.functional.jacobian(
            block, tokens[1][i:i + 1], vectorize=True)[0, :, :, 0, 1:]
        response = torch.einsum(
            'jdpe,p->jde', dense, random_signs(1, 16, 3 + i)[0])
        gramian = gramian + torch.einsum('jde,jdf->ef', response, response)
    gramian = gramian.double() / 16 / 2
    smallest = torch.linalg.eigvalsh(gramian)[:4]
    found = directions.jacobian
    assert torch.allclose((found @ gramian * found).sum(dim=1), smallest,
                          rtol=1e-3)
    # what each estimate is best at
    visible = {name: (rows @ gramian * rows).sum().item()
               for name, rows in directions._asdict().items()}
    assert visible['jacobian'] == min(visible.values())
    unseen = {name: (rows @ linearised_ffn(block)).square().sum().item()
              for name, rows in directions._asdict().items()}
    assert unseen['ffn'] == min(unseen.values())


def test_batches_do_not_matter(case):
    model, results, _ = case
    metrics = ['cosine', 'gram', 'inflation']
    again = measure(model, batches(size=5), metrics, seed=3)
    assert list(again) == metrics

    def same(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                same(a[key], b[key])
        else:
            assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)

    for name in metrics:
        same(again[name], results[name])


def test_unrefined_tokens_are_themselves():
    """gain 0: an adapter that does nothing."""
    model = distiller(adapter=dict(rank=4, gain=0.))
    results = measure(model, batches(), ['cosine', 'gram'])
    for name in ('refined', 'next_block'):
        assert results['cosine']['1'][name]['mean'] == pytest.approx(1)
    assert results['gram']['1']['teacher_refined']['mean'] == \
        pytest.approx(0, abs=1e-4)


def test_grids_and_prefixes_that_differ():
    """A student of 8 x 8 patches without CLS, a teacher of 4 x 4 with."""
    model = distiller(student=dict(STUDENT, patch_size=4, out_type='featmap',
                                   with_cls_token=False))
    results = measure(model, batches(), METRICS, jacobian_images=1)
    for values in results['gram']['1'].values():
        assert 0 < values['mean'] < 2 * 16


def test_a_gate_refines_outliers_alone():
    """Other methods' refinement is theirs, not the adapter's."""
    gated = distiller(gate=dict(mad=1e6), cap=True)
    results = measure(gated, batches(), ['cosine'])
    assert results['cosine']['1']['refined']['mean'] == pytest.approx(1)


@pytest.mark.parametrize('cls', [FitNetDistiller, ViTKDDistiller])
def test_metrics_without_adapters(cls):
    model = distiller(cls)
    assert applicable_metrics(model) == ['gram', 'inflation']
    results = measure(model, batches(), ['gram', 'inflation'])
    assert set(results['gram']['3']) == {'teacher_student',
                                         'teacher_projected'}
    for name in ('nullspace', 'cosine', 'deviation'):
        with pytest.raises(ConfigError, match=f'--metrics {name}: '
                           f'{cls.__name__} refines nothing.*gram, inflation'
                           '.*SiNGER'):
            check_metrics(model, ['gram', name])


def test_deviation_needs_a_next_block():
    model = distiller(layers=(3, ))
    assert 'deviation' not in applicable_metrics(model)
    with pytest.raises(ConfigError, match=r'layers=\[3\] has only the last'):
        measure(model, batches(), ['deviation'])


def test_bad_arguments():
    model = distiller()
    with pytest.raises(ConfigError, match="'grams'.*Did you mean 'gram'"):
        measure(model, batches(), ['grams'])
    for metric in ('cosine', 'deviation'):
        with pytest.raises(ConfigError, match='no images'):
            measure(model, lambda: iter([]), [metric])
    with pytest.raises(ConfigError, match='jacobian-images=0'):
        measure(model, batches(), ['deviation'], jacobian_images=0)


# -- tools/measure.py --------------------------------------------------------


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with data, a FitNet recipe and a trained SiNGER checkpoint."""
    folder = tiny.workplace(tmp_path_factory.mktemp('place'))
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.model.type = 'mmsinger.FitNetDistiller'
    for key in ('adapter', 'loss_outlier', 'loss_info', 'last_layer'):
        cfg.model.pop(key, None)
    with open(os.path.join(folder, 'fitnet.py'), 'w') as file:
        file.write(f'cfg = {cfg.to_dict()!r}\nglobals().update(cfg)\n'
                   'del cfg\n')
    forked.run('train.py', tiny.SEG_CONFIG, '--work-dir', 'run',
               '--no-validate', '--cfg-options', 'train_cfg.max_iters=2',
               'model.target_norm=standardise', cwd=folder)
    return folder


def run(place, *args, check=True):
    return forked.run('measure.py', *args, cwd=place, check=check)


def test_the_choice_of_a_recipes_images_is_seeded(place, monkeypatch):
    monkeypatch.chdir(place)
    init_default_scope('mmseg')
    cfg = load_config(tiny.SEG_CONFIG)
    cfg.val_dataloader = None

    def chosen(seed, count=4):
        return ImageBatches(cfg, SimpleNamespace(data_preprocessor=None),
                            count, seed).indices

    everything = chosen(0, 1000)
    assert chosen(1) == chosen(1) != chosen(2)
    assert sorted(everything) == list(range(len(everything))) != everything
    assert len(set(chosen(1))) == 4 < len(everything)


@pytest.fixture(scope='module')
def measured(place):
    result = run(place, tiny.SEG_CONFIG, 'run/iter_2.pth', '--images', '6',
                 '--jacobian-images', '1', '--out', 'singer.json',
                 '--cfg-options', 'model.target_norm=standardise')
    with open(os.path.join(place, 'singer.json')) as file:
        return json.load(file), result.stdout


def test_tool_on_a_training_checkpoint(measured):
    content, output = measured
    assert list(content) == ['meta', *METRICS]
    meta = content['meta']
    assert meta['method'] == 'SiNGERDistiller' and meta['images'] == 6
    assert meta['layers'] == [1, 3] and meta['source'] == 'val_dataloader'
    assert meta['checkpoint'] == 'run/iter_2.pth' and meta['seed'] == 0
    assert meta['target_norm'] == 'standardise'
    assert meta['versions']['torch'] == torch.__version__
    for table in ('Table 5a', 'Table 3', 'Table 5b', 'Table 7', 'Table 8'):
        assert table in output
    cosine = content['cosine']['1']['refined']
    assert f"{cosine['mean']:.4f} +- {cosine['std']:.4f}" in output


def test_tool_reads_the_checkpoint(place, measured):
    """Training has moved adapters and student: other numbers than at the
    start, which are the same in each run."""
    starts = []
    for name in ('a.json', 'b.json'):
        run(place, tiny.SEG_CONFIG, '--images', '6', '--out', name,
            '--metrics', 'gram', 'nullspace', '--cfg-options',
            'model.target_norm=standardise')
        with open(os.path.join(place, name)) as file:
            starts.append(json.load(file))
    start, again = starts
    assert start == again and start['meta']['checkpoint'] is None
    trained, _ = measured
    assert set(start) == {'meta', 'gram', 'nullspace'}
    assert start['nullspace']['1']['up']['e_safe'] == pytest.approx(1)
    assert trained['nullspace']['1']['up']['e_safe'] < 1 - 1e-7
    assert start['gram'] != trained['gram']


def test_tool_on_fitnet_without_validation_data(place):
    result = run(place, 'fitnet.py', '--images', '100', '--cfg-options',
                 'val_dataloader=None')
    with open(os.path.join(place, 'metrics.json')) as file:
        content = json.load(file)
    assert list(content) == ['meta', 'gram', 'inflation']
    assert content['meta']['source'] == 'train_dataloader'
    assert content['meta']['images'] == 8  # all there are
    assert '8 images of train_dataloader' in result.stdout


@pytest.mark.parametrize('args, message', [
    (['fitnet.py', '--metrics', 'cosine'],
     '--metrics cosine: FitNetDistiller refines nothing'),
    (['fitnet.py', 'run/iter_2.pth'], 'unexpected keys'),
    ([tiny.SEG_CONFIG, '--cfg-options', 'model.type='
      'mmsinger.LogitKDDistiller'], 'model.adapter: LogitKDDistiller has no'),
    ([tiny.SEG_CONFIG, 'run/iter_2_student.pth'], 'missing keys'),
    ([tiny.SEG_CONFIG, 'gone.pth'], "checkpoint='gone.pth': no such file"),
    ([tiny.SEG_CONFIG, '--out', 'no/where.json'], "--out='no/where.json'"),
    ([tiny.SEG_CONFIG, '--cfg-options', 'val_dataloader=None',
      'train_dataloader=None'], 'no val_dataloader and no train_dataloader'),
    ([os.path.join(tiny.ROOT, 'configs', 'demo', 'digits_student.py')],
     "is no distiller of mmsinger's that compares block outputs"),
])
def test_bad_input(place, args, message):
    result = run(place, *args, check=False)
    assert result.returncode == 1
    assert message in result.stdout
    assert 'Traceback' not in result.stdout
