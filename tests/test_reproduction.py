"""The paper's tables: plans, their execution, and reports."""
import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time

import cv2
import pytest
import torch
from reproduction import execute, planted, published, warm
from reproduction.execute import (Record, Resources, Workspace, command_of,
                                  read_metrics, run_jobs)
from reproduction.plan import (Cell, Checkpoint, Column, InWorkDir, Job,
                               Source, Table, all_jobs, ordered)
from reproduction.profiles import DIGITS, FULL, PROFILES
from reproduction.report import (Result, latex, markdown, result_of,
                                 write_report)

import forked
import tiny
from mmsinger.datasets import make_digit_scenes
from mmsinger.errors import ConfigError
from mmsinger.analysis.measure import METRICS, measure
from mmsinger.models import SiNGERDistiller


def tool():
    path = os.path.join(tiny.ROOT, 'tools', 'reproduce.py')
    spec = importlib.util.spec_from_file_location('reproduce', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPRODUCE = tool()
PLANS = [(profile, name) for profile in PROFILES.values()
         for name in (*REPRODUCE.TABLES,
                      *(REPRODUCE.PLANTED if profile is DIGITS else ()))]


def table_of(profile, name, seeds=2, quick=False):
    build = {**REPRODUCE.TABLES, **REPRODUCE.PLANTED}[name]
    return build(profile, range(seeds), quick)


def cells_of(table):
    return [cell for _, cells in table.rows for cell in cells]


# -- plans -------------------------------------------------------------------


@pytest.mark.parametrize('profile, name', PLANS,
                         ids=[f'{p.name}-{n}' for p, n in PLANS])
def test_plan(profile, name):
    table = table_of(profile, name)
    order = [job.name for job in ordered(table.jobs)]
    assert sorted(order) == sorted(table.jobs)
    for job in table.jobs.values():
        assert os.path.isfile(job.config)
        assert os.path.isfile(os.path.join(tiny.ROOT, 'tools', job.tool))
        assert all(order.index(n) < order.index(job.name) for n in job.needs)
        assert job.seed in (0, 1)
        for argument in job.args:
            if isinstance(argument, str) and argument.endswith('.py'):
                assert os.path.isfile(argument)
    used = {source.job for cell in cells_of(table)
            for members in cell.sources for source in members}
    assert used <= set(table.jobs)
    # nothing is run for nothing
    needed = used | {n for job in table.jobs.values() for n in job.needs}
    assert needed == set(table.jobs)


def test_all_published_figures_are_placed():
    found = {name: [[cell.published for cell in cells]
                    for _, cells in table_of(FULL, name).rows]
             for name in REPRODUCE.TABLES}
    figures = {
        '1': [*published.TABLE_1_MODELS.values(),
              *published.TABLE_1_DISTILLED.values()],
        '3': [[value] for value in published.TABLE_3.values()],
        '4': published.TABLE_4.values(), '5a': published.TABLE_5A.values(),
        '5b': published.TABLE_5B.values(), '7': published.TABLE_7.values(),
        '8': published.TABLE_8.values()}
    for name, rows in figures.items():
        assert found[name] == [list(row) for row in rows], name
    assert not any(v for row in found['sweep'] for v in row)
    # one by one, from the paper
    rows = {label: [cell.published for cell in cells]
            for label, cells in table_of(FULL, '1').rows}
    assert rows['ViT-L -> T, SiNGER'][:3] == [70.59, 21.76, 0.9406]
    assert rows['DeiT-III S -> T, ViTKD'][-1] == 45.13


@pytest.mark.parametrize('profile', PROFILES.values(),
                         ids=lambda profile: profile.name)
def test_jobs_are_shared(profile):
    names = [name for p, name in PLANS if p is profile]
    tables = {name: table_of(profile, name) for name in names}
    jobs = all_jobs(tables.values())
    assert len(jobs) < sum(len(t.jobs) for t in tables.values())

    def distilled(name):
        return {j for j in tables[name].jobs if j.endswith('/distil')}

    assert distilled('3') == distilled('7') == distilled('8')
    assert distilled('3') <= distilled('1')
    assert distilled('5b') <= distilled('4')
    if profile is DIGITS:
        assert distilled('planted') & distilled('1')
        assert set(tables['planted'].jobs) <= set(tables['planted_all'].jobs)
    # each seed and each set of options is a run of its own
    settings = [(j.tool, j.args, j.options) for j in jobs.values()
                if j.tool == 'train.py']
    assert len(set(settings)) == len(settings)
    # and the same options are never run under two names
    assert len({(j.config, *map(repr, j.options)) for j in jobs.values()
                if j.tool == 'train.py'}) == len(settings)


def test_two_tables_may_not_mean_different_things_by_a_name():
    first, second = Table('a', '', '', []), Table('b', '', '', [])
    for table, seed in ((first, 0), (second, 1)):
        table.add_job(Job('x', 'train.py', (), 'c.py', seed))
    with pytest.raises(ValueError, match="two different jobs.*'x'"):
        all_jobs([first, second])
    with pytest.raises(ValueError, match='r: 1 cells for 0 columns'):
        first.add_row('r', [Cell(())])


def test_quick_is_another_set_of_runs_with_the_same_names():
    slow, quick = (table_of(DIGITS, '1', 1, quick).jobs
                   for quick in (False, True))
    assert set(slow) == set(quick)
    assert all('train_cfg.max_iters=4' in job.options
               for job in quick.values() if job.tool == 'train.py')
    assert not any('train_cfg.max_iters=4' in job.options
                   for job in slow.values())


def test_measured_metrics_are_those_that_are_read():
    """Names in the tables against what tools/measure.py writes."""
    model = SiNGERDistiller(
        student=tiny.vit(), task_loss_weight=0, layers=(1, 3),
        teacher=dict(backbone=tiny.vit()))
    model.init_weights()
    model.refinement.init_weights(model.teacher)
    images = [torch.randn(2, 3, 32, 32)]
    metrics = execute._flat(json.loads(json.dumps(
        measure(model, lambda: images, METRICS, jacobian_images=1))))
    profile = dataclasses.replace(DIGITS, layers=(1, 3))
    for name in ('3', '5a', '5b', '7', '8'):
        for cell in cells_of(table_of(profile, name)):
            for source in cell.sources[0]:
                assert source.metric in metrics, (name, source.metric)


def chain(**needs):
    """Jobs by name, each after those it needs."""
    return {name: Job(name, 'ok.py', (InWorkDir(), *map(Checkpoint, needed)),
                      'a.py', 0) for name, needed in needs.items()}


def test_order():
    jobs = chain(c=['a', 'b'], b=['a'], a=[], d=['c'])
    assert [job.name for job in ordered(jobs)] == ['a', 'b', 'c', 'd']
    with pytest.raises(ConfigError, match='b needs z'):
        ordered(chain(b=['z']))
    with pytest.raises(ConfigError, match='need each other'):
        ordered(chain(a=['b'], b=['a']))


# -- execution ---------------------------------------------------------------

# What stands in for tools: the work dir comes first
TOOLS = dict(
    ok='''
import json, os, sys, time
work_dir, *needed = sys.argv[1:]
assert all(os.path.isfile(path) for path in needed), needed
begin = time.time()
time.sleep(float(os.environ.get('SLEEP', 0)))
with open(os.path.join(work_dir, 'runs.txt'), 'a') as file:
    file.write(json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), begin,
                           time.time()]) + '\\n')
for name in ('iter_4.pth', 'iter_4_student.pth'):
    open(os.path.join(work_dir, name), 'w').close()
with open(os.path.join(work_dir, 'last_checkpoint'), 'w') as file:
    file.write('/elsewhere/iter_4.pth')
with open(os.path.join(work_dir, 'metrics.json'), 'w') as file:
    json.dump(dict(value=len(needed), part=dict(x=1.5)), file)
''',
    bad='''
print('so far so good')
try:
    {}['first']
except KeyError:
    raise ValueError('no such thing')
''',
    says='import sys; print("ready"); sys.exit("Error: was refused")',
    once='''
import os, sys, time
runs = os.path.join(sys.argv[1], 'runs.txt')
with open(runs, 'a') as file:
    file.write(f'{os.getpid()}\\n')
if len(open(runs).readlines()) == 1:
    time.sleep(100)
''')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with such tools, and a config."""
    for name, content in TOOLS.items():
        (tmp_path / f'{name}.py').write_text(content)
    (tmp_path / 'base.py').write_text('value = 1\n')
    (tmp_path / 'a.py').write_text("_base_ = ['base.py']\n")
    monkeypatch.setattr(execute, 'tools', lambda: str(tmp_path))
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(jobs, root='root', resources=None, **kwargs):
    lines = []
    records = run_jobs(jobs, Workspace(root), resources or Resources(2),
                       say=lines.append, **kwargs)
    return records, lines


def states(jobs, root='root'):
    workspace = Workspace(root)  # nothing cached
    return {name: workspace.state(job, jobs) for name, job in jobs.items()}


def test_run_and_skip(place):
    jobs = chain(a=[], b=['a'], c=['a', 'b'])
    assert set(states(jobs).values()) == {'new'}
    records, lines = run(jobs)
    assert states(jobs) == dict.fromkeys('abc', 'finished')
    assert '0 are finished, 3 to run' in lines[0]
    assert re.search(r'\[3/3\] finished c \(\d+ s\)', lines[-1])
    assert records['c'].metrics == {'value': 2., 'part/x': 1.5}
    assert records['c'].config == 'a.py'
    assert records['c'].log == os.path.join('root', 'c', 'output.txt')
    assert records['c'].command.endswith(
        'root/c root/a/iter_4.pth root/b/iter_4.pth')

    again, lines = run(jobs)
    assert lines == ['3 jobs: 3 are finished, 0 to run']
    assert again == records
    assert len((place / 'root/c/runs.txt').read_text().splitlines()) == 1


def test_students_checkpoint_and_options(place):
    workspace = Workspace('root')
    job = Job('b', 'ok.py', ('a.py', InWorkDir('x/y.json'), Checkpoint(
        'a', student=True)), 'a.py', 0, ('k=1', Checkpoint('a', key='m.t=')))
    assert job.needs == ['a']
    # a plan, before the other has run
    assert workspace.arguments(job) == [
        'a.py', 'root/b/x/y.json', 'root/a/LAST_student.pth',
        '--cfg-options', 'k=1', 'm.t=root/a/LAST.pth']
    run(chain(a=[]))
    assert workspace.arguments(job)[2:] == [
        'root/a/iter_4_student.pth', '--cfg-options', 'k=1',
        'm.t=root/a/iter_4.pth']


def test_outdated(place):
    jobs = chain(a=[], b=['a'])
    jobs['other'] = dataclasses.replace(jobs['a'], name='other',
                                        config='base.py')
    (place / 'b.py').write_text('value = 1\n')
    jobs['other'] = dataclasses.replace(jobs['other'], config='b.py')
    run(jobs)
    (place / 'base.py').write_text('value = 2\n')  # a base of a.py
    assert states(jobs) == dict(a='outdated', b='outdated', other='finished')
    run(jobs)
    assert states(jobs) == dict.fromkeys(jobs, 'finished')
    # what was there is kept beside
    assert (place / 'root/a.old1/metrics.json').exists()
    assert len((place / 'root/a/runs.txt').read_text().splitlines()) == 1
    # an upstream job's command alone
    changed = {**jobs, 'a': dataclasses.replace(jobs['a'], options=('x=1', ))}
    assert states(changed) == dict(a='outdated', b='outdated',
                                   other='finished')


def test_what_was_made_of_results_that_are_gone_is_made_anew(place):
    jobs = chain(a=[], b=['a'], other=[])
    run(jobs)
    shutil.rmtree(place / 'root/a')
    assert states(jobs) == dict(a='new', b='outdated', other='finished')
    run({'a': jobs['a']})  # stopped before b
    assert states(jobs) == dict(a='finished', b='outdated', other='finished')
    run(jobs)
    assert states(jobs) == dict.fromkeys(jobs, 'finished')
    assert (place / 'root/b.old1').exists()
    assert len((place / 'root/b/runs.txt').read_text().splitlines()) == 1


def test_a_config_may_move(place):
    jobs = chain(a=[])
    jobs['a'] = dataclasses.replace(
        jobs['a'], args=(*jobs['a'].args, 'source.py'))
    (place / 'source.py').write_text('mean = 1\n')
    before = Workspace('root').fingerprint(jobs['a'], jobs)
    moved = place / 'elsewhere'
    moved.mkdir()
    for name in ('a.py', 'base.py', 'source.py'):
        shutil.copy(place / name, moved / name)

    def at(arg):
        return str(moved / arg) if str(arg).endswith('.py') else arg

    there = dataclasses.replace(jobs['a'], config=str(moved / 'a.py'),
                                args=tuple(map(at, jobs['a'].args)))
    assert Workspace('root').fingerprint(there, {'a': there}) == before


def test_outdated_by_the_evaluated_config(place):
    """A linear evaluation names its source among the arguments."""
    jobs = chain(a=[])
    (place / 'source.py').write_text('mean = 1\n')
    jobs['a'] = dataclasses.replace(
        jobs['a'], args=(*jobs['a'].args, 'source.py'))
    before = Workspace('root').fingerprint(jobs['a'], jobs)
    assert Workspace('root').fingerprint(jobs['a'], jobs) == before
    (place / 'source.py').write_text('mean = 2\n')
    assert Workspace('root').fingerprint(jobs['a'], jobs) != before


def test_root_that_is_no_folder(place):
    (place / 'file').write_text('')
    with pytest.raises(ConfigError, match="--root 'file'"):
        with Workspace('file').lock():
            pass


def test_damaged_record_is_none(place):
    jobs = chain(a=[])
    run(jobs)
    (place / 'root/a/job.json').write_text('{"status": "fini')
    assert states(jobs) == dict(a='new')
    (place / 'root/a/job.json').write_text('{"status": "finished"}')
    assert states(jobs) == dict(a='new')


@pytest.mark.parametrize('tool, words', [
    ('bad.py', 'ValueError: no such thing (exit code 1)'),
    ('says.py', 'Error: was refused (exit code 1)'),
    ('missing.py', 'FileNotFoundError')])
def test_failures(place, tool, words):
    """They stop what needs them, and nothing else."""
    jobs = chain(a=[], bad=[], needs_bad=['bad'], needs_that=['needs_bad'],
                 b=['a'])
    jobs['bad'] = dataclasses.replace(jobs['bad'], tool=tool)
    records, lines = run(jobs)
    assert {n for n, r in records.items() if r.status == 'finished'} == \
        {'a', 'b'}
    assert words in records['bad'].error
    assert records['needs_bad'].error == 'not run: bad failed'
    assert records['needs_that'].error == 'not run: needs_bad failed'
    assert any(line.startswith('[') and 'failed bad' in line and words in line
               for line in lines)
    assert states(jobs)['bad'] == 'failed'
    assert states(jobs)['needs_bad'] == 'new'
    # mended, it is run again, with those that wait for it
    (place / tool).write_text(TOOLS['ok'])
    records, lines = run(jobs)
    assert '2 are finished, 3 to run' in lines[0]
    assert states(jobs) == dict.fromkeys(jobs, 'finished')


def test_errors_of_several_processes(tmp_path):
    output = tmp_path / 'output.txt'
    output.write_text(
        '2026-01-01 INFO no Error here\n[rank0]: Traceback\n'
        '[rank0]:   File "x.py"\n[rank0]: mmsinger.errors.ConfigError: bad\n'
        'torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n'
        '=====\nRoot Cause (first observed failure):\n')
    assert execute._last_error(str(output), 1) == \
        'mmsinger.errors.ConfigError: bad (exit code 1)'
    output.write_text('')
    assert execute._last_error(str(output), -9) == \
        'it wrote nothing (exit code -9)'


def wait_for(path, seconds=240):
    deadline = time.monotonic() + seconds
    while not (os.path.exists(path) and open(path).read().endswith('\n')):
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return int(open(path).readlines()[-1])


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    return False


# Runs the jobs of this test in a process that can be killed
DRIVER = '''
import signal
import sys
sys.path[:0] = [{tests!r}]
from reproduction import execute, warm
from reproduction.plan import InWorkDir, Job
warm.LIBRARIES[:] = ['torch', 'yapf.yapflib.yapf_api']
execute.tools = lambda: {place!r}
if __name__ == '__main__':
    # A shell's background job ignores it, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    workspace = execute.Workspace('root')
    with workspace.lock():
        execute.run_jobs(
            dict(a=Job('a', 'once.py', (InWorkDir(), ), 'a.py', 0)),
            workspace, execute.Resources(1))
'''


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_a_killed_driver_leaves_nothing_running_and_goes_on(place, number):
    jobs = dict(a=Job('a', 'once.py', (InWorkDir(), ), 'a.py', 0))
    (place / 'drive.py').write_text(DRIVER.format(
        tests=tiny.TESTS, place=str(place)))
    driver = warm.start([str(place / 'drive.py')], str(place / 'log.txt'),
                        True)
    pid = wait_for(place / 'root/a/runs.txt')
    assert states(jobs) == dict(a='interrupted')
    with pytest.raises(ConfigError, match="'root' is in use.*--root"):
        with Workspace('root').lock():
            pass
    os.kill(driver.pid, number)
    driver.join()
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert states(jobs) == dict(a='interrupted')
    with Workspace('root').lock():
        run(jobs)
    assert states(jobs) == dict(a='finished')
    # in the same work dir, where a training resumes
    assert len((place / 'root/a/runs.txt').read_text().splitlines()) == 2


def test_a_killed_job_is_run_again(place):
    jobs = dict(a=Job('a', 'once.py', (InWorkDir(), ), 'a.py', 0))

    def kill(line):
        if line.startswith('start'):
            os.kill(wait_for('root/a/runs.txt'), signal.SIGKILL)

    records = run_jobs(jobs, Workspace('root'), Resources(1), say=kill)
    assert records['a'].status == 'failed'
    assert records['a'].error == 'it wrote nothing (exit code -9)'
    run(jobs)
    assert states(jobs) == dict(a='finished')
    assert len((place / 'root/a/runs.txt').read_text().splitlines()) == 2


# -- GPUs and clusters -------------------------------------------------------


@pytest.mark.parametrize('jobs, gpus, each, slots', [
    (2, '', 1, [(), ()]),
    (3, '012', 1, [('0', ), ('1', ), ('2', )]),
    (2, '0123', 2, [('0', '1'), ('2', '3')]),
    (2, '01234', 2, [('0', '1'), ('2', '3')]),
    (4, '01', 1, [('0', ), ('1', ), ('0', ), ('1', )]),  # asked for
])
def test_slots(jobs, gpus, each, slots):
    assert Resources(jobs, tuple(gpus), each).slots() == slots


def test_too_few_gpus():
    with pytest.raises(ConfigError, match='--gpus-per-job 3: there are only '
                       r'2 GPUs \(0, 1\)'):
        Resources(1, ('0', '1'), 3).slots()


@pytest.mark.parametrize('count, gpus', [(2, '23'), (3, '23')])
def test_jobs_do_not_meet_on_a_gpu(place, monkeypatch, count, gpus):
    """Unless more jobs than GPUs are asked for."""
    monkeypatch.setattr(execute, '_environment', lambda resources, gpus: {
        **environment(resources, gpus), 'SLEEP': '0.4'})
    jobs = chain(**{name: [] for name in 'abcdef'})
    run(jobs, resources=Resources(count, tuple(gpus)))
    spans = [json.loads((place / 'root' / name / 'runs.txt').read_text())
             for name in jobs]
    assert {gpu for gpu, _, _ in spans} == set(gpus)
    met = [a[0] for i, a in enumerate(spans) for b in spans[:i]
           if a[0] == b[0] and a[1] < b[2] and b[1] < a[2]]
    assert bool(met) == (count > len(gpus))


environment = execute._environment


def test_threads_are_shared_between_jobs():
    cores = len(os.sched_getaffinity(0))
    assert environment(Resources(1), ()) == dict(
        CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS=str(cores))
    assert environment(Resources(2 * cores, ('4', )), ('4', )) == dict(
        CUDA_VISIBLE_DEVICES='4', OMP_NUM_THREADS='1')
    assert environment(Resources(2, srun='-p x'), ()) == {}


def test_gpus_are_reserved(place):
    with Resources(1, ('0', '1')).reserve():
        with pytest.raises(ConfigError, match='GPU 1 is in use.*--gpus'):
            with Resources(1, ('1', '2')).reserve():
                pass
        with Resources(1, ('2', )).reserve():
            pass
        with Resources(1, ('1', ), srun='').reserve():
            pass  # slurm deals them out
    with Resources(1, ('1', )).reserve():
        pass


def test_commands():
    python = sys.executable
    script, measures = '/t/train.py', '/t/measure.py'
    arguments = ['c.py', '--work-dir', 'x y']
    assert command_of(script, arguments, Resources(1, ('0', )), ('0', )) == \
        [python, script, *arguments]
    assert command_of(script, arguments, Resources(1, ('0', '1'), 2),
                      ('0', '1')) == [
        python, '-m', 'torch.distributed.run', '--standalone',
        '--nproc_per_node=2', script, *arguments, '--launcher', 'pytorch']
    slurm = Resources(1, srun="-p 'my gpus' --ntasks=8")
    assert command_of(script, arguments, slurm, ()) == [
        'srun', '-p', 'my gpus', '--ntasks=8', python, '-u', script,
        *arguments, '--launcher', 'slurm']
    # what runs in one process only
    assert command_of(measures, arguments, Resources(1, ('0', '1'), 2),
                      ('0', '1')) == [python, measures, *arguments]
    assert command_of(measures, arguments, slurm, ()) == [
        'srun', '-p', 'my gpus', '--ntasks=8', '--ntasks=1', python, '-u',
        measures, *arguments]


def test_every_tool_has_a_launcher_or_runs_alone():
    tools = {job.tool for profile, name in PLANS
             for job in table_of(profile, name, 1).jobs.values()}
    for name in tools:
        with open(os.path.join(tiny.ROOT, 'tools', name)) as file:
            assert ("'--launcher'" in file.read()) == \
                (name not in execute.SINGLE), name


# -- metrics -----------------------------------------------------------------


def test_metrics_of_logs(tmp_path):
    """The last value wins, within a run and over resumed ones."""
    first, second = (tmp_path / f'2026010{day}_000000' for day in (1, 2))
    for folder, lines in (
            (second, ['{"mIoU": 30.5, "step": 4}']),
            (first, ['{"loss": 2.0, "step": 1, "time": 0.1}',
                     '{"loss": 1.0, "step": 2}', '{"mIoU": 10.0, "step": 2}',
                     '{"accuracy/top1": 50, "name": "x", "ok": true}',
                     '{"trunca'])):
        (folder / 'vis_data').mkdir(parents=True)
        (folder / 'vis_data/scalars.json').write_text('\n'.join(lines))
    # tools/test.py writes here
    (second / '20260102_000000.json').write_text('{"aAcc": 90.0}')
    (second / 'vis_data' / 'config.json').write_text('{"lr": 1.0}')
    assert read_metrics(str(tmp_path)) == {
        'loss': 1., 'step': 4., 'time': .1, 'mIoU': 30.5,
        'accuracy/top1': 50., 'aAcc': 90.}
    (tmp_path / 'metrics.json').write_text(
        '{"gram": {"5": {"mean": 2, "median": null}}, "mIoU": 31}')
    found = read_metrics(str(tmp_path))
    assert found['gram/5/mean'] == 2. and found['mIoU'] == 31.
    assert 'gram/5/median' not in found
    assert read_metrics(str(tmp_path / 'nowhere')) == {}


# -- reports -----------------------------------------------------------------


def record(status='finished', error='', **metrics):
    return Record(status, 'f', 'command', 'configs/x.py', 3, 'abc123+',
                  'logs/a_b.log', 1., metrics, error)


def cell(*jobs, value=None, scale=1.):
    """A source is 'job'; a seed's members are joined by +."""
    return Cell(tuple(tuple(Source(name, 'm', scale)
                            for name in seed.split('+')) for seed in jobs),
                value)


RECORDS = dict(a=record(m=1.), b=record(m=3.), c=record(m=6.),
               bad=record('failed', 'Error: | broken\nbadly'),
               other=record(n=1.), runs=record('running', m=9.))


@pytest.mark.parametrize('sources, mean, std, missing', [
    (['a'], 1., None, ''),
    (['a', 'b'], 2., 2**0.5, ''),
    (['a+b', 'c'], 4., 8**0.5, ''),        # members first, then seeds
    (['a+b+c'], 10 / 3, None, ''),
    (['a', 'bad'], 1., None, 'failed'),
    (['a', 'new', 'b'], 2., 2**0.5, 'not run'),
    (['a+bad', 'c'], 6., None, 'failed'),  # a seed has all its members
    (['new', 'bad'], None, None, 'failed'),
    (['other'], None, None, 'not logged'),
    (['runs'], None, None, 'not run'),
    ([], None, None, ''),
])
def test_results(sources, mean, std, missing):
    result = result_of(cell(*sources), RECORDS)
    assert result.mean == pytest.approx(mean)
    assert result.std == pytest.approx(std)
    assert result.missing == missing
    assert len(result.values) == len(sources)


def test_scale():
    assert result_of(cell('a', 'b', scale=100.), RECORDS).mean == 200.


@pytest.fixture
def report_table():
    table = Table('t', 'A_title & more', '25 % of {x} -> y', [
        Column('up'), Column('down', higher_is_better=False, digits=3),
        Column('neither', higher_is_better=None)])
    table.add_row('first', [cell('a', 'b', value=1.25),
                            cell('c', value=6.5), cell('bad', value=2.)])
    table.add_row('second', [cell('a', 'bad'), cell('new', value=3.), Cell(
        ())])
    table.add_row('third', [Cell((), 7.), cell('other'), cell('a+b')])
    return table


def test_markdown(report_table):
    text = markdown(report_table, RECORDS)
    lines = text.splitlines()
    assert '| | up ↑ | down ↓ | neither |' in lines
    assert ('| first | 1.25 / **2.00 ± 1.41** (+0.75) | 6.500 / **6.000** '
            '(-0.500) | 2.00 / failed |') in lines
    assert ('| second | **1.00** (n = 1; others failed) | 3.000 / not run |  '
            '|') in lines
    assert '| third | 7.00 | not logged | **2.00** |' in lines
    assert '- `bad`: Error: | broken badly' in lines
    # each figure: run, config, seed, commit, log
    for row, column, job in (
            ('first', 'up', 'a'), ('first', 'up', 'b'), ('first', 'down', 'c'),
            ('first', 'neither', 'bad'), ('second', 'up', 'a'),
            ('third', 'neither', 'a'), ('third', 'neither', 'b')):
        assert (f'| {row} | {column} | `{job}` | `configs/x.py` | 3 | '
                'abc123+ | `logs/a_b.log` |') in lines
    assert not any('`new`' in line for line in lines)
    report_table.conclude = lambda results: [
        f'up is {results["first", "up"].mean}']
    assert 'up is 2.0' in markdown(report_table, RECORDS).splitlines()


def test_markdown_without_published_figures():
    table = Table('t', 'T', 'C', [Column('x')])
    table.add_row('r', [cell('a')])
    assert 'published' not in markdown(table, RECORDS)


def test_files(report_table, tmp_path):
    paths = write_report(report_table, RECORDS, str(tmp_path / 'reports'))
    assert [os.path.basename(p) for p in paths] == [
        't.md', 't.csv', 't.tex', 't.png']
    with open(paths[1], newline='') as file:
        lines = list(csv.DictReader(file))
    assert [(r['row'], r['column'], r['run']) for r in lines] == [
        (label, column.title, source.job) for label, cells
        in report_table.rows for c, column in zip(cells, report_table.columns)
        for members in c.sources for source in members]
    first, second, third = lines[:3]
    assert float(first['measured']) == 2. and first['seeds'] == '2'
    assert float(first['std']) == pytest.approx(2**0.5)
    assert float(first['difference']) == 0.75
    assert (first['value'], second['value']) == ('1.0', '3.0')
    assert float(third['difference']) == -0.5 and third['std'] == ''
    assert first['commit'] == 'abc123+' and first['log'] == 'logs/a_b.log'
    missing, = [r for r in lines if r['run'] == 'new']
    assert missing['status'] == missing['missing'] == 'not run'
    assert missing['measured'] == missing['difference'] == ''
    picture = cv2.imread(paths[3])
    assert picture.shape[0] > 200 and picture.shape[1] > 400
    colours = {tuple(int(c[i:i + 2], 16) for i in (5, 3, 1))
               for c in ('#0072B2', '#D55E00')}
    for colour in colours:  # both are painted
        assert (picture == colour).all(axis=-1).sum() > 20


def test_plot_of_nothing(tmp_path):
    table = Table('t', 'T', 'C', [Column('x')])
    table.add_row('r', [cell('new')])
    for path in write_report(table, {}, str(tmp_path)):
        assert os.path.getsize(path) > 20


def test_latex(report_table):
    text = latex(report_table, RECORDS)
    assert r'\caption{A\_title \& more. 25 \% of \{x\} $\rightarrow$ y}' \
        in text
    assert r'\begin{tabular}{lccc}' in text
    assert r'first & 1.25 / 2.00 $\pm$ 1.41 (+0.75) & ' in text
    assert '*' not in text
    report_table.title = '\\ ^ ~ $ # < >'
    assert (r'\caption{\textbackslash{} \^{} \textasciitilde{} \$ \# '
            r'\textless{} \textgreater{}') in latex(report_table, RECORDS)
    rows = [line for line in text.splitlines() if line.endswith(r'\\')]
    assert all(len(re.findall(r'(?<!\\)&', row)) == 3 for row in rows)


# -- what the planted benchmark says -----------------------------------------


def verdict(fitnet, singer, own=(90., 89.5), clean=(80., 79.)):
    """Of accuracies by seed; None: not measured."""

    def result(values):
        values = values if isinstance(values, list) else [values]
        done = [v for v in values if v is not None]
        return Result(sum(done) / len(done) if done else None, None, values,
                      '' if len(done) == len(values) else 'failed')

    row, column = planted.row, planted.TASKS[0][0].title
    return ' '.join(planted.conclude({
        (row('teacher', 'clean'), planted.OWN.title): result(own[0]),
        (row('teacher', 'direction'), planted.OWN.title): result(own[1]),
        (row('fitnet', 'clean'), column): result(clean[0]),
        (row('singer', 'clean'), column): result(clean[1]),
        (row('fitnet', 'direction'), column): result(fitnet),
        (row('singer', 'direction'), column): result(singer),
    }, ['clean', 'direction']))


def test_all_bars_met():
    text = verdict([70., 72.], [77., 78.])
    for words in ('0.50 points (met: at most 1)', 'FitNet 9.0 (met: at least '
                  '4)', 'in 2 of 2 seeds (met', 'recovers 72 % of the loss '
                  '(met: at least 60 %)', 'SiNGER -1.0 points against FitNet '
                  '(met: at least -2)'):
        assert words in text, text
    assert 'not met' not in text


@pytest.mark.parametrize('arguments, words', [
    (dict(fitnet=[70.], singer=[74.]), 'recovers 40 % of the loss '
     '(**not met**'),
    (dict(fitnet=[70., 72.], singer=[86., 71.]), 'in 1 of 2 seeds '
     '(**not met**'),
    (dict(fitnet=[70.], singer=[79.], own=(90., 88.)), '2.00 points '
     '(**not met**'),
    (dict(fitnet=[70.], singer=[79.], clean=(80., 77.)), 'SiNGER -3.0 points '
     'against FitNet (**not met**'),
])
def test_bars_not_met(arguments, words):
    text = verdict(**arguments)
    assert words in text and text.count('not met') == 1


def test_inconclusive():
    text = verdict([77.], [79.])
    assert 'FitNet 3.0 (**not met**: at least 4)' in text
    assert 'Inconclusive' in text and 'recovers' not in text


@pytest.mark.parametrize('arguments', [
    dict(fitnet=[70., None], singer=[77., 78.]),
    dict(fitnet=[70., 71.], singer=[None, None]),
    dict(fitnet=[70.], singer=[77.], own=(None, 89.)),
])
def test_incomplete(arguments):
    text = verdict(**arguments)
    assert '3 %, one direction: incomplete' in text
    assert 'recovers' not in text and 'seeds (' not in text
    assert 'SiNGER -1.0 points' in text


def test_incomplete_clean():
    text = verdict([70.], [77.], clean=(80., None))
    assert 'Clean teacher: incomplete' in text
    assert 'recovers 70 %' in text


# -- the tool ----------------------------------------------------------------


def arguments(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *args])
    return REPRODUCE.parse_args()


