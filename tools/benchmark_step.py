"""What a distillation step costs, as ratios within one run.

    python tools/benchmark_step.py \
        --teacher vit_l16 --student vit_t16 --batch-size 4 --size 224

Measures, on random images and weights, in turn and in one process: the
teacher's pass and the student's forward and backward pass alone (the floor of
any feature distillation), a FitNet step, and a SiNGER step with each of its
losses on and off; the loading of a batch by one worker; counts FLOPs and
memory. With --levers also what might make a step cheaper, with --compile
compiled blocks. --steps leaves out what is not wanted, for many rounds of the
rest. --out writes JSON. docs/cost.md explains the table.
"""
import os
import statistics

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.registry import init_default_scope

from mmsinger import paths
from mmsinger.command_line import ToolParser
from mmsinger.engine.prepare import load_config
from mmsinger.errors import (check_choice, check_output_file,
                             readable_errors)
from mmsinger.files import write_json
from mmsinger.schema import Count, reader
from step_cost import (ImageLoading, Step, Steps, count_flops,
                       describe_machine, fast_precisions, interleaved,
                       paired_ratio, peak_memory)
from step_cost.steps import PRECISIONS

RECIPE = os.path.join(paths.configs(), 'classification',
                      'singer_vitl_to_vits_8xb64_in1k.py')
ALWAYS = ('teacher', 'student', 'FitNet', 'SiNGER')  # the ratios' parts


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('--teacher', default='vit_l16', metavar='VIT',
                        help='vit_{t,s,b,l,h,g}PATCH')
    parser.add_argument('--student', default='vit_t16', metavar='VIT')
    parser.add_argument('--batch-size', type=reader(Count),
                        default=4, metavar='N',
                        help='images a step')
    parser.add_argument('--size', type=reader(Count),
                        default=224, metavar='PX',
                        help='their side')
    parser.add_argument('--precision', default='fp32',
                        choices=(*PRECISIONS, 'fast'),
                        help='bf16: autocast; fast: fp32, and tf32 and bf16 '
                        'where the machine has instructions for them, each '
                        'into OUT with its name before the suffix')
    parser.add_argument('--rank', type=reader(Count), default=16, metavar='R',
                        help='of the adapters')
    parser.add_argument('--rounds', type=reader(Count), default=5, metavar='N',
                        help='how often each step is timed')
    parser.add_argument('--levers', action='store_true',
                        help='also what might make a step cheaper')
    parser.add_argument('--compile', nargs='?', const='inductor',
                        metavar='BACKEND',
                        help='also with blocks compiled by this backend of '
                        "torch.compile, 'inductor' if none is named; "
                        'compiling takes minutes')
    parser.add_argument('--steps', nargs='*', metavar='NAME',
                        help='beside teacher, student, FitNet and SiNGER, '
                        'measure these alone, for instance '
                        'info_fraction=0.5; without names, none')
    parser.add_argument('--out', metavar='FILE', help='write JSON')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.compile:
        check_choice('--compile', args.compile,
                     torch.compiler.list_backends(exclude_tags=()))
    outs = {args.precision: args.out}
    if args.precision == 'fast':
        stem, suffix = os.path.splitext(args.out or '')
        outs = {precision: args.out and f'{stem}_{precision}{suffix}'
                for precision in fast_precisions()}
    for out in filter(None, outs.values()):
        check_output_file(out)
    init_default_scope('mmpretrain')
    bench = Steps(args.teacher, args.student, args.batch_size, args.size,
                  next(iter(outs)), args.rank,
                  device='cuda' if torch.cuda.is_available() else 'cpu')
    for precision, out in outs.items():
        bench.precision = precision
        result = measure(args, bench)
        print(report(result))
        if out:
            write_json(result, out)
            print(f'\n{out}')


def measure(args, bench):
    """All numbers of one precision, for JSON."""
    pipeline = load_config(RECIPE).train_dataloader.dataset.pipeline
    with ImageLoading(pipeline, args.size) as loading:
        steps = chosen_steps(args, bench, loading)
        # Loading has no FLOPs, and counting would compile anew
        counted = {name: step for name, step in steps.items()
                   if name != 'data loading' and 'compiled' not in name}
        flops = {name: count_flops(step) for name, step in counted.items()}
        memory = {name: peak_memory(step, bench.device)
                  for name, step in counted.items()}
        times = interleaved(steps, args.rounds, bench.device)
    settings = {key: value for key, value in vars(args).items()
                if key not in ('out', 'levers', 'compile', 'steps')}
    return dict(
        machine=describe_machine(bench.device),
        settings=dict(settings, precision=bench.precision),
        seconds={name: statistics.median(t) for name, t in times.items()},
        rounds=times, flops=flops, memory_bytes=memory,
        weight_bytes=bench.weight_bytes,
        ratios=ratios(times, flops, memory, bench.weight_bytes),
        quartiles=quartiles(times))


