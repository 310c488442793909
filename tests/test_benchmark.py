"""The benchmarks measure what they say."""
import json
import sys
from types import SimpleNamespace

import benchmark_growth  # noqa: E402
import benchmark_step  # noqa: E402
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import init_default_scope
from step_cost import (AllocatedMemory, ImageLoading, Step, Steps, count_flops,
                       interleaved, paired_ratio, peak_memory,
                       vision_transformer)
from step_cost import cost
from step_cost.steps import selected_quantile

from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.metrics.norms import outlier_threshold

MIB = 2**18  # float32 numbers in a MiB


@pytest.fixture(autouse=True)
def no_repetition(monkeypatch):
    monkeypatch.setattr(cost, 'SHORTEST', 0.)


@pytest.fixture(scope='module')
def steps():
    init_default_scope('mmpretrain')
    return Steps('vit_t16', 'vit_t16', batch_size=2, size=32)


# -- memory -------------------------------------------------------------------


def test_allocated_memory_by_hand():
    with AllocatedMemory() as memory:
        a = torch.zeros(MIB)
        b = a + 1  # 2 MiB
        view = b.view(2, -1)  # allocates nothing
        view.add_(1)
        del a
        c = b * 2
        del b
        assert memory.now == 3 * 2**20 - 2**20  # view keeps b alive
        del view, c
    assert memory.now == 0 and memory.peak == 2 * 2**20


def test_saved_activations_count_until_the_backward_pass():
    x = torch.ones(MIB, requires_grad=True)
    with AllocatedMemory() as memory:
        y = x.exp()
        z = y.exp().sum()  # both exp keep their result
        del y
        alive = memory.now
        z.backward()
    assert 2 * 2**20 <= alive < 2.1 * 2**20
    assert memory.peak >= alive


def test_peak_memory():
    found = peak_memory(Step(lambda: torch.zeros(64 * MIB).sum()), 'cpu')
    assert 64 * 2**20 <= found['tensors'] < 65 * 2**20
    # of the process where Linux tells: at least most of it
    assert found['process'] == 0 or found['process'] > 32 * 2**20


# -- FLOPs and time -----------------------------------------------------------


@pytest.mark.parametrize('m, n, k', [(3, 4, 5), (7, 1, 2)])
def test_flops_by_hand(m, n, k):
    a, b = torch.randn(m, k, requires_grad=True), torch.randn(k, n)
    assert count_flops(Step(lambda: a @ b)) == 2 * m * n * k
    assert count_flops(Step(lambda: (a @ b).sum().backward())) == \
        4 * m * n * k


