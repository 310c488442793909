"""tools/gpu_check.sh: what it asks the tools for, its time, its report.

Its tests and benchmarks are run by test_gpu.py and test_benchmark.py.
"""
import json
import os
import subprocess
import sys
import time

import benchmark_step
import gpu_report
import make_digit_scenes
import pytest
import tiny
import train
from step_cost import vision_transformer

from mmsinger.engine.prepare import load_config

SCRIPT = os.path.join(tiny.ROOT, 'tools', 'gpu_check.sh')
JOBS = ['tests', 'vitl_vitt_224', 'vitl_vits_224', 'vitl_vitt_512',
        'vitl_vits_512', 'scenes', 'distil_amp', 'vitl_vitt_224_compiled',
        'distil', 'vitl_vits_512_compiled', 'vitl_vitt_224_compiled_tf32',
        'vitl_vitt_224_levers']

# Takes Python's place: keeps what it is asked for, and does $JOB
STAND_IN = f"""#!/bin/sh
case "$1" in
*/gpu_report.py) exec {sys.executable} -I "$@" ;;
*/check_env.py) ;;
*/machine.py) echo '{{"device": "GPU 1", "torch": "2.13", "cuda": "13.0",
    "date": "2026-11-26"}}'; exit $CUDA ;;
*) printf '%s\\n' "$@" '' >> "$CALLS"; eval "$JOB" ;;
esac
"""