def test_all_stands_for_the_papers_tables(monkeypatch):
    tables = REPRODUCE.chosen_tables(arguments(
        monkeypatch, 'sweep', 'all', 'planted', '--profile', 'digits'))
    names = [table.name for table in tables]
    assert names[0] == 'sweep' and names[-1] == 'planted'
    assert len(set(names)) == len(names) == len(REPRODUCE.TABLES) + 1


@pytest.mark.parametrize('args, words', [
    (['all', '9'], ["table='9'"]),
    (['9'], ["table='9'", "'5a'", "'all'"]),
    (['plantd', '--profile', 'digits'], ["Did you mean 'planted'"]),
    (['planted'], ["'planted' needs --profile digits"]),
    (['1', '--profile', 'digit'], ["'digit'", "Did you mean 'digits'"]),
    (['1', '--quick'], ['--quick', '--profile digits']),
    (['1', '--seeds', '0'], ['--seeds 0', 'at least 1']),
])
def test_errors_of_tables(monkeypatch, args, words):
    with pytest.raises(ConfigError) as error:
        REPRODUCE.chosen_tables(arguments(monkeypatch, *args))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('args, words', [
    (['1', '--gpus', '0,7'], ['--gpus 0,7', '0, 1, 2']),
    (['1', '--gpus', '0,0'], ['--gpus 0,0', 'each once']),
    (['1', '--gpus', '0,'], ['--gpus 0,']),
    (['1', '--jobs', '0'], ['--jobs', 'at least 1']),
    (['1', '--gpus-per-job', '0'], ['--gpus-per-job', 'at least 1']),
])
def test_errors_of_resources(monkeypatch, args, words):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    with pytest.raises(ConfigError) as error:
        REPRODUCE.resources_of(arguments(monkeypatch, *args))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('visible, count, args, expected', [
    (None, 3, [], (3, ('0', '1', '2'), 1)),
    (None, 3, ['--gpus', '2,0'], (2, ('2', '0'), 1)),
    (None, 4, ['--gpus-per-job', '2'], (2, ('0', '1', '2', '3'), 2)),
    (None, 2, ['--jobs', '4'], (4, ('0', '1'), 1)),
    ('5,GPU-ab', 2, [], (2, ('5', 'GPU-ab'), 1)),  # by the names given
    ('5,6', 2, ['--gpus', '6'], (1, ('6', ), 1)),
    ('', 0, [], (1, (), 1)),
    (None, 2, ['--srun', '-p x', '--jobs', '9'], (9, (), 1)),
])
def test_resources(monkeypatch, visible, count, args, expected):
    monkeypatch.setattr(REPRODUCE.shutil, 'which', lambda name: name)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    found = REPRODUCE.resources_of(arguments(monkeypatch, '1', *args))
    assert (found.jobs, found.gpus, found.gpus_per_job) == expected


