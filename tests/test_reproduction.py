"""The paper's tables: plans, their execution, and reports."""
import collections
import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import cv2
import pytest
import torch
from make_digit_scenes import make_digit_scenes
from mmengine.config import DictAction
from mmengine.registry import init_default_scope
from reproduction import evidence, flow, published
from reproduction import workspace as workspaces
from reproduction.flow import Resources, run_jobs
from reproduction.job import command_of, reserved
from reproduction.plan import (WORK_DIR, Cell, Column, Job, Source, Table,
                               all_jobs, checkpoint, student, wanted_metrics)
from reproduction.profiles import DIGITS, FULL, PHOTOS, PROFILES
from reproduction.report import Report, Result, result_of
from reproduction.workspace import (Record, Workspace, fingerprint, flat,
                                    last_error, read_metrics)

import tiny
from mmsinger.analysis.measure import METRICS, measure
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.models import SiNGERDistiller
from mmsinger.registry import MODELS

needs_snakemake = pytest.mark.skipif(
    importlib.util.find_spec('snakemake') is None,
    reason='Snakemake needs Python 3.11 or newer')


def tool():
    path = os.path.join(tiny.ROOT, 'tools', 'reproduce.py')
    spec = importlib.util.spec_from_file_location('reproduce', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPRODUCE = tool()
PLANS = [(profile, name) for profile in PROFILES.values()
         for name in REPRODUCE.KNOWN[profile.name]]


def table_of(profile, name, seeds=2, quick=False):
    return REPRODUCE.KNOWN[profile.name][name](profile, range(seeds), quick)


def cells_of(table):
    return [cell for _, cells in table.rows for cell in cells]


# -- plans -------------------------------------------------------------------


@pytest.mark.parametrize('profile, name', PLANS,
                         ids=[f'{p.name}-{n}' for p, n in PLANS])
def test_plan(profile, name):
    table = table_of(profile, name)
    order = list(table.jobs)
    for job in table.jobs.values():
        assert os.path.isfile(job.config)
        assert os.path.isfile(os.path.join(tiny.ROOT, 'tools', job.tool))
        assert all(order.index(n) < order.index(job.name) for n in job.needs)
        assert job.seed in (0, 1)
        for argument in job.args:
            if argument.endswith('.py'):
                assert os.path.isfile(argument)
    used = set(wanted_metrics([table]))
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

    if '3' in tables:
        assert distilled('3') == distilled('7') == distilled('8')
        assert distilled('3') <= distilled('1')
        assert distilled('5b') <= distilled('4')
    if profile is DIGITS:
        assert set(tables['evidence_quick'].jobs) <= \
            set(tables['evidence'].jobs)
    # each seed and each set of options is a run of its own
    settings = [(j.tool, j.args, j.options) for j in jobs.values()
                if j.tool == 'train.py']
    assert len(set(settings)) == len(settings)
    # and the same options are never run under two names
    assert len({(j.config, *j.options) for j in jobs.values()
                if j.tool == 'train.py'}) == len(settings)


def test_students_without_a_cls_token_are_compared_by_patches():
    table = table_of(DIGITS, '1', 1)
    rows = dict(table.rows)
    teacher = 'ViT-L (patches)'
    assert teacher in table.caption
    for label in ('S', 'ConvNeXt', 'Swin'):
        for method in ('FitNet', 'SiNGER'):
            sources = [source for cell in
                       rows[f'{teacher} -> {label}, {method}']
                       for source in cell.all_sources]
            outputs = [load_config(table.jobs[s.job].config)
                       .model.backbone.output for s in sources]
            assert set(outputs) == {'mean_patch', 'featmap'}
    assert f'{teacher}, as it is' in rows
    assert not any('patches' in row for row, _ in table_of(FULL, '1').rows)
    assert 'patches' not in table_of(FULL, '1').caption


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
    metrics = flat(json.loads(json.dumps(
        measure(model, lambda: images, METRICS, jacobian_images=1))))
    profile = dataclasses.replace(DIGITS, layers=(1, 3))
    for name in ('3', '5a', '5b', '7', '8'):
        for cell in cells_of(table_of(profile, name)):
            for source in cell.sources[0]:
                assert source.metric in metrics, (name, source.metric)


def test_arguments(tmp_path):
    job = Job('b', 'ok.py', ('a.py', f'{WORK_DIR}/y.json', student('a/x')),
              'a.py', 0, ('k=1', f'm.t={checkpoint("a/x")}'))
    assert job.needs == ['a/x']
    workspace = Workspace(str(tmp_path), dict(b=job))
    # a plan, before the other has run
    assert workspace.arguments('b') == [
        'a.py', f'{tmp_path}/b/y.json', f'{tmp_path}/a/x/LAST_student.pth',
        '--cfg-options', 'k=1', f'm.t={tmp_path}/a/x/LAST.pth']
    (tmp_path / 'a/x').mkdir(parents=True)
    (tmp_path / 'a/x/last_checkpoint').write_text('/elsewhere/iter_4.pth')
    assert workspace.arguments('b')[2:] == [
        f'{tmp_path}/a/x/iter_4_student.pth', '--cfg-options', 'k=1',
        f'm.t={tmp_path}/a/x/iter_4.pth']


def test_fingerprint(tmp_path):
    """What is in the configs counts, not where they are."""
    for name in ('here', 'there'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'base.py').write_text('value = 1\n')
        (tmp_path / name / 'a.py').write_text("_base_ = ['base.py']\n")
        (tmp_path / name / 'source.py').write_text('mean = 1\n')

    def job(folder, **changes):
        folder = tmp_path / folder
        return dataclasses.replace(
            Job('a', 'ok.py', (WORK_DIR, str(folder / 'source.py')),
                str(folder / 'a.py'), 0), **changes)

    first = fingerprint(job('here'))
    assert fingerprint(job('there')) == first
    assert fingerprint(job('here', options=('x=1', ))) != first
    for name in ('base.py', 'source.py'):
        (tmp_path / 'there' / name).write_text('value = 2\n')
        assert fingerprint(job('there')) != first
        shutil.copy(tmp_path / 'here' / name, tmp_path / 'there' / name)


# -- execution ---------------------------------------------------------------

# What stands in for tools: the work dir comes first
TOOLS = dict(
    ok='''
import json, os, sys
work_dir, *needed = sys.argv[1:]
assert all(os.path.isfile(path) for path in needed), needed
with open(os.path.join(work_dir, 'runs.txt'), 'a') as file:
    file.write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')
open(os.path.join(work_dir, 'iter_4.pth'), 'w').close()
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
    (tmp_path / 'b.py').write_text('value = 1\n')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chain(place, tools=None, **needs):
    """Jobs by name, each after those it needs."""
    return {name: Job(name, str(place / (tools or {}).get(name, 'ok.py')),
                      (WORK_DIR, *map(checkpoint, needed)), 'a.py', 0)
            for name, needed in needs.items()}


def runs(place, name):
    """What ok.py and once.py noted in a work dir."""
    return (place / 'root' / name / 'runs.txt').read_text().splitlines()


@needs_snakemake
def test_run_fail_mend_and_skip(place, capfd):
    """Failures stop what needs them, and nothing else."""
    jobs = chain(place, dict(bad='bad.py', says='says.py', gone='gone.py'),
                 a=[], bad=[], says=[], gone=[], needs_bad=['bad'],
                 needs_that=['needs_bad'], b=['a'], lacks=['a'])
    workspace = Workspace('root', jobs, dict(b=['value'], lacks=['nothing']))
    assert workspace.states() == dict.fromkeys(jobs, 'new')
    assert not os.path.exists('root')
    records = run_jobs(workspace, Resources(2))
    shown = capfd.readouterr().out
    assert '8 jobs: 0 are finished, 8 to run' in shown
    assert re.search(r'^finished b \(\d+ s\)$', shown, re.MULTILINE)
    assert re.search(r'^failed bad .*no such thing', shown, re.MULTILINE)
    assert {n for n, r in records.items() if r.status == 'finished'} == \
        {'a', 'b'}
    assert records['bad'].error == 'ValueError: no such thing (exit code 1)'
    assert records['says'].error == 'Error: was refused (exit code 1)'
    assert 'gone.py' in records['gone'].error
    assert records['needs_bad'].error == 'not run: bad failed'
    assert records['needs_that'].error == 'not run: needs_bad failed'
    assert records['lacks'].error == 'its results lack nothing'
    assert records['b'].metrics == {'value': 1., 'part/x': 1.5}
    assert records['b'].log == os.path.join('root', 'b', 'output.txt')
    assert records['b'].command.endswith('root/b root/a/iter_4.pth')
    assert workspace.states() == dict(
        a='finished', b='finished', bad='failed', says='failed',
        gone='failed', lacks='outdated', needs_bad='new',
        needs_that='new')

    for name in ('bad', 'says', 'gone'):
        (place / f'{name}.py').write_text(TOOLS['ok'])
    workspace.metrics['lacks'] = ['value']
    records = run_jobs(workspace, Resources(2, ('3', ), 1))
    assert '2 are finished, 6 to run' in capfd.readouterr().out
    assert {r.status for r in records.values()} == {'finished'}
    assert runs(place, 'needs_that') == ['3'] and runs(place, 'a') == ['']
    # it could not have gone on to its end
    assert runs(place, 'lacks.old1') == [''] and runs(place, 'lacks') == ['3']
    assert run_jobs(workspace, Resources(1)) == records
    assert '8 are finished, 0 to run' in capfd.readouterr().out


@needs_snakemake
def test_what_changed_is_made_anew_with_what_was_made_of_it(place):
    jobs = chain(place, a=[], b=['a'], other=[])
    jobs['other'] = dataclasses.replace(jobs['other'], config='b.py')
    workspace = Workspace('root', jobs)
    run_jobs(workspace, Resources(3))
    (place / 'base.py').write_text('value = 2\n')  # a base of a.py
    assert workspace.states() == dict(a='outdated', b='outdated',
                                      other='finished')
    run_jobs(Workspace('root', dict(a=jobs['a'])), Resources(1))
    assert workspace.states() == dict(a='finished', b='outdated',
                                      other='finished')
    # what was there is kept beside
    assert runs(place, 'a.old1') == runs(place, 'a') == ['']
    shutil.rmtree(place / 'root/a')
    assert workspace.states() == dict(a='new', b='outdated', other='finished')
    run_jobs(workspace, Resources(3))
    assert workspace.states() == dict.fromkeys(jobs, 'finished')
    assert runs(place, 'b.old1') == runs(place, 'b') == ['']
    assert runs(place, 'other') == ['']
    workspace.metrics['other'] = ['another']
    assert workspace.states()['other'] == 'outdated'
    (place / 'root/other/job.json').write_text('{"status": "fini')
    assert workspace.states()['other'] == 'new'
    # nobody knows what it was made of, so that it is not gone on with
    workspace.metrics['other'] = []
    run_jobs(workspace, Resources(1))
    assert runs(place, 'other.old1') == runs(place, 'other') == ['']


@needs_snakemake
def test_figures_that_could_not_be_made_anew_are_no_results(
        place, monkeypatch):
    jobs = chain(place, a=[], b=[])
    workspace = Workspace('root', dict(a=jobs['a']))
    run_jobs(workspace, Resources(1))
    (place / 'base.py').write_text('value = 2\n')
    monkeypatch.setattr(flow, '_run', lambda *_: 1)
    records = run_jobs(Workspace('root', jobs), Resources(1))
    assert {record.status for record in records.values()} == {'failed'}


def test_a_config_is_read_once_for_many_jobs(place, monkeypatch):
    read = []
    monkeypatch.setattr(workspaces, '_config_content',
                        lambda path: read.append(path) or path)
    jobs = chain(place, a=[], b=[], c=[])
    workspace = Workspace(str(place / 'root'), jobs)
    for name in jobs:
        os.makedirs(workspace.work_dir(name))
        workspace.save(name, record())
    workspace.states()
    assert read == ['a.py']


def test_root_that_is_no_folder(place):
    (place / 'file').write_text('')
    with pytest.raises(ConfigError, match="--root 'file'"):
        run_jobs(Workspace('file', chain(place, a=[])), Resources(1))


def test_errors_of_several_processes(tmp_path):
    output = tmp_path / 'output.txt'
    output.write_text(
        '2026-01-01 INFO no Error here\n[rank0]: Traceback\n'
        '[rank0]:   File "x.py"\n[rank0]: mmsinger.errors.ConfigError: bad\n'
        'torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n'
        '=====\nRoot Cause (first observed failure):\n')
    assert last_error(str(output), 1) == \
        'mmsinger.errors.ConfigError: bad (exit code 1)'
    output.write_text('')
    assert last_error(str(output), -9) == 'it wrote nothing (exit code -9)'


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
import sys
sys.path[:0] = [{tools!r}, {place!r}]
import reproduce
from reproduction.flow import Resources, run_jobs
from reproduction.plan import WORK_DIR, Job
from reproduction.workspace import Workspace
reproduce.end_in_order()
run_jobs(Workspace('root', dict(a=Job(
    'a', {place!r} + '/once.py', (WORK_DIR, ), 'a.py', 0))), Resources(1))
'''


@needs_snakemake
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_killed_driver_leaves_nothing_running_and_goes_on(place, number):
    workspace = Workspace('root', chain(place, dict(a='once.py'), a=[]))
    driver = subprocess.Popen([sys.executable, '-c', DRIVER.format(
        tools=os.path.join(tiny.ROOT, 'tools'), place=str(place))],
        env=dict(os.environ, PYTHONPATH=tiny.ROOT))
    pid = wait_for(place / 'root/a/runs.txt')
    with pytest.raises(ConfigError, match="'root' is in use.*--root"):
        run_jobs(workspace, Resources(1))
    driver.send_signal(number)
    driver.wait(60)
    assert not is_alive(pid)
    assert workspace.states() == dict(a='interrupted')
    assert run_jobs(workspace, Resources(1))['a'].status == 'finished'
    # in the same work dir, where a training resumes
    assert len(runs(place, 'a')) == 2


# -- GPUs and clusters -------------------------------------------------------


@pytest.mark.parametrize('jobs, gpus, each, share', [
    (2, '', 0, 1), (3, '012', 1, 1), (2, '0123', 2, 1), (2, '01234', 2, 1),
    (4, '01', 1, 2),  # asked for
])
def test_share(jobs, gpus, each, share):
    assert Resources(jobs, tuple(gpus), each).share == share


def test_gpus_are_reserved(place):
    with reserved('012', 2, 1) as first, reserved('012', 1, 1) as second:
        assert (first, second) == (['0', '1'], ['2'])
        with reserved('012', 2, 2) as third:  # two jobs may be on each
            assert third == ['0', '1']
    with reserved('2', 1, 1) as free, reserved('', 1, 1) as none:
        assert (free, none) == (['2'], [])


def test_a_gpu_is_waited_for(place, monkeypatch):
    with contextlib.ExitStack() as stack:
        stack.enter_context(reserved('01', 2, 1))
        monkeypatch.setattr(time, 'sleep', lambda _: stack.close())
        with reserved('01', 1, 1) as mine:
            assert mine == ['0']


def test_threads_are_shared_between_jobs():
    cores = len(os.sched_getaffinity(0))
    assert Resources(1).environment() == dict(OMP_NUM_THREADS=str(cores))
    assert Resources(2 * cores).environment() == dict(OMP_NUM_THREADS='1')
    assert Resources(2, slurm=[]).environment() == {}


def test_commands():
    script, arguments = '/t/train.py', ['c.py', '--work-dir', 'x y']
    for gpus in (0, 1):
        assert command_of(script, arguments, gpus) == [
            sys.executable, script, *arguments]
    assert command_of(script, arguments, 2) == [
        sys.executable, '-m', 'torch.distributed.run', '--standalone',
        '--nproc_per_node=2', script, *arguments, '--launcher', 'pytorch']


def test_every_tool_has_a_launcher_or_runs_alone():
    tools = {job.tool for profile, name in PLANS
             for job in table_of(profile, name, 1).jobs.values()}
    for name in tools:
        with open(os.path.join(tiny.ROOT, 'tools', name)) as file:
            assert ('add_launcher()' in file.read()) == \
                (name not in flow.SINGLE), name


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
        '{"gram": {"5": {"mean": 2, "median": null}}, "mIoU": 31, '
        '"recall": [90.5, 0]}')
    found = read_metrics(str(tmp_path))
    assert found['gram/5/mean'] == 2. and found['mIoU'] == 31.
    assert (found['recall/0'], found['recall/1']) == (90.5, 0.)
    assert 'gram/5/median' not in found
    assert read_metrics(str(tmp_path / 'nowhere')) == {}


# -- reports -----------------------------------------------------------------


def record(status='finished', error='', **metrics):
    return Record(status, 'configs/x.py', 3, 'command', 'abc123+',
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
    table.add_row('third', [Cell((), 7.), cell('other+a'), cell('a+b+a')])
    return table


def test_markdown(report_table):
    text = Report(report_table, RECORDS).markdown()
    lines = text.splitlines()
    assert '| | up ↑ | down ↓ | neither |' in lines
    assert ('| first | 1.25 / **2.00 ± 1.41** (+0.75) | 6.500 / **6.000** '
            '(-0.500) | 2.00 / failed |') in lines
    assert ('| second | **1.00** (n = 1; others failed) | 3.000 / not run |  '
            '|') in lines
    assert '| third | 7.00 | not logged | **1.67** |' in lines
    assert '- `bad`: Error: | broken badly' in lines
    # each run: columns, config, seed, commit, log
    runs = [('first', 'up', 'a'), ('first', 'up', 'b'), ('first', 'down', 'c'),
            ('first', 'neither', 'bad'), ('second', 'up', 'a'),
            ('second', 'up', 'bad'), ('third', 'down', 'other'),
            ('third', 'down, neither', 'a'), ('third', 'neither', 'b')]
    assert [line for line in lines if 'configs/x.py' in line] == [
        f'| {row} | {columns} | `{job}` | `configs/x.py` | 3 | abc123+ | '
        '`logs/a_b.log` |' for row, columns, job in runs]
    assert not any('`new`' in line for line in lines)
    report_table.conclude = lambda results: [
        f'up is {results["first", "up"].mean}']
    assert 'up is 2.0' in Report(report_table, RECORDS).markdown().splitlines()


def test_markdown_without_published_figures():
    table = Table('t', 'T', 'C', [Column('x')])
    table.add_row('r', [cell('a')])
    text = Report(table, RECORDS).markdown()
    assert 'published' not in text and '| r | 1.00 |' in text


def test_files(report_table, tmp_path):
    paths = Report(report_table, RECORDS).write(str(tmp_path / 'reports'))
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
    for path in Report(table, {}).write(str(tmp_path)):
        assert os.path.getsize(path) > 20


def test_latex(report_table):
    text = Report(report_table, RECORDS).latex()
    assert r'\caption{A\_title \& more. 25 \% of \{x\} $\rightarrow$ y}' \
        in text
    assert r'\begin{tabular}{lccc}' in text
    assert r'first & 1.25 / 2.00 $\pm$ 1.41 (+0.75) & ' in text
    assert '*' not in text
    report_table.title = '\\ ^ ~ $ # < >'
    assert (r'\caption{\textbackslash{} \^{} \textasciitilde{} \$ \# '
            r'\textless{} \textgreater{}') in Report(
                report_table, RECORDS).latex()
    rows = [line for line in text.splitlines() if line.endswith(r'\\')]
    assert all(len(re.findall(r'(?<!\\)&', row)) == 3 for row in rows)


@pytest.mark.parametrize('method', evidence.METHODS)
def test_tuned_methods_are_what_they_are_called(method):
    chosen = evidence.METHODS[method]
    config = load_config(DIGITS.path(DIGITS.recipe, method=chosen.recipe,
                                     pair='vitl_to_vits'))
    config.merge_from_dict({
        key: DictAction._parse_iterable(value)
        for key, value in (option.split('=') for option in chosen.options)})
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    refine = model.refinement
    assert (refine is not None) == ('singer' in (chosen.recipe, method[:6]))
    if chosen.recipe == 'singer':
        assert (refine.gate is not None) == ('gated' in method)
        assert refine.kd_gradient == (method not in ('detached', 'gated'))
        assert refine.adapters['5'].gain == (-1 if method == 'removing' else 1)
    else:
        assert [type(step).__name__ for step in model.steps] == dict(
            fitnet=[], smooth_l1=[], mask=['MaskTokens'],
            entropy=['WeighByEntropy'], targets=['RemoveOutlierSubspace'],
            singer_entropy=['WeighByEntropy', 'Refine'],
            robust=['RemoveOutlierSubspace'])[method]
        assert [step.inside for step in model.steps
                if hasattr(step, 'inside')] == dict(
            targets=[False], robust=[True]).get(method, [])
        assert ('SmoothL1' in type(model.loss_kd).__name__) == (
            method == 'smooth_l1')


# -- the search, and what the comparison says ---------------------------------


def result(*values):
    """Of accuracies by seed; None: not measured."""
    done = [v for v in values if v is not None]
    return Result(sum(done) / len(done) if done else None, None, list(values),
                  '' if len(done) == len(values) else 'failed')


def searched(scores):
    """Results of a search from ``{(case, method, value, rate): score}``; the
    others are not there."""
    found = collections.defaultdict(lambda: result(None))
    for (case, method, value, rate), score in scores.items():
        found[evidence.row(method, case, value), f'{rate:g}'] = result(score)
    return found


RATES = evidence.WHOLE.rates


def best_of(scores, study=evidence.WHOLE):
    return evidence.chosen(searched(scores), study)


def test_the_best_rate_is_chosen():
    scores = {('clean', 'fitnet', None, rate): score for rate, score
              in zip(RATES, (18, 35, 60.5, 61.5, 40))}
    best = best_of(scores)
    assert best == {'clean/fitnet': dict(
        rate=0.03, setting=None, score=61.5, edge=False)}
    # the best at the edge, and a search that is not finished, are marked
    scores['clean', 'fitnet', None, 0.1] = 70
    assert best_of(scores)['clean/fitnet']['edge']
    del scores['clean', 'fitnet', None, 0.1]
    assert best_of(scores)['clean/fitnet']['edge']


@pytest.mark.parametrize('place, edge', [
    ((1, 2), False), ((0, 2), True), ((2, 1), False), ((3, 1), True),
    ((1, 0), True), ((1, 4), True)])
def test_adapters_rates_have_edges_too(place, edge):
    values = evidence.METHODS['singer'].values
    scores = {('direction', 'singer', value, rate):
              10. + 9. * ((i, j) == place)
              for i, value in enumerate(values)
              for j, rate in enumerate(RATES)}
    best = best_of(scores)['direction/singer']
    assert best == dict(rate=RATES[place[1]], score=19., edge=edge,
                        setting=values[place[0]])


@pytest.mark.parametrize('place, edge', [
    ((0, 2), False), ((1, 2), False), ((1, 0), True), ((0, 4), True)])
def test_a_setting_may_end_where_nothing_is_beyond(place, edge):
    """No weight is below FitNet's or above all of the entropy's."""
    values = evidence.METHODS['entropy'].values
    scores = {('imbalance50', 'entropy', value, rate): float((i, j) == place)
              for i, value in enumerate(values)
              for j, rate in enumerate(RATES)}
    best, = best_of(scores, evidence.LONGTAIL).values()
    assert best == dict(rate=RATES[place[1]], score=1., edge=edge,
                        setting=values[place[0]])


def test_bars_are_explained_where_there_are_any():
    """A long tail has no teacher with artifacts to recover from."""
    said = verdict((40, 42), (41, 44), (None, None), 'entropy',
                   'imbalance50')
    assert '+1.5 ± ' in said and 'Bars:' not in said
    assert 'Bars:' in verdict((20, 20), (60, 60), (60, 60))


def test_long_tails_distil_probe_and_tune_on_their_own_scenes():
    search = table_of(DIGITS, 'longtail_search', 1)
    assert len(search.jobs) == 3 * (1 + 2 + 4 + 4) * 5 * 2
    table = table_of(DIGITS, 'longtail')
    for job in (*search.jobs.values(), *table.jobs.values()):
        ratio, = {int(n) for n in re.findall(r'imbalance(\d+)', job.name)}
        assert 'train_dataloader.dataset.indices=None' in job.options
        assert f'train_dataloader.dataset.ann_file=meta/train_imbalance' \
            f'{ratio}.txt' in job.options
    assert {os.path.basename(name) for name in search.jobs} == {
        'distil', 'cls_digits_tuning'}
    assert {os.path.basename(name) for name in table.jobs} == {
        'distil', 'cls_digits_longtail'}
    classes = [{source.metric[-1] for source in cell.all_sources}
               for cell in table.rows[1][1][1:]]
    assert classes == [set('012'), set('3456'), set('789')]


def test_the_committed_rates_are_in_the_grid():
    with open(evidence.TUNED) as file:
        tuned = json.load(file)
    for key, best in tuned.items():
        case, method = key.split('/')
        study = evidence.PHOTOS if 'photos' in case else evidence.WHOLE
        assert case in evidence.CASES and best['rate'] in study.rates
        assert best['setting'] in evidence.METHODS[method].values
    assert {f'{case}/{method}' for case, _ in evidence.QUICK.plan
            for method in ('fitnet', 'robust')} <= set(tuned)


def test_methods_are_also_compared_in_fitnets_time():
    table = table_of(DIGITS, 'evidence')
    titles = [column.title for column in table.columns]
    first, timed = (titles.index(column.title) for column in (
        evidence.SCORE, evidence.TIMED))
    rows = dict(table.rows)
    fitnet = rows[evidence.row('fitnet', 'subspace')]
    assert fitnet[timed].sources == fitnet[first].sources
    assert not rows[evidence.row('mask', 'subspace')][timed].sources
    steps = {}
    for method in ('robust', 'singer'):
        cell = rows[evidence.row(method, 'subspace')][timed]
        assert [source.metric for source in cell.all_sources] == [
            'accuracy/top1'] * 2
        for job in (table.jobs[source.job] for source in cell.all_sources):
            distil, = (table.jobs[name] for name in job.needs)
            given = dict(option.split('=') for option in distil.options)
            steps[method] = given.get('train_cfg.max_iters')
            assert given.get('param_scheduler.1.end') == steps[method]
    # as docs/evidence.md says: 96 and 143 seconds
    assert steps == dict(robust=None, singer='671')


def verdict(fitnet, ours, clean, method='robust', case='subspace'):
    column = evidence.SCORE.title
    return ' '.join(evidence.conclude({
        (evidence.row('fitnet', 'clean'), column): result(*clean),
        (evidence.row('fitnet', case), column): result(*fitnet),
        (evidence.row(method, case), column): result(*ours),
    }, [('clean', 'fitnet'), (case, 'fitnet'), (case, method)]))


def test_interval_is_students():
    centre, half = evidence.interval([1., 2., 3., 4., 5.])
    assert centre == 3
    assert half == pytest.approx(2.776445 * 2.5**0.5 / 5**0.5, rel=1e-5)


def test_recovery_is_met():
    text = verdict([40., 42.], [58., 60.], [60., 62.])
    assert '+18.0' in text and '90 % of 20.0' in text
    assert 'recovery met' in text and 'not met' not in text


@pytest.mark.parametrize('ours', [[50., 52.], [65., 46.]])
def test_recovery_on_average_and_in_each_seed(ours):
    assert '**recovery not met**' in verdict([40., 42.], ours, [60., 62.])


def test_a_planting_that_costs_little_decides_nothing():
    text = verdict([58., 60.], [61., 62.], [60., 62.])
    assert 'undecided: FitNet loses 2.0' in text and 'recovery met' not in text


def test_seeds_that_failed_are_not_compared():
    text = verdict([40., None], [58., 60.], [60., 62.])
    assert text.endswith('| difference, 95 % interval | | --- | --- |')


# -- the tool ----------------------------------------------------------------


def arguments(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *args])
    return REPRODUCE.parse_args()


def test_all_stands_for_the_papers_tables(monkeypatch):
    tables = REPRODUCE.chosen_tables(arguments(
        monkeypatch, 'sweep', 'all', 'evidence', '--profile', 'digits'))
    names = [table.name for table in tables]
    assert names[0] == 'sweep' and names[-1] == 'evidence'
    assert len(set(names)) == len(names) == len(REPRODUCE.TABLES) + 1


@pytest.mark.parametrize('args, words', [
    (['all', '9'], ["table='9'"]),
    (['9'], ["table='9'", "'5a'", "'all'"]),
    (['evidenc', '--profile', 'digits'], ["Did you mean 'evidence'"]),
    (['search'], ["'search' needs --profile digits or photos"]),
    (['demo', '--profile', 'photos'], ["'demo' needs --profile digits"]),
    (['1', '--profile', 'photos'], ["'1' needs --profile full or digits"]),
    (['all', '--profile', 'photos'], ["table='all'", "'evidence'"]),
    (['1', '--profile', 'digit'], ["'digit'", "Did you mean 'digits'"]),
    (['1', '--quick'], ['--quick', '--profile digits']),
    (['search', '--profile', 'photos', '--quick'], ['--profile digits']),
])
def test_errors_of_tables(monkeypatch, args, words):
    with pytest.raises(ConfigError) as error:
        REPRODUCE.chosen_tables(arguments(monkeypatch, *args))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('args, words', [
    (['1', '--gpus', '0,7'], ['--gpus 0,7', '0, 1, 2']),
    (['1', '--gpus', '0,0'], ['--gpus 0,0', 'each once']),
    (['1', '--gpus', '0,'], ['--gpus 0,']),
    (['1', '--gpus-per-job', '4'], ['--gpus-per-job 4', 'only 3 GPUs',
                                    '0, 1, 2']),
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
    ('', 0, [], (1, (), 0)),
    (None, 2, ['--jobs', '9', '--gpus-per-job', '8', '--slurm', 'runtime=9'],
     (9, (), 8)),
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
    (['--slurm'], ['--slurm', 'no command sbatch']),
    (['--gpus-per-job', '2'], ['--gpus-per-job 2', 'no GPU']),
])
def test_resources_that_are_not_there(monkeypatch, args, words):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(REPRODUCE.shutil, 'which', lambda name: None)
    with pytest.raises(ConfigError) as error:
        REPRODUCE.resources_of(arguments(monkeypatch, '1', *args))
    assert all(word in str(error.value) for word in words)


def test_bad_slurm_resource(monkeypatch):
    monkeypatch.setattr(REPRODUCE.shutil, 'which', lambda name: name)
    with pytest.raises(ConfigError, match="--slurm 'gpu': NAME=VALUE"):
        REPRODUCE.resources_of(arguments(monkeypatch, '1', '--slurm', 'gpu'))


@pytest.mark.parametrize('missing, slurm', [
    ('snakemake', None), ('snakemake_executor_plugin_slurm', [])])
def test_snakemake_is_missing(place, monkeypatch, missing, slurm):
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: None if name == missing else name)
    with pytest.raises(ConfigError, match='pip install.*Python 3.11') as error:
        run_jobs(Workspace('root', chain(place, a=[])),
                 Resources(1, slurm=slurm))
    assert str(error.value).startswith(missing.replace('_', '-'))


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


