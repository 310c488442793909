"""Time a training step of a recipe's methods, as ratios within one run.

    python tools/benchmark_step.py configs/singer_vitl_to_vits_in1k.py

Compares, on random images of the recipe's size and random weights: the
student alone (features only), FitNet, SiNGER, SiNGER in a step that
DiagnosticsHook measures, and SiNGER computed the way the official code does
(the next block's output recomputed, weight gradients for that block). Rounds
are interleaved, so that a busy machine slows all alike.
"""
import argparse
import statistics
import time

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.config import DictAction
from mmengine.registry import init_default_scope

from mmsinger.engine.config import load_config
from mmsinger.engine.hooks import DiagnosticsHook
from mmsinger.errors import readable_errors
from mmsinger.evaluation.diagnostics import (adapter_energies,
                                             step_diagnostics)
from mmsinger.evaluation.nullspace import decompose_ffn
from mmsinger.models import FitNetDistiller, SiNGERDistiller
from mmsinger.models.step_record import StepRecord


class RecomputingSiNGER(SiNGERDistiller):
    """The official code's order of work, for comparison."""

    def _info_loss(self, taps, layer, tokens, refined, previous):
        if layer != self.last_layer:
            with torch.no_grad():
                taps.rerun(layer + 1, taps.tokens(layer).values)
        return super()._info_loss(taps, layer, tokens, refined, previous)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('config', help='a SiNGER recipe')
    parser.add_argument('--batch', type=int, default=8, help='images a step')
    parser.add_argument('--size', type=int, default=224, help='their side')
    parser.add_argument('--rounds', type=int, default=5,
                        help='steps of each method that are timed')
    parser.add_argument('--bf16', action='store_true', help='autocast')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        metavar='KEY=VALUE')
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    init_default_scope(cfg.default_scope)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)

    singer_cfg = dict(cfg.model, task_loss_weight=0)
    singer_cfg.pop('type')
    singer_cfg['teacher'] = dict(singer_cfg['teacher'], checkpoint=None)
    fitnet_cfg = {key: value for key, value in singer_cfg.items() if key not
                  in ('adapter', 'loss_outlier', 'loss_info', 'last_layer')}
    models = {'FitNet': FitNetDistiller(**fitnet_cfg)}
    for name, cls in (('SiNGER', SiNGERDistiller),
                      ("SiNGER, official code's order", RecomputingSiNGER)):
        models[name] = cls(**singer_cfg)
        models[name].initialise_adapters()
    for layer in models[name].tapped_teacher_layers:
        models[name].teacher.blocks.modules[layer].requires_grad_(True)
    for model in models.values():
        model.to(device).train()
        if model.needs_calibration:
            model.calibrate_target_norms([images])

    def student_alone():
        model = models['FitNet']
        _, tokens = model.run_student(images, None)
        return sum(t.values.float().square().mean() for t in tokens.values())

    singer = models['SiNGER']
    directions = {layer: decompose_ffn(singer, layer)[1][0]
                  for layer in singer.layers}

    def measured():
        """What DiagnosticsHook adds to a step, apart from the logging."""
        singer.records = [StepRecord()]
        total = sum(singer.loss(images, None).values())
        numbers = step_diagnostics(singer.records.pop())
        torch.stack([value for layer in numbers.values()
                     for value in layer.values()]).tolist()
        for layer, basis in directions.items():
            adapter_energies(singer.adapters[str(layer)], basis)
        return total

    steps = {'student alone': (models['FitNet'], student_alone),
             'SiNGER, measured': (singer, measured)}
    for name, model in models.items():
        steps[name] = (model, lambda m=model: sum(
            m.loss(images, None).values()))
    times = {name: [] for name in steps}
    memory = {}
    for i in range(args.rounds + 1):
        for name, (model, loss) in steps.items():
            seconds, peak = timed(model, loss, device, args.bf16)
            if i:  # the first round warms up
                times[name].append(seconds)
            memory[name] = peak
    base = statistics.median(times['SiNGER'])
    print(f'\nbatch {args.batch}, {args.size} px, {device}, '
          f'{"bf16 autocast" if args.bf16 else "float32"}, median of '
          f'{args.rounds}')
    print('| step | seconds | relative to SiNGER | peak memory |')
    print('|---|---|---|---|')
    for name, values in times.items():
        median = statistics.median(values)
        peak = f'{memory[name] / 2**30:.2f} GiB' if memory[name] else '-'
        print(f'| {name} | {median:.3f} | {median / base:.3f} | {peak} |')
    interval = DiagnosticsHook().interval
    extra = statistics.median(times['SiNGER, measured']) / base - 1
    print(f'\nDiagnosticsHook, every {interval} iterations: '
          f'{extra / interval:+.3%} of the step time')


def timed(model, loss, device, bf16):
    """Seconds and peak GPU memory of one forward and backward pass."""
    model.zero_grad()
    model.teacher.zero_grad()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        total = loss()
    total.backward()
    if device == 'cuda':
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
    return time.perf_counter() - start, peak


if __name__ == '__main__':
    with readable_errors():
        main()
