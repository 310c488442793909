"""The report: one HTML page that needs nothing beside itself."""
from html import escape
from typing import Any, List, Optional, Sequence

from mmsinger.analysis.analyse import Analysis
from mmsinger.analysis.charts import (Line, line_chart, map_uri, photo_uri,
                                      ridge_chart)
from mmsinger.analysis.style import STYLE
from mmsinger.analysis.verdict import percent


def render(analysis: Analysis) -> str:
    """Make the page.

    Args:
        analysis (Analysis): From :func:`mmsinger.analysis.analyse`.

    Returns:
        str: HTML, with its style, its charts (SVG) and its pictures (data
        URIs) inside; no script.
    """
    sections = [
        _verdict(analysis), _norms(analysis), _samples(analysis),
        _nullspaces(analysis), _jacobian(analysis), _table(analysis),
        _settings(analysis)
    ]
    title = f'Teacher report: {analysis.meta["config"]}'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src '
        "'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style></head><body><main>\n'
        f'<h1>Teacher report</h1>{_subtitle(analysis)}\n'
        + '\n'.join(sections) + '\n</main></body></html>\n')


def _section(name: str, title: str, *content: str) -> str:
    return (f'<section id="{name}"><h2>{escape(title)}</h2>'
            + '\n'.join(content) + '</section>')


def _paragraph(text: str, style: str = '') -> str:
    return f'<p{f" class={style!r}" if style else ""}>{escape(text)}</p>'


def _list(items: Sequence[str]) -> str:
    return '<ul>' + ''.join(f'<li>{escape(i)}</li>' for i in items) + '</ul>'


def _figure(content: str, caption: str) -> str:
    return (f'<figure>{content}<figcaption>{escape(caption)}</figcaption>'
            '</figure>')


def _image(uri: str, text: str, style: str = '') -> str:
    return f'<img src="{uri}" alt="{escape(text)}" class="{style}">'


def _grid(*figures: str) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = ''.join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = ''.join(
        '<tr>' + ''.join(f'<td>{escape(_cell(c))}</td>' for c in row)
        + '</tr>' for row in rows)
    return ('<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(head[0])} table"><table><thead><tr>{cells}'
            f'</tr></thead><tbody>{body}</tbody></table></div>')


def _cell(value: Any) -> str:
    if value is None:
        return '–'
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def _subtitle(analysis: Analysis) -> str:
    meta = analysis.meta
    rows, columns = meta['grid']
    return _paragraph(
        f'{meta["backbone"]}, {meta["blocks"]} blocks of '
        f'{meta["channels"]} channels, {rows} x {columns} patches, on '
        f'{meta["images"]} images. Blocks are counted from 0.', 'subtitle')


def _verdict(analysis: Analysis) -> str:
    verdict = analysis.verdict
    if verdict.status == 'artifacts':
        advice = 'Settings to begin with:'
    else:
        advice = ('If you want to try SiNGER all the same, these are the '
                  "paper's settings for a teacher of this depth:")
    configured = analysis.meta['configured_layers']
    notes = list(analysis.meta['notes'])
    if configured is not None:
        notes.append(f'The config itself distils the layers {configured}.')
    return _section(
        'verdict', 'Verdict',
        f'<div class="card {verdict.status}"><p class="headline">'
        f'{escape(verdict.headline)}</p>'
        f'{_list(verdict.reasons)}</div>',
        _paragraph(advice), f'<pre>{escape(analysis.snippet)}</pre>',
        _list(notes))


def _norms(analysis: Analysis) -> str:
    layers = analysis.collection.layers
    onset = analysis.verdict.onset
    marks = [] if onset is None else [(onset, 'artifacts begin')]

    def series(name: str, factor: float = 1.) -> List[Optional[float]]:
        values = [layer.mean(name) for layer in layers]
        return [None if v is None else factor * v for v in values]

    ratio = line_chart(
        'Largest and 99th percentile norm over the median, by block',
        [Line('largest norm / median', series('max_over_median'), 'second'),
         Line('99th percentile / median', series('p99_over_median'),
              'first')], 'block', False, 'x', marks)
    share = line_chart(
        'Share of outlier tokens, by block',
        [Line('far: 10 robust deviations and twice the median',
              series('far_share', 100), 'second'),
         Line('robust: 5 robust deviations', series('robust_share', 100),
              'first'),
         Line('above the 0.95 quantile', series('quantile_share', 100),
              'third')], 'block', False, '%', marks)
    ridges = ridge_chart(
        'Distribution of norms in every block',
        [layer.histogram for layer in layers], analysis.verdict.affected)
    return _section(
        'norms', 'Norms of the patch tokens',
        _grid(
            _figure(ratio, 'How far the longest patch tokens of an image '
                    'exceed its median; mean over the images.'),
            _figure(share, 'How many patch tokens are outliers, by three '
                    'measures. About 5 % are above the 0.95 quantile of '
                    'their image in any teacher.'),
            _figure(ridges, 'All norms of each block (the first on top), '
                    'each over the median of its image. Heights are '
                    'logarithmic, to show small groups. Blocks with '
                    'artifacts are set off in colour: look for a separate '
                    'hill on the right.')))