@needs_snakemake
def test_end_to_end(tmp_path, monkeypatch, capsys):
    """A table of a distillation; then nothing is left to do."""
    make_digit_scenes(str(tmp_path / 'data/digit_scenes'), num_train=40,
                      num_val=12)
    args = ['reproduce.py', '3', '--profile', 'digits', '--quick', '--root',
            'root']
    shown = tiny.run_tool(*args, cwd=tmp_path).stdout
    assert '2 jobs: 0 are finished, 2 to run' in shown
    with open(tmp_path / 'root/table3.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert row['status'] == 'finished'
        assert 0.5 < float(row['measured']) <= 1
        assert os.path.isfile(tmp_path / row['log'])
    for extension in ('md', 'tex', 'png'):
        assert os.path.getsize(tmp_path / f'root/table3.{extension}')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', args)
    monkeypatch.setattr(REPRODUCE, 'end_in_order', lambda: None)
    REPRODUCE.main()
    shown = capsys.readouterr().out
    assert '2 jobs: 2 are finished, 0 to run' in shown
    assert 'start' not in shown


def test_photographs_have_to_be_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match='data/photos/train.*cut_photos'):
        PHOTOS.check_needs()
    os.makedirs('data/photos/train')
    with pytest.raises(ConfigError, match='dinov2_s14_84px.pth.*convert_che'):
        PHOTOS.check_needs()


