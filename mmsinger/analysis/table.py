"""Results of :func:`mmsinger.analysis.measure.measure` to read."""
from typing import Any, Dict, Iterator, Tuple

from rich import box
from rich.console import Console
from rich.table import Table

INFLATION = dict(g_ffn1='G_FFN1', g_ffn2='G_FFN2', delta_ffn='delta FFN',
                 delta_sa='delta SA')
TITLES = dict(
    nullspace='nullspace (Table 5a)', cosine='cosine (Table 3)',
    gram='gram: D_G (Table 5b)', inflation='inflation (Table 7)',
    deviation='deviation (Table 8)')
COLUMNS = dict(
    nullspace=('layer', 'FFN of block', 'matrix', 'E_prob', 'E_safe'),
    cosine=('layer', 'of', 'mean +- std'),
    gram=('layer', 'of', 'mean +- std'),
    inflation=('block', 'of', 'mean', 'median', 'p95'),
    deviation=('layer', 'output of block', 'directions', 'relative L2',
               'cosine', 'CKA'))


def format_results(results: Dict[str, Dict[str, Any]]) -> str:
    """All tables as text.

    Args:
        results (dict): What ``measure`` returned.

    Returns:
        str: One table a metric.
    """
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        for metric, layers in results.items():
            table = Table(*COLUMNS[metric], title=TITLES[metric],
                          title_justify='left', box=box.MARKDOWN)
            for layer, values in layers.items():
                for row in _rows(metric, layer, values):
                    table.add_row(*map(str, row))
            console.print(table)
    return '\n'.join(map(str.rstrip, capture.get().splitlines()))


def _rows(metric: str, layer: str, values: Dict[str, Any]) -> Iterator[Tuple]:
    if metric == 'nullspace':
        for name, key in (('phi_up', 'up'), ('phi_down^T', 'down'),
                          ('random', 'random')):
            yield (layer, values['block'], name,
                   f"{values[key]['e_prob']:.4f}",
                   f"{values[key]['e_safe']:.4f}")
    elif metric == 'cosine':
        yield layer, 'F and F_hat', _spread(values['refined'])
        if 'next_block' in values:
            yield (int(layer) + 1, 'block outputs of F and F_hat',
                   _spread(values['next_block']))
    elif metric == 'gram':
        for name, spread in values.items():
            yield layer, name.replace('_', ' and '), _spread(spread, 3)
    elif metric == 'inflation':
        for field, numbers in values.items():
            yield (layer, INFLATION[field], *(
                f'{numbers[key]:.4f}' for key in ('mean', 'median', 'p95')))
    else:
        for name in ('ours', 'jacobian', 'random'):
            yield (layer, values['block'], name,
                   *map(_spread, values[name].values()))


def _spread(values: Dict[str, float], digits: int = 4) -> str:
    return f"{values['mean']:.{digits}f} +- {values['std']:.{digits}f}"