def shown_blocks(analysis: Analysis) -> List[int]:
    """The blocks whose norm maps are shown: before and at the onset, those
    suggested, and the last; without an onset the first one too."""
    onset = analysis.verdict.onset
    chosen = {*analysis.suggestion.layers, len(analysis.collection.layers) - 1}
    chosen |= {0} if onset is None else {max(0, onset - 1), onset}
    return sorted(chosen)


def _samples(analysis: Analysis) -> str:
    collection = analysis.collection
    blocks = shown_blocks(analysis)
    rows = []
    for sample in collection.samples:
        top = max(float(sample.norms[b].max()) for b in blocks)
        pictures = [_figure(_image(photo_uri(sample.image), sample.name),
                            sample.name)]
        for block in blocks:
            norms, far = sample.norms[block], sample.far[block]
            pictures.append(_figure(
                _image(map_uri(norms, top, far),
                       f'Norm map of {sample.name} after block {block}'),
                f'block {block}: largest {float(norms.max()):.1f}x, '
                f'{int(far.sum())} far'))
        rows.append(f'<div class="maps">{"".join(pictures)}</div>')
    if rows:
        rows.insert(0, _paragraph(
            'Patch norms of the first images of a random choice, over the '
            "image's median, one scale for each row from 0 (dark blue) to "
            "the row's largest (yellow). Far outliers are framed in red."))
    return _section('samples', 'Where the long tokens are', *rows,
                    _positions(analysis))


def _positions(analysis: Analysis) -> str:
    layers = analysis.collection.layers
    shares = [layer.mean('far_share') for layer in layers]
    block = analysis.verdict.onset
    if block is None:
        block = max(range(len(layers)), key=lambda i: shares[i])
    record = layers[block]
    if not shares[block]:
        return _paragraph('No block has a single far outlier.')
    rank = record.mean('contrast_rank')
    where = 'plainer' if rank < 0.5 else 'richer'
    share = record.positions.double() / analysis.collection.count
    return '<div class="figures">' + _figure(
        _image(map_uri(share, float(share.max())),
               f'Positions of far outliers after block {block}', 'small'),
        f'All images, block {block}: how often a patch is a far outlier, '
        f'from never (dark blue) to {percent(float(share.max()))} of the '
        'images (yellow).') + '</div>' + _paragraph(
        f'After block {block}, far outliers stand on patches {where} than '
        f'{100 * max(rank, 1 - rank):.0f} % of their image, '
        'by the contrast of its pixels (50 % would be chance). Artifacts '
        'prefer plain patches; long tokens on rich ones may be content.')


def _nullspaces(analysis: Analysis) -> str:
    following = {min(layer + 1, len(analysis.spectra) - 1): layer
                 for layer in analysis.suggestion.layers}
    lines = []
    for index, spectrum in enumerate(analysis.spectra):
        values = spectrum['singular_values']
        floor = max(values[0] * 1e-6, 1e-12)
        points = [max(values[round(i * (len(values) - 1) / 100)], floor)
                  for i in range(101)]
        if index in following:
            style = ('first', 'second')[index == max(following)]
            lines.append(Line(f'block {index}', points, style))
        else:
            lines.insert(0, Line('', points, 'faint'))
    lines.insert(0, Line('other blocks', [None], 'faint'))
    chart = line_chart(
        'Singular values of the linearised FFN of every block', lines,
        'directions, most visible first, % of all', True, dots=False)
    rows = [[index, s['singular_values'][0], s['singular_values'][-1],
             s['nullspace']['relative'], s['nullspace']['absolute'],
             s['e_safe'], s['e_prob']]
            for index, s in enumerate(analysis.spectra)]
    return _section(
        'nullspace', 'Nullspaces of the FFNs',
        _grid(_figure(chart, 'Spectra of all linearised FFNs; in colour '
                      'those that the suggested layers would use.')),
        _paragraph(
            'Nullspace: directions with a singular value below 5 % of the '
            "largest, and below 0.05 (the official code's threshold). E_safe "
            'and E_prob: how much of the energy of the artifacts lies in the '
            'quarter of directions that the FFN sees least, and most; 0.25 '
            'is chance. With a small E_safe the paper\'s starting point is '
            'no better than another: training has to turn the adapter.'),
        _rows(['block', 'largest', 'smallest', 'nullspace 5 %',
               'nullspace 0.05', 'E_safe', 'E_prob'], rows))