def test_photographs_are_tuned_and_tested_apart():
    search, table = (table_of(PHOTOS, name, 1)
                     for name in ('search', 'evidence'))
    assert {job.config for job in search.jobs.values()
            if job.tool == 'linear_eval.py'} == {
        PHOTOS.path('linear_eval/cls_photos_tuning.py')}
    prefixes = {name: load_config(PHOTOS.path(
        f'linear_eval/cls_photos{name}.py')).val_dataloader.dataset.data_prefix
        for name in ('', '_tuning')}
    assert prefixes == {'': 'test', '_tuning': 'tune'}
    # What students are compared by is in the table, of the teacher itself
    # all but what it explains of itself
    rows = dict(table.rows)
    assert [len(cell.all_sources) for cell in rows[evidence.row(
        'teacher', 'photos_planted')]] == [1, 1, 1, 0]
    assert all(result.mean is None for row in Report(table, {}).results
               for result in row)
    *_, explained = rows[evidence.row('fitnet', 'photos')]
    source, = explained.all_sources
    job = table.jobs[source.job]
    assert (job.tool, source.metric) == (
        'explained_variance.py', 'explained_variance')
    assert job.args[3].endswith('teachers/dinov2_s14_84px.py')
    for job in (*search.jobs.values(), *table.jobs.values()):
        if job.tool == 'train.py':
            assert 'train_cfg.max_iters=2000' in job.options


def test_adapters_that_settle_first_stay_as_they_are():
    table = table_of(DIGITS, 'search', 1)
    name, = {job.needs[0] for job in table.jobs.values()
             if '-clean-settled-' in job.name and job.tool == 'train.py'
             and job.needs}
    first = table.jobs[name]
    assert 'model.loss_kd.loss_weight=0' in first.options
    students = [job for job in table.jobs.values()
                if job.needs == [name] and job.tool == 'train.py']
    assert len(students) == len(RATES)
    for job in students:
        assert f'{evidence.ADAPTERS}.lr_mult=0' in job.options
        assert f'load_from={{checkpoint:{name}}}' in job.options
