"""Measure what refinement does: the paper's tables 3, 5a, 5b, 7 and 8.

    python tools/measure.py CONFIG CHECKPOINT

CONFIG is a distillation recipe and CHECKPOINT a training checkpoint of it;
without one the recipe is measured as it starts. docs/measure.md says what
each number means.
"""
from typing import Any, Dict

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import mmengine
import torch
from mmengine.runner import set_random_seed
from rich import box
from rich.console import Console
from rich.table import Table

from mmsinger.analysis.measure import (METRICS, applicable_metrics,
                                       check_metrics, measure)
from mmsinger.command_line import ToolParser
from mmsinger.engine.loading import (ImageBatches, calibrate_on,
                                     load_distiller, open_config)
from mmsinger.errors import check_output_file, readable_errors
from mmsinger.files import write_json
from mmsinger.schema import Count, Positive, Seed, reader

# Tables of the paper
TABLES = dict(nullspace='5a', cosine='3', gram='5b', inflation='7',
              deviation='8')


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('config', help='a distillation recipe')
    parser.add_argument('checkpoint', nargs='?',
                        help='a training checkpoint of it')
    parser.add_argument('--images', type=reader(Count),
                        default=256, metavar='N',
                        help='images to measure on, from val_dataloader, or '
                        'train_dataloader if there is none')
    parser.add_argument('--metrics', nargs='+', metavar='NAME',
                        help=f'which of {", ".join(METRICS)} (default: all '
                        'that the method has)')
    parser.add_argument('--out', default='metrics.json',
                        help='the JSON file to write')
    parser.add_argument('--seed', type=reader(Seed), default=0,
                        help='of the choice of images and all that is random')
    parser.add_argument('--strength', type=reader(Positive), default=0.3,
                        help='deviation: steps over the norm of a token')
    parser.add_argument('--jacobian-images', type=reader(Count),
                        default=8, metavar='N',
                        help='deviation: images at which blocks are '
                        'linearised')
    parser.add_argument('--jacobian-products', type=reader(Count), metavar='N',
                        help='deviation: Jacobian products for each layer '
                        'and image; fewer than the teacher has channels are '
                        'quicker and not exact (default: as many)')
    parser.add_cfg_options('the config')
    return parser.parse_args()


def main():
    args = parse_args()
    check_output_file(args.out)
    cfg = open_config(args.config, args.cfg_options)
    set_random_seed(args.seed)
    distiller = load_distiller(cfg, args.checkpoint)
    metrics = args.metrics or applicable_metrics(distiller)
    check_metrics(distiller, metrics)
    distiller.to('cuda' if torch.cuda.is_available() else 'cpu')
    batches = ImageBatches(cfg, distiller, args.images, args.seed)
    calibrate_on(distiller, batches)
    settings = dict(seed=args.seed, strength=args.strength,
                    jacobian_images=args.jacobian_images,
                    jacobian_products=args.jacobian_products)
    results = measure(distiller, batches, metrics, **settings)

    meta = dict(
        config=args.config, checkpoint=args.checkpoint,
        cfg_options=args.cfg_options, method=type(distiller).__name__,
        layers=distiller.layers, student_layers=distiller.student_layers,
        target_norm=cfg.model.get('target_norm'), images=len(batches),
        source=batches.source, **settings,
        versions=dict(mmsinger=mmsinger.__version__, torch=torch.__version__,
                      mmengine=mmengine.__version__))
    # An adapter that is zero has no energies
    write_json(dict(meta=meta, **results), args.out)
    print(f'\n{format_results(results)}\n\n{len(batches)} images of '
          f'{batches.source}; written to {args.out}')


def format_results(results: Dict[str, Dict[str, Any]]) -> str:
    """All tables as text.

    Args:
        results (dict): What ``measure`` returned.

    Returns:
        str: One table a metric, with the names that the JSON has.
    """
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        for metric, layers in results.items():
            rows = [{'layer': layer, 'of': name, **_cells(numbers)}
                    for layer, values in layers.items()
                    for name, numbers in values.items()
                    if isinstance(numbers, dict)]
            table = Table(*rows[0], title=f'{metric} (Table {TABLES[metric]})',
                          title_justify='left', box=box.MARKDOWN)
            for row in rows:
                table.add_row(*row.values())
            console.print(table)
    return '\n'.join(map(str.rstrip, capture.get().splitlines()))


def _cells(numbers: Dict[str, Any]) -> Dict[str, str]:
    if numbers.keys() == {'mean', 'std'}:
        numbers = {'mean +- std': numbers}
    return {name: '{mean:.4f} +- {std:.4f}'.format(**value)
            if isinstance(value, dict) else f'{value:.4f}'
            for name, value in numbers.items()}


if __name__ == '__main__':
    with readable_errors():
        main()