@pytest.mark.parametrize('args, words', [
    (['--srun', '-p x'], ['--srun', 'no command srun']),
    (['--gpus-per-job', '2'], ['--gpus-per-job 2', 'no GPU']),
])
def test_resources_that_are_not_there(monkeypatch, args, words):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(REPRODUCE.shutil, 'which', lambda name: None)
    with pytest.raises(ConfigError) as error:
        REPRODUCE.resources_of(arguments(monkeypatch, '1', *args))
    assert all(word in str(error.value) for word in words)


def test_report_of_a_root_that_is_not_there(monkeypatch, tmp_path):
    (tmp_path / 'root').mkdir()
    monkeypatch.setattr(sys, 'argv', [
        'reproduce.py', '3', '--profile', 'digits', '--report-only',
        '--root', str(tmp_path / 'rot')])
    with pytest.raises(ConfigError, match="Did you mean 'root'"):
        REPRODUCE.main()
    assert not (tmp_path / 'rot').exists()


def test_one_job_a_core_on_the_cpu(monkeypatch):
    found = REPRODUCE.resources_of(arguments(monkeypatch, '1', '--profile',
                                             'digits'))
    assert found.jobs == len(os.sched_getaffinity(0)) and not found.gpus


def test_tables_are_made_once(monkeypatch):
    tables = REPRODUCE.chosen_tables(arguments(monkeypatch, '3', '5a', '3'))
    assert [t.name for t in tables] == ['table3', 'table5a']
    tables = REPRODUCE.chosen_tables(arguments(monkeypatch, 'all'))
    assert len(tables) == len(REPRODUCE.TABLES)