def test_flops_of_attention_are_counted():
    q = torch.randn(1, 2, 8, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(Step(lambda: attention(q, q, q))) == \
        2 * (2 * 8 * 8 * 4) * 2


def test_rounds_are_interleaved_and_the_first_two_warm_up():
    calls = []
    times = interleaved({'a': Step(lambda: calls.append('a')),
                         'b': Step(lambda: calls.append('b'))}, 2, 'cpu')
    assert calls == ['a', 'b'] * 4
    assert {name: len(values) for name, values in times.items()} == \
        dict(a=2, b=2)


def test_short_steps_are_timed_many_at_once(monkeypatch):
    clock = [0.]
    monkeypatch.setattr(cost, 'SHORTEST', 0.1)
    monkeypatch.setattr(cost, 'time', SimpleNamespace(
        perf_counter=lambda: clock[0]))

    def step(seconds):
        def run():
            runs.append(seconds)
            clock[0] += seconds
        return Step(run)

    runs = []
    times = interleaved({'long': step(1.), 'short': step(0.03)}, 1, 'cpu')
    assert runs == [1., 0.03] * 2 + [1.] + [0.03] * 4
    assert times == dict(long=[1.], short=[pytest.approx(0.03)])


def test_a_setting_is_left_again():
    events = []

    class Setting:

        def __enter__(self):
            events.append('in')

        def __exit__(self, *_):
            events.append('out')

    interleaved({'a': Step(lambda: events.append('run'), Setting)}, 1, 'cpu')
    assert events == ['in', 'run', 'out'] * 3


def test_ratios_are_of_the_same_round():
    times = dict(a=[2., 20., 2.], b=[1., 10., 4.])
    assert paired_ratio(times, 'a', 'b') == 2


# -- the steps ------------------------------------------------------------------


def test_what_the_steps_compute(steps):
    flops = {name: count_flops(step) for name, step in
             {**steps.parts(), **steps.methods()}.items()}
    assert flops['teacher'] * 3 > flops['student'] > flops['teacher']
    assert flops['FitNet'] > flops['teacher'] + flops['student']
    assert flops['SiNGER'] > flops['SiNGER without L_info'] > flops['FitNet']
    assert flops['SiNGER without L_outlier'] == flops['SiNGER']
    # a block forward, and backward to its input, of 12
    assert flops['SiNGER'] - flops['SiNGER without L_info'] < \
        3 * flops['teacher'] / 12


def test_levers_leave_everything_as_it_was(steps):
    state = {k: v.clone() for k, v in steps.singer.state_dict().items()}
    expected = {name: value.item() for name, value in
                steps.singer.loss(steps.images, None).items()}
    for name, step in steps.levers().items():
        with step.setting():
            step.run()
        found = {name: value.item() for name, value in
                 steps.singer.loss(steps.images, None).items()}
        # the teacher was rounded once
        assert found == pytest.approx(expected, rel=0.05, abs=1e-3), name
    assert all(torch.equal(value, state[key]) for key, value in
               steps.singer.state_dict().items())
    assert steps.singer.refinement.info_fraction == 1
    assert not steps.singer.records
    assert not any(p.requires_grad for p in steps.singer.teacher.parameters())


def test_a_lever_does_what_it_says(steps):
    levers, methods = steps.levers(), steps.methods()
    full = count_flops(methods['SiNGER'])
    half = count_flops(levers['info_fraction=0.5'])
    without = count_flops(methods['SiNGER without L_info'])
    assert half == pytest.approx((full + without) / 2, rel=1e-3)
    assert count_flops(levers['block l+1 checkpointed']) > full
    assert count_flops(levers["official code's order"]) > full


@given(st.integers(2, 50), st.floats(0.01, 0.99), st.integers(0, 99))
def test_selected_quantile(count, quantile, seed):
    norms = torch.rand(3, count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(selected_quantile(norms, quantile),
                               outlier_threshold(norms, quantile))


@pytest.mark.parametrize('name, size, words', [
    ('vit_x16', 224, ["'vit_x16'", 'vit_l16']), ('l16', 224, ["'l16'"]),
    ('vit_l14', 225, ['--size 225', 'multiples of 14']),
    ('vit_l16', 8, ['--size 8'])])
def test_models_that_are_not_known(name, size, words):
    with pytest.raises(ConfigError) as error:
        vision_transformer(name, size)
    assert all(word in str(error.value) for word in words)


# -- the tools ------------------------------------------------------------------


def test_tool(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'step.json'
    monkeypatch.setattr(sys, 'argv', [
        'benchmark_step.py', '--teacher', 'vit_t16', '--student', 'vit_t16',
        '--batch-size', '1', '--size', '32', '--precision', 'bf16',
        '--rounds', '1', '--out', str(path)])
    benchmark_step.main()
    result = json.loads(path.read_text())
    assert {'singer_over_fitnet', 'fitnet_over_floor',
            'memory_singer_over_fitnet',
            'flops_singer_over_fitnet'} <= set(result['ratios'])
    assert all(value > 0 for value in result['ratios'].values())
    assert result['settings']['precision'] == 'bf16'
    assert result['machine']['torch'] == torch.__version__
    seconds, rounds = result['seconds'], result['rounds']
    assert all(seconds[name] == rounds[name][0] for name in seconds)
    assert result['ratios']['singer_over_fitnet'] == pytest.approx(
        seconds['SiNGER'] / seconds['FitNet'])
    assert '| SiNGER |' in capsys.readouterr().out
    assert 'data loading' in seconds and 'SiNGER without both' in seconds


def test_tool_with_all_fast_precisions(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_step, 'fast_precisions',
                        lambda: ['fp32', 'bf16'])
    monkeypatch.setattr(benchmark_step, 'measure',
                        lambda args, bench: dict(precision=bench.precision))
    monkeypatch.setattr(benchmark_step, 'report', str)
    monkeypatch.setattr(sys, 'argv', [
        'benchmark_step.py', '--teacher', 'vit_t16', '--size', '32',
        '--precision', 'fast', '--out', str(tmp_path / 'step.json')])
    benchmark_step.main()
    for precision in ('fp32', 'bf16'):
        result = json.loads((tmp_path / f'step_{precision}.json').read_text())
        assert result['precision'] == precision


def test_tool_with_chosen_steps(tmp_path, monkeypatch):
    path = tmp_path / 'step.json'
    monkeypatch.setattr(sys, 'argv', [
        'benchmark_step.py', '--teacher', 'vit_t16', '--student', 'vit_t16',
        '--batch-size', '2', '--size', '32', '--rounds', '3', '--steps',
        'info_fraction=0.5', '--compile', 'eager', '--out', str(path)])
    benchmark_step.main()
    result = json.loads(path.read_text())
    assert set(result['seconds']) == {
        'teacher', 'student', 'FitNet', 'SiNGER', 'info_fraction=0.5',
        'FitNet, compiled', 'SiNGER, compiled'}
    assert result['flops']['info_fraction=0.5'] < result['flops']['SiNGER']
    low, high = result['quartiles']['SiNGER over FitNet']
    assert low <= result['ratios']['singer_over_fitnet'] <= high


@pytest.mark.parametrize('size', [32, 224])
def test_image_loading(size):
    init_default_scope('mmpretrain')
    pipeline = load_config(benchmark_step.RECIPE
                           ).train_dataloader.dataset.pipeline
    threads = torch.get_num_threads()
    with ImageLoading(pipeline, size) as loading:
        batch = loading.load(3)
    assert torch.get_num_threads() == threads
    assert [image.shape for image in batch['inputs']] == [(3, size, size)] * 3
    assert [image.dtype for image in batch['inputs']] == [torch.uint8] * 3


@pytest.mark.parametrize('args, words', [
    (['--precision', 'tf32'], 'CUDA'), (['--teacher', 'vitl'], "'vitl'"),
    (['--compile', 'induktor'],
     "--compile='induktor'.*Did you mean 'inductor'"),
    (['--teacher', 'vit_t16', '--size', '32', '--steps', 'singer'],
     "--steps='singer'.*Did you mean 'SiNGER'")])
def test_bad_arguments(monkeypatch, args, words):
    monkeypatch.setattr(sys, 'argv', ['benchmark_step.py', *args])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match=words):
        benchmark_step.main()


@pytest.mark.parametrize('tool', [benchmark_step, benchmark_growth])
def test_bad_place_of_output(monkeypatch, tmp_path, tool):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [tool.__name__, '--out', 'gone/a.json'])
    with pytest.raises(ConfigError, match='no folder'):
        tool.main()


def test_exponents():
    values = [1, 2, 4]
    assert benchmark_growth.exponent(values, [3., 12., 48.]) == \
        pytest.approx(2)
    assert benchmark_growth.exponent(values, [3., -1., 48.]) is None


def test_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_growth, 'BASE', dict(
        teacher='vit_t16', student='vit_t16', batch_size=1, size=32))
    monkeypatch.setattr(benchmark_growth, 'AXES', {
        'batch': ('batch_size', (1, 2)), 'depth': ('depth', (4, 8))})
    monkeypatch.setattr(sys, 'argv', [
        'benchmark_growth.py', '--rounds', '1', '--out',
        str(tmp_path / 'growth')])
    benchmark_growth.main()
    growth = json.loads((tmp_path / 'growth.json').read_text())['growth']
    exponents = growth['batch']['exponents']['FLOPs']
    assert all(value == pytest.approx(1, abs=0.01)
               for value in exponents.values())
    # nothing of ours grows with the teacher's depth
    assert growth['depth']['exponents']['FLOPs']['SiNGER beyond FitNet'] == \
        pytest.approx(0, abs=1e-6)
    assert (tmp_path / 'growth.png').stat().st_size > 10_000