def chosen_steps(args, bench, loading):
    """What is measured, by name.

    Raises:
        ConfigError: If a name of ``--steps`` is not known.
    """
    core = {**bench.parts(), **bench.methods(), 'data loading': Step(
        lambda: loading.load(args.batch_size))}
    levers = bench.levers()
    wanted = [*core] if args.steps is None else [*ALWAYS, *args.steps]
    for name in wanted:
        check_choice('--steps', name, {**core, **levers})
    if args.levers:
        wanted += levers
    steps = {name: step for name, step in {**core, **levers}.items()
             if name in wanted}
    if args.compile:
        steps.update(bench.compiled(backend=args.compile))
    return steps


def quartiles(times):
    """Quartiles of the ratios to FitNet, round by round."""
    if len(times['FitNet']) < 2:
        return {}
    return {f'{name} over FitNet': statistics.quantiles(
        [a / b for a, b in zip(seconds, times['FitNet'])], n=4)[::2]
        for name, seconds in times.items()}


def ratios(times, flops, memory, weights):
    """What the project has targets for, and what explains it."""
    floor = [a + b for a, b in zip(times['teacher'], times['student'])]
    times = dict(times, floor=floor)
    result = dict(
        singer_over_fitnet=paired_ratio(times, 'SiNGER', 'FitNet'),
        fitnet_over_floor=paired_ratio(times, 'FitNet', 'floor'),
        flops_singer_over_fitnet=flops['SiNGER'] / flops['FitNet'],
        flops_fitnet_over_floor=flops['FitNet'] / (
            flops['teacher'] + flops['student']))
    for kind in ('tensors', 'process'):
        ours, theirs = (weights[name] + memory[name][kind]
                        for name in ('SiNGER', 'FitNet'))
        if memory['FitNet'][kind]:
            key = 'memory_singer_over_fitnet'
            result[key if kind == 'tensors' else f'{key}_{kind}'] = \
                ours / theirs
    for name in times:
        if name not in ('teacher', 'student', 'floor', 'FitNet', 'SiNGER'):
            result[f'{name}, over SiNGER'] = paired_ratio(
                times, name, 'SiNGER')
    return result


def report(result):
    """The table in Markdown.

    "from floor" compares a step's time with its FLOPs at the rate of the
    teacher's pass, which is nearly all matrix products.
    """
    seconds, flops, memory = (result[key] for key in (
        'seconds', 'flops', 'memory_bytes'))
    rate = flops['teacher'] / seconds['teacher']
    machine, settings = result['machine'], result['settings']
    hardware = f'{machine["device"]}, ' + (
        f'CUDA {machine["cuda"]}' if 'cuda' in machine else
        f'{machine["threads"]} threads {" ".join(machine["instructions"])}')
    lines = [
        '', f'{settings["teacher"]} to {settings["student"]}, batch '
        f'{settings["batch_size"]}, {settings["size"]} px, '
        f'{settings["precision"]}; {hardware}, torch '
        f'{machine["torch"]}; median of {settings["rounds"]} interleaved '
        f'rounds, {rate / 1e9:.0f} GFLOP/s in the teacher\'s pass', '',
        '| step | seconds | over FitNet (quartiles) | GFLOP | time over FLOP '
        'floor | memory, MiB: tensors | process |',
        '|---|---|---|---|---|---|---|']
    for name, value in seconds.items():
        over = f'{paired_ratio(result["rounds"], name, "FitNet"):.3f}'
        key = f'{name} over FitNet'
        if key in result['quartiles']:
            over += ' ({:.3f} to {:.3f})'.format(*result['quartiles'][key])
        cells = [name, f'{value:#.3g}', over]
        if name in flops:
            cells += [f'{flops[name] / 1e9:.0f}',
                      f'{value / (flops[name] / rate):.2f}']
        else:
            cells += ['', '']
        cells += [f'{memory[name][kind] / 2**20:.0f}' if name in memory
                  else '' for kind in ('tensors', 'process')]
        lines.append(f'| {" | ".join(cells)} |')
    weights = result['weight_bytes']['SiNGER'] / 2**20
    if settings['precision'] == 'bf16' and 'bf16' not in fast_precisions():
        lines += ['', 'This machine has no bfloat16 instructions: its times '
                  'in bfloat16 say nothing about others.']
    lines += ['', f'Memory is what a step needs beside the weights '
              f'({weights:.0f} MiB).', '']
    lines += [f'- {name}: {value:.3f}'
              for name, value in result['ratios'].items()]
    return '\n'.join(lines)


if __name__ == '__main__':
    with readable_errors():
        main()