def test_dry_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, 'argv', [
        'reproduce.py', '3', '--profile', 'digits', '--dry-run', '--root',
        str(tmp_path / 'root')])
    REPRODUCE.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == '2 jobs, 0 finished'
    assert lines[0] == 'new         singer_vitl_to_vits/seed0/distil'
    assert lines[1].split()[0] == 'train.py'
    assert 'randomness.seed=0' in lines[1]
    assert not os.path.exists(tmp_path / 'root')


def test_end_to_end(tmp_path, monkeypatch, capsys):
    """Two tables of two distillations; then nothing is left to do."""
    make_digit_scenes(str(tmp_path / 'data/digit_scenes'), num_train=40,
                      num_val=12)
    args = ['3', '5a', '--profile', 'digits', '--quick', '--root', 'root']
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *args])
    monkeypatch.chdir(tmp_path)
    # in this process, whose server of warm processes runs already
    handler = signal.getsignal(signal.SIGTERM)
    try:
        REPRODUCE.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    shown = capsys.readouterr().out
    assert '5 jobs: 0 are finished, 5 to run' in shown
    rows = {}
    for name in ('table3', 'table5a'):
        with open(tmp_path / f'root/{name}.csv', newline='') as file:
            rows[name] = list(csv.DictReader(file))
        assert all(row['status'] == 'finished' and row['measured']
                   for row in rows[name])
        for extension in ('md', 'tex', 'png'):
            assert os.path.getsize(tmp_path / f'root/{name}.{extension}')
    assert len(rows['table3']) == 2 and len(rows['table5a']) == 16
    assert all(0.5 < float(row['measured']) <= 1 for row in rows['table3'])
    safe = {row['row']: float(row['measured']) for row in rows['table5a']
            if row['column'] == 'E_safe'}
    # four steps from its start, which shows
    assert safe['up-projection, layer 2, nullspace start'] > 0.9
    assert safe['up-projection, layer 2, random start'] < 0.5
    for row in rows['table3']:
        assert os.path.isfile(tmp_path / row['log'])

    again = forked.run('reproduce.py', *args, cwd=tmp_path)
    assert '5 jobs: 5 are finished, 0 to run' in again.stdout
    assert 'start' not in again.stdout