def start(folder, *args, job='', cuda=0, **env):
    python = folder / 'python'
    python.write_text(STAND_IN)
    python.chmod(0o755)
    settings = {**dict(
        PYTHON=python, OUT=folder / 'out', CALLS=folder / 'calls', JOB=job,
        CUDA=cuda, TMPDIR=folder), **env}
    return subprocess.Popen(
        ['bash', SCRIPT, *args], cwd=folder, text=True,
        env={**os.environ, **{k: str(v) for k, v in settings.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(folder, *args, **kwargs):
    process = start(folder, *args, **kwargs)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def result(folder):
    return json.loads((folder / 'out/gpu_check.json').read_text())


def calls(folder):
    return [call.split('\n') for call in
            (folder / 'calls').read_text().split('\n\n') if call]


# -- what it runs -------------------------------------------------------------


@pytest.mark.parametrize('args', [(), ('--cpu', )], ids=str)
def test_every_command_is_one_that_its_tool_takes(tmp_path, monkeypatch, args):
    code, output = run(tmp_path, *args)
    assert code == 0, output
    names = [job['name'] for job in result(tmp_path)['jobs']]
    assert args or names == JOBS
    commands = calls(tmp_path)
    assert len(commands) == len(names)
    steps = []
    for command in commands:
        monkeypatch.setattr(sys, 'argv', command)
        tool = os.path.basename(command[0])
        if tool == 'benchmark_step.py':
            options = benchmark_step.parse_args()
            for name in (options.teacher, options.student):
                vision_transformer(name, options.size)
            steps.append(options)
        elif tool == 'train.py':
            options = train.parse_args()
            cfg = load_config(options.config, options.cfg_options)
            assert cfg.train_cfg.max_iters == (4 if args else 200)
        elif tool == 'make_digit_scenes.py':
            make_digit_scenes.parse_args()
        else:
            assert command[:2] == ['-m', 'pytest']
            assert os.path.isfile(command[2])
    outs = [step.out for step in steps]
    assert len({*outs}) == len(outs) == (1 if args else 8)


# -- its time -----------------------------------------------------------------


def test_time_is_kept_and_what_was_left_out_is_said(tmp_path):
    code, output = run(tmp_path, job='sleep 3000', LIMIT=11)
    assert code == 0
    states = {job['name']: job['state'] for job in result(tmp_path)['jobs']}
    assert [*states] == JOBS
    assert states.pop('tests').startswith('stopped after ')
    assert all(state.startswith('left out: ') for state in states.values())
    report = (tmp_path / 'out/gpu_check.md').read_text()
    assert '- distil: left out: 0 s were left, 0 s' in report
    assert 'distil: left out' in output


def test_an_interrupted_check_leaves_no_process(tmp_path):
    process = start(tmp_path, job=f'echo $$ > {tmp_path}/pid; sleep 60')
    pid = tmp_path / 'pid'
    deadline = time.monotonic() + 20
    while not (pid.exists() and pid.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=10) == 130
    deadline = time.monotonic() + 10
    while os.path.isdir(f'/proc/{pid.read_text().strip()}'):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(tmp_path.glob('tmp.*'))


def test_a_job_that_fails(tmp_path):
    code, output = run(tmp_path, job='echo is broken; exit 3')
    assert code == 1
    assert output.count('is broken') == len(JOBS)
    assert {job['state'] for job in result(tmp_path)['jobs']} == {'failed'}
    assert (tmp_path / 'out/gpu_check.log').read_text().count('broken') == \
        len(JOBS)


@pytest.mark.parametrize('args, env, code, words', [
    (['--gpu'], {}, 2, 'tools/gpu_check.sh [--cpu]'),
    ([], dict(LIMIT='soon'), 2, 'LIMIT=soon: a number of seconds'),
    ([], dict(cuda=1), 1, 'no CUDA device'),
    ([], dict(OUT='python/out'), 2, 'OUT=python/out cannot be written')])
def test_bad_arguments(tmp_path, args, env, code, words):
    found, output = run(tmp_path, *args, **env)
    assert found == code and words in output, output


# -- its report ---------------------------------------------------------------


def test_report(tmp_path):
    work = tmp_path / 'work'
    (work / 'steps').mkdir(parents=True)
    (work / 'distil/1/vis_data').mkdir(parents=True)
    (work / 'machine.json').write_text(json.dumps(dict(
        device='GPU 1', torch='2.13', cuda='13.0', date='2026-11-26')))
    (work / 'jobs.tsv').write_text('tests\tdone\t9\ndistil\tdone\t7\n')
    (work / 'steps/a.json').write_text(json.dumps(dict(
        settings=dict(teacher='vit_l16', student='vit_t16', size=224,
                      batch_size=64, precision='bf16'),
        seconds={'teacher': 0.1, 'FitNet': 0.2, 'SiNGER': 0.25,
                 'FitNet, compiled': 0.1, 'SiNGER, compiled': 0.2},
        rounds={'FitNet': [0.2, 0.2], 'SiNGER': [0.25, 0.25],
                'robust preset': [0.2, 0.21]},
        flops=dict(teacher=2e13), quartiles={
            'SiNGER over FitNet': [1.2, 1.3],
            'robust preset over FitNet': [1.0, 1.1]},
        ratios=dict(singer_over_fitnet=1.25, flops_singer_over_fitnet=1.1,
                    memory_singer_over_fitnet=1.05))))
    (work / 'tests.xml').write_text(
        '<testsuites><testsuite><testcase name="test_a"><properties>'
        '<property name="error" value="0.01"/></properties></testcase>'
        '<testcase name="test_b"><failure/></testcase>'
        '<testcase name="test_c"><skipped/></testcase>'
        '</testsuite></testsuites>')
    (work / 'distil/1/vis_data/scalars.json').write_text(
        '{"loss": 4.0, "time": 0.03, "data_time": 0.01, "step": 25}\n'
        '{"loss": 2.0, "time": 0.02, "data_time": 0.0, "step": 50}\n'
        '{"mIoU": 12.5, "step": 50}\n{"loss": 1.')  # it was stopped
    found = gpu_report.collect(work)
    text = gpu_report.markdown(found)
    assert found['tests']['counts'] == dict(failure=1, passed=1, skipped=1)
    for line in (
            '# GPU 1', '- test_a: passed, error 0.01', '- test_b: failure',
            '| vit_l16 to vit_t16, 224, 64 | bf16 | 200.0 | '
            '1.025 (1.000 to 1.100) | 250.0 | 256 | '
            '1.250 (1.200 to 1.300) | 1.100 | 1.050 | 200 | 0.50 | 0.80 |',
            '- distil: 50 steps of 25 ms (loading 5), loss 4 to 2, '
            'mIoU 12.5 %', '- tests: done, 9 s'):
        assert line in text.split('\n'), line
    assert 'test_c' not in text and 'torch 2.13, CUDA 13.0' in text
    for cut in ('steps/cut.json', 'tests.xml'):  # jobs stopped while writing
        (work / cut).write_text('<testsuites' if 'xml' in cut else '{"a": ')
    again = gpu_report.collect(work)
    assert again['steps'] == found['steps'] and again['tests'] is None
