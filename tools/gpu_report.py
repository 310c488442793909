"""What tools/gpu_check.sh has measured so far, as JSON and Markdown.

    python tools/gpu_report.py WORK OUT

WORK is the folder that the script works in; OUT gets gpu_check.json and
gpu_check.md. Needs nothing beside the standard library, so that writing it
after each job costs no time.
"""
import argparse
import contextlib
import glob
import json
import os
import statistics
from collections import Counter
from typing import Any, Dict, List, Optional
from xml.etree import ElementTree

HEAD = ('| pair, px, batch | precision | FitNet, ms | robust preset over '
        'FitNet: time (quartiles) | SiNGER, ms | images/s | SiNGER over '
        'FitNet: time (quartiles) | FLOPs | memory | TFLOP/s of the teacher '
        '| compiled, over not: FitNet | SiNGER |\n' + '|---' * 12 + '|')


def collect(work: str) -> Dict[str, Any]:
    """Read what the jobs have left, be they done, stopped or failed.

    Args:
        work (str): The folder that tools/gpu_check.sh works in.

    Returns:
        dict: ``machine``, ``jobs``, ``tests`` (None before there are any),
        ``distillations`` and ``steps``, by the names of jobs.
    """
    with open(os.path.join(work, 'machine.json')) as file:
        machine = json.load(file)
    with open(os.path.join(work, 'jobs.tsv')) as file:
        jobs = [line.rstrip('\n').split('\t') for line in file]
    steps = {}
    for path in glob.glob(os.path.join(
            glob.escape(work), 'steps', '*.json')):
        with open(path) as file, contextlib.suppress(ValueError):  # cut off
            steps[os.path.splitext(os.path.basename(path))[0]] = \
                json.load(file)
    runs = {name: _distillation(os.path.join(work, name)) for name, *_ in jobs}
    return dict(
        machine=machine,
        jobs=[dict(name=name, state=state, seconds=int(seconds))
              for name, state, seconds in jobs],
        tests=_tests(os.path.join(work, 'tests.xml')),
        distillations={name: run for name, run in runs.items() if run},
        steps=dict(sorted(steps.items())))


def _tests(path: str) -> Optional[Dict[str, Any]]:
    if not os.path.isfile(path):  # pytest writes it at its end
        return None
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError:  # cut off
        return None
    cases = [dict(
        name=case.get('name'),
        outcome=min({child.tag for child in case} & {
            'failure', 'error', 'skipped'}, default='passed'),
        numbers={item.get('name'): item.get('value')
                 for item in case.iter('property')})
        for case in tree.iter('testcase')]
    counts = Counter(case['outcome'] for case in cases)
    return dict(counts=dict(sorted(counts.items())), cases=cases)


def _distillation(work_dir: str) -> Optional[Dict[str, Any]]:
    logs = glob.glob(os.path.join(
        glob.escape(work_dir), '*', 'vis_data', 'scalars.json'))
    lines = []
    for path in logs:
        with open(path) as file:
            lines += [json.loads(line) for line in file
                      if line.endswith('}\n')]
    train = [line for line in lines if 'loss' in line]
    if not train:
        return None
    val = [line['mIoU'] for line in lines if 'mIoU' in line]
    return dict(
        iterations=train[-1]['step'], first_loss=train[0]['loss'],
        last_loss=train[-1]['loss'],
        step_seconds=statistics.median(line['time'] for line in train),
        data_seconds=statistics.median(line['data_time'] for line in train),
        miou=val[-1] if val else None)


def markdown(result: Dict[str, Any]) -> str:
    """One table of the steps, and a line for each other thing."""
    machine = result['machine']
    hardware = f'CUDA {machine["cuda"]}' if 'cuda' in machine else \
        'a trial of the script on a CPU: its figures say nothing'
    lines = [f'# {machine["device"]}', '', f'torch {machine["torch"]}, '
             f'{hardware}, {machine["date"]}. Made by tools/gpu_check.sh; '
             'random images and weights, forward and backward pass without '
             'the optimizer; docs/cost.md explains it.', '', HEAD]
    lines += [_row(step) for step in result['steps'].values()]
    lines += ['', '## Tests', '']
    if result['tests']:
        counts = result['tests']['counts']
        lines += [', '.join(f'{n} {outcome}' for outcome, n in counts.items())
                  + '.', '']
        lines += [
            f'- {case["name"]}: ' + ', '.join([case['outcome'], *(
                f'{key} {value}' for key, value in case['numbers'].items())])
            for case in result['tests']['cases']
            if case['outcome'] != 'skipped']
    lines += ['', "## The demo's recipe", '']
    for name, run in result['distillations'].items():
        miou = '' if run['miou'] is None else f', mIoU {run["miou"]:.1f} %'
        lines.append(
            f'- {name}: {run["iterations"]} steps of '
            f'{1000 * run["step_seconds"]:.0f} ms (loading '
            f'{1000 * run["data_seconds"]:.0f}), loss '
            f'{run["first_loss"]:.3g} to {run["last_loss"]:.3g}{miou}')
    lines += ['', '## Jobs, in their order', '']
    lines += [f'- {job["name"]}: {job["state"]}, {job["seconds"]} s'
              for job in result['jobs']]
    return '\n'.join(lines) + '\n'


def _row(step: Dict[str, Any]) -> str:
    settings, seconds, ratios = (step[key] for key in (
        'settings', 'seconds', 'ratios'))
    cells: List[str] = [
        f'{settings["teacher"]} to {settings["student"]}, '
        f'{settings["size"]}, {settings["batch_size"]}',
        settings['precision'],
        f'{1000 * seconds["FitNet"]:.1f}', _over_fitnet(step, 'robust preset'),
        f'{1000 * seconds["SiNGER"]:.1f}',
        f'{settings["batch_size"] / seconds["SiNGER"]:.0f}',
        _over_fitnet(step, 'SiNGER'),
        f'{ratios["flops_singer_over_fitnet"]:.3f}',
        f'{ratios["memory_singer_over_fitnet"]:.3f}',
        f'{step["flops"]["teacher"] / seconds["teacher"] / 1e12:.3g}']
    for name in ('FitNet', 'SiNGER'):
        cells.append(
            f'{seconds[f"{name}, compiled"] / seconds[name]:.2f}'
            if f'{name}, compiled' in seconds else '')
    return f'| {" | ".join(cells)} |'


def _over_fitnet(step: Dict[str, Any], name: str) -> str:
    rounds = step['rounds']
    if name not in rounds:
        return ''
    ratio = statistics.median(
        a / b for a, b in zip(rounds[name], rounds['FitNet']))
    low, high = step['quartiles'][f'{name} over FitNet']
    return f'{ratio:.3f} ({low:.3f} to {high:.3f})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work', help='the folder that the script works in')
    parser.add_argument('out', help='where the files go')
    args = parser.parse_args()
    result = collect(args.work)
    for name, text in (('gpu_check.json', json.dumps(result, indent=1)),
                       ('gpu_check.md', markdown(result))):
        with open(os.path.join(args.out, name), 'w') as file:
            file.write(text)


if __name__ == '__main__':
    main()
