"""Results of :func:`mmsinger.analysis.measure.measure` to read."""
from typing import Any, Callable, Dict, Iterable, List

Row = List[str]

ROWS = dict(g_ffn1='G_FFN1', g_ffn2='G_FFN2', delta_ffn='delta FFN',
            delta_sa='delta SA')


def format_results(results: Dict[str, Dict[str, Any]]) -> str:
    """All tables as text.

    Args:
        results (dict): What ``measure`` returned.

    Returns:
        str: One table a metric.
    """
    formats: Dict[str, Callable[[Dict[str, Any]], str]] = dict(
        nullspace=_nullspace, cosine=_cosine, gram=_gram,
        inflation=_inflation, deviation=_deviation)
    return '\n\n'.join(formats[name](values)
                       for name, values in results.items())


def _nullspace(layers: Dict[str, Any]) -> str:
    rows = [[layer, values['block'], name, f"{values[key]['e_prob']:.4f}",
             f"{values[key]['e_safe']:.4f}"]
            for layer, values in layers.items()
            for name, key in (('phi_up', 'up'), ('phi_down^T', 'down'),
                              ('random', 'random'))]
    return _table('nullspace (Table 5a)',
                  ['layer', 'FFN of block', 'matrix', 'E_prob', 'E_safe'],
                  rows)


def _cosine(layers: Dict[str, Any]) -> str:
    rows = []
    for layer, values in layers.items():
        rows.append([layer, 'F and F_hat', _spread(values['refined'])])
        if 'next_block' in values:
            rows.append([int(layer) + 1, 'block outputs of F and F_hat',
                         _spread(values['next_block'])])
    return _table('cosine (Table 3)', ['layer', 'of', 'mean +- std'], rows)


def _gram(layers: Dict[str, Any]) -> str:
    rows = [[layer, name.replace('_', ' and '), _spread(spread, 3)]
            for layer, values in layers.items()
            for name, spread in values.items()]
    return _table('gram: D_G (Table 5b)', ['layer', 'of', 'mean +- std'],
                  rows)


def _inflation(blocks: Dict[str, Any]) -> str:
    rows = [[block, ROWS[field]] + [f'{values[field][key]:.4f}'
                              for key in ('mean', 'median', 'p95')]
            for block, values in blocks.items() for field in values]
    return _table('inflation (Table 7)',
                  ['block', 'of', 'mean', 'median', 'p95'], rows)


def _deviation(layers: Dict[str, Any]) -> str:
    rows = [[layer, values['block'], name] + [_spread(spread) for spread in
                                              values[name].values()]
            for layer, values in layers.items()
            for name in ('ours', 'jacobian', 'random')]
    return _table('deviation (Table 8)',
                  ['layer', 'output of block', 'directions', 'relative L2',
                   'cosine', 'CKA'], rows)


def _spread(values: Dict[str, float], digits: int = 4) -> str:
    return f"{values['mean']:.{digits}f} +- {values['std']:.{digits}f}"


def _table(title: str, head: Row, rows: Iterable[list]) -> str:
    cells = [head] + [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)
                       ).rstrip() for row in cells]
    return '\n'.join([title, *lines])