def _jacobian(analysis: Analysis) -> str:
    if analysis.jacobian is None:
        content = [_paragraph(
            'Not measured. Add --jacobian to compare the FFN, which SiNGER '
            'takes as a stand-in, with the whole block.')]
    else:
        rows, skipped = [], []
        for layer, result in enumerate(analysis.jacobian):
            if 'skipped' in result:
                skipped.append(f'Layer {layer} is left out: '
                               f'{result["skipped"]}')
                continue
            rows.append([layer, result['block'], result['overlap'],
                         result['chance']] + [
                             result[name]['relative_l2']
                             for name in ('ffn', 'jacobian', 'random')])
        content = [_paragraph(
            'Overlap: of the least visible directions of the linearised FFN '
            'and of the whole block (1: the same; chance: random ones). L2: '
            'how much the output of the block changes, relative to its '
            'length, when patch tokens move by 0.3 of theirs along each; '
            'smaller is less visible. Few images and products: an estimate.')]
        content.append(_rows(
            ['layer', 'next block', 'overlap', 'chance', 'L2, FFN',
             'L2, Jacobian', 'L2, random'], rows))
        content.append(_list(skipped))
    return _section('jacobian', 'FFN against Jacobian', *content)


def _table(analysis: Analysis) -> str:
    verdict = analysis.verdict
    rows = []
    for index, record in enumerate(analysis.collection.layers):
        evidence = record.evidence()
        signs = [name for name, shown in
                 verdict.signs[index]._asdict().items() if shown]
        rows.append([
            index, ', '.join(signs) or '–',
            *(record.mean(name) for name in (
                'median', 'p95', 'p99', 'max_over_median', 'kurtosis')),
            *(100 * record.mean(f'{name}_share')
              for name in ('quantile', 'robust', 'far')),
            100 * record.mean('far_images'),
            evidence.group and evidence.group.ratio,
            evidence.group and 100 * evidence.group.share,
            record.stayed and 100 * record.stayed,
            record.mean('contrast_rank'), evidence.dimensions or None])
    return _section(
        'blocks', 'All blocks',
        _rows(['block', 'signs', 'median', 'p95', 'p99', 'max / median',
               'kurtosis', '> q 0.95, %', 'robust, %', 'far, %',
               'images with far, %', 'group at', 'group, %',
               'far before and still, %', 'contrast rank', 'dimensions'],
              rows),
        _paragraph(
            'Norm statistics are means over images. Group: tokens above a '
            'gap in the distribution, at so many medians. Dimensions: '
            'directions that hold 90 % of what far outliers have beyond the '
            'other tokens of their image.'))


def _settings(analysis: Analysis) -> str:
    meta = analysis.meta
    skipped = meta['unreadable'] + meta['too_small']
    pairs = [
        ('config', f'{meta["config"]} ({meta["part"]})'),
        ('checkpoint', meta['checkpoint'] or 'none: random weights'),
        ('images', f'{meta["images"]} of {meta["folder"]}, seed '
         f'{meta["seed"]}, {meta["image_size"][0]} x '
         f'{meta["image_size"][1]} px'),
        ('skipped images', f'{skipped}: {meta["skipped"]}' if skipped
         else 'none'),
        ('versions', ', '.join(f'{k} {v}'
                               for k, v in meta['versions'].items())),
    ]
    items = ''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>'
                    for k, v in pairs)
    return _section(
        'settings', 'How this was measured', f'<dl>{items}</dl>',
        _paragraph(
            'A block has artifacts if it shows two of three signs. Far: at '
            'least 0.1 % of the tokens, in 10 % of the images, exceed their '
            "image's median by 10 robust standard deviations, both of this "
            'image and of all, and by a factor of 2. Separate: at least '
            '0.1 % and at most 15 % of the tokens form a group above a gap '
            'in the distribution that is at least half empty. Sudden: '
            'the largest norm over the median grows by half or more over '
            'this block alone. Later blocks keep them '
            'while they are far or separate. One sign without another is '
            'called unclear.'))
