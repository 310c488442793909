"""How the cost of a step grows: with tokens, layers, rank, batch and depth.

    python tools/benchmark_growth.py --out docs/benchmarks/growth

Measures what SiNGER takes beyond a FitNet step, and what the backbones take,
one setting changed at a time, on random images and weights. Writes OUT.json
and OUT.png, with the exponents that fit: cost ~ setting ** exponent.
"""
import json
import statistics

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import numpy as np
import torch
from mmengine.registry import init_default_scope

from mmsinger.command_line import ToolParser
from mmsinger.errors import check_output_file, readable_errors
from mmsinger.figures.style import (add_caption, line_style, new_figure,
                                    save_figure)
from mmsinger.files import write_json
from mmsinger.schema import Count, reader
from step_cost import (Steps, count_flops, describe_machine, interleaved,
                       peak_memory)

BASE = dict(teacher='vit_b16', student='vit_t16', batch_size=2, size=224)
AXES = {
    'tokens': ('size', (160, 224, 320, 448, 640)),
    'batch': ('batch_size', (1, 2, 4, 8)),
    'rank': ('rank', (4, 16, 64, 256)),
    'distilled layers': ('layers', ((11, ), (8, 11), (5, 8, 11),
                                    (2, 5, 8, 11))),
    'depth of the teacher': ('depth', (6, 12, 24)),
}
KINDS = {'FLOPs': ('GFLOP', 1e-9), 'seconds': ('s', 1.),
         'memory': ('MiB', 2**-20)}  # the unit to draw in, and its factor
PARTS = ('backbones', 'SiNGER beyond FitNet')


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('--rounds', type=reader(Count), default=3, metavar='N',
                        help='how often each step is timed')
    parser.add_argument('--out', default='growth',
                        help='path of the files, without suffix')
    return parser.parse_args()


def main():
    args = parse_args()
    for suffix in ('.json', '.png'):
        check_output_file(args.out + suffix)
    init_default_scope('mmpretrain')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    growth = {}
    for axis, (key, values) in AXES.items():
        points = [measure({**BASE, key: value}, args.rounds, device)
                  for value in values]
        numbers = [abscissa(axis, value) for value in values]
        growth[axis] = dict(
            values=numbers, points=points,
            exponents={kind: {part: exponent(
                numbers, [point[kind][part] for point in points])
                for part in PARTS} for kind in KINDS})
        print(axis, json.dumps(growth[axis]['exponents']), flush=True)
    result = dict(machine=describe_machine(device), base=BASE,
                  rounds=args.rounds, growth=growth)
    write_json(result, args.out + '.json')
    save_figure(draw(result), args.out + '.png')
    print(f'{table(growth)}\n\n{args.out}.json, {args.out}.png')


def measure(settings, rounds, device):
    """FLOPs, seconds and bytes of the backbones, and of SiNGER beyond
    FitNet."""
    bench = Steps(**settings, device=device)
    methods = bench.methods()
    steps = {**bench.parts(), 'FitNet': methods['FitNet'],
             'SiNGER': methods['SiNGER']}
    costs = {
        'FLOPs': {name: count_flops(step) for name, step in steps.items()},
        'seconds': {name: statistics.median(times) for name, times in
                    interleaved(steps, rounds, device).items()},
        'memory': {name: peak_memory(step, device)['tensors']
                   for name, step in steps.items()},
    }
    return {kind: dict(zip(PARTS, (cost['teacher'] + cost['student'],
                                   cost['SiNGER'] - cost['FitNet'])))
            for kind, cost in costs.items()}


def abscissa(axis, value):
    if axis == 'tokens':
        return (value // 16)**2 + 1
    return len(value) if isinstance(value, tuple) else value


def exponent(values, costs):
    """The slope of a straight line through logarithms; None where a cost is
    not positive (a difference within the noise)."""
    if min(costs) <= 0:
        return None
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def table(growth):
    heads = [f'{kind}: {part}' for kind in KINDS for part in PARTS]
    lines = ['', f'| exponent of | {" | ".join(heads)} |', '|---' * 7 + '|']
    for axis, grown in growth.items():
        cells = [grown['exponents'][kind][part]
                 for kind in KINDS for part in PARTS]
        lines.append(f'| {axis} | ' + ' | '.join(
            'noise' if cell is None else f'{cell:.2f}' for cell in cells)
            + ' |')
    return '\n'.join(lines)


def draw(result):
    figure = new_figure((3. * len(AXES), 7.2))
    axes = figure.subplots(len(KINDS), len(AXES), squeeze=False)
    for row, (kind, (unit, scale)) in zip(axes, KINDS.items()):
        for axis, (name, grown) in zip(row, result['growth'].items()):
            for number, part in enumerate(PARTS):
                fit = grown['exponents'][kind][part]
                axis.plot(
                    grown['values'],
                    [point[kind][part] * scale for point in grown['points']],
                    label=part + ('' if fit is None
                                  else f', exponent {fit:.2f}'),
                    markersize=4, **line_style(number))
            axis.set_xscale('log')
            axis.set_yscale('log')
            axis.set_xticks(grown['values'], map(str, grown['values']))
            axis.minorticks_off()
            axis.set_xlabel(name, fontsize=8)
            axis.set_ylabel(f'{kind}, {unit}', fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6.5, frameon=False)
    base, machine = result['base'], result['machine']
    add_caption(figure, f'{base["teacher"]} to {base["student"]}, batch '
                f'{base["batch_size"]}, {base["size"]} px unless the axis '
                f'says otherwise; random images and weights; fp32 on '
                f'{machine["device"]}, {machine["threads"]} threads; seconds: '
                f'median of {result["rounds"]} interleaved rounds. Memory: '
                'tensors of a step, without weights.')
    return figure


if __name__ == '__main__':
    with readable_errors():
        main()
