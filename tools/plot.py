"""Draw the paper's figures 1b, 2, 4 and 6, and training curves.

    python tools/plot.py radar table1.csv --out radar.pdf
    python tools/plot.py norms CONFIG CHECKPOINT IMAGE... --out norms.png
    python tools/plot.py similarity CONFIG CHECKPOINT IMAGE... --patch 0.3 0.6
    python tools/plot.py pca CONFIG CHECKPOINT IMAGE...
    python tools/plot.py sweep sweep.csv
    python tools/plot.py curves WORK_DIR... --keys 'diagnostics/cosine_*'

CONFIG is a distillation recipe and CHECKPOINT a training checkpoint of it. The
suffix of --out says what is written: PNG, SVG or PDF.
"""
import fnmatch
import os
from typing import Annotated, Dict, List, Optional, Sequence

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmsinger.command_line import ToolParser
from mmsinger.engine.loading import load_distiller, natural_size, open_config
from mmsinger.errors import (ConfigError, near_matches, no_file,
                             readable_errors)
from mmsinger.figures import (draw_curves, draw_maps, extract_features,
                              pictures_of, read_curves, save_figure)
from mmsinger.figures.curves import Curve
from mmsinger.figures.style import check_output
from mmsinger.images import (Size, check_patch, cover, read_image,
                             with_channels)
from mmsinger.models import FeatureDistiller
from mmsinger.models.features.anatomy import image_channels
from mmsinger.schema import Range, reader
from reproduction.figures import draw_radar, draw_sweep, read_table


def parse_args():
    parser = ToolParser(__doc__)
    figures = parser.add_subparsers(dest='figure', required=True)

    def add(name, text, draw):
        figure = figures.add_parser(name, help=text, description=text)
        figure.add_argument('--out', default=f'{name}.png',
                            help='.png, .svg or .pdf')
        figure.set_defaults(draw=draw)
        return figure

    radar = add('radar', 'figure 1b: methods over the columns of Table 1',
                lambda args: draw_radar(read_table(args.csv, 'table1'),
                                        args.values))
    radar.add_argument('csv', help='table1.csv of tools/reproduce.py')
    radar.add_argument('--values', default='measured',
                       choices=('measured', 'published'))
    for name, kind, text in (
            ('norms', 'norm',
             'figure 2: norm maps before and after refinement'),
            ('similarity', 'similarity',
             'figure 4: similarity to a marked patch'),
            ('pca', 'pca', 'main directions of patch tokens as colours')):
        maps = add(name, text, map_figure)
        maps.set_defaults(kind=kind, patch=(0.5, 0.5))
        maps.add_argument('config', help='a distillation recipe')
        maps.add_argument('checkpoint', help='a training checkpoint of it')
        maps.add_argument('images', nargs='+', help='image files')
        maps.add_size('--size', 'what images are brought to',
                      "the student's own")
        maps.add_cfg_options('the config')
        if name == 'similarity':
            maps.add_argument('--patch', nargs=2, type=reader(
                Annotated[float, Range(0, 1, '[)')]),
                              metavar=('DOWN', 'RIGHT'), help='where the '
                              'marked patch is, as shares of height and width')
    sweep = add('sweep', 'figure 6: depth error by rank and quantile',
                lambda args: draw_sweep(read_table(args.csv, 'sweep')))
    sweep.add_argument('csv', help='sweep.csv of tools/reproduce.py')
    curves = add('curves', 'training curves of one or several runs',
                 curve_figure)
    curves.add_argument('work_dirs', nargs='+', metavar='WORK_DIR')
    curves.add_argument('--keys', nargs='+', metavar='NAME',
                        help="names in the log, or patterns such as "
                        "'diagnostics/cosine_*' (default: losses and "
                        'accuracies)')
    return parser.parse_args()


def curve_figure(args):
    names = run_names(args.work_dirs)
    runs = dict(zip(names, map(read_curves, args.work_dirs)))
    merged = {key: curve for curves in runs.values()
              for key, curve in curves.items()}
    return draw_curves(runs, choose_keys(merged, args.keys))


def choose_keys(curves: Dict[str, Curve], patterns: Optional[Sequence[str]]
                ) -> List[str]:
    """Which curves to draw.

    Args:
        curves (dict[str, Curve]): All there are.
        patterns (Sequence[str], optional): Names, or patterns such as
            ``'diagnostics/cosine_*'``. None: losses and accuracies.

    Returns:
        list[str]: Names, in order.

    Raises:
        ConfigError: If a pattern fits none; near matches are listed.
    """
    names = sorted(curves)
    if not patterns:
        chosen = [name for name in names if 'loss' in name or not (
            name.startswith(('diagnostics/', 'distill.')) or 'lr' in name
            or 'grad_norm' in name)]
        if not chosen:
            raise ConfigError(
                'The logs hold no losses and no accuracies. Choose with '
                f'--keys from {", ".join(names)}.')
        return chosen
    chosen: List[str] = []
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ConfigError(
                f'--keys {pattern}: nothing in the logs is called so.'
                f'{near_matches(pattern, names)} There are '
                f'{", ".join(names)}.')
        chosen += [name for name in found if name not in chosen]
    return chosen


def run_names(work_dirs: Sequence[str]) -> List[str]:
    """Short names that differ: as many last folders as it takes.

    Args:
        work_dirs (Sequence[str]): Paths.

    Returns:
        list[str]: A name for each.

    Raises:
        ConfigError: If a path is given twice.
    """
    parts = [os.path.normpath(os.path.abspath(path)).split(os.sep)
             for path in work_dirs]
    if len(set(map(tuple, parts))) < len(parts):
        raise ConfigError('A work dir is given twice.')
    for length in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def read_images(paths: Sequence[str], distiller: FeatureDistiller,
                size: Optional[Size] = None) -> Tensor:
    """Read image files as the student is fed with them.

    Args:
        paths (Sequence[str]): Files.
        distiller (FeatureDistiller): Its data preprocessor is used.
        size (tuple[int, int], optional): H and W, see
            :func:`mmsinger.images.cover`. Defaults to None: the student's own
            ``img_size``, 224 if it names none.

    Returns:
        Tensor: Preprocessed images, shape (B, 3, H, W).

    Raises:
        ConfigError: If a file is missing, is no image, or is smaller than a
            patch of teacher or student; or if ``size`` is.
    """
    if not paths:
        raise ConfigError('No image files were given. Name at least one.')
    student = distiller.student_backbone
    patch = tuple(map(max, distiller.teacher.blocks.stride,
                      distiller.student_features.stride))
    size = size or natural_size(student)
    check_patch(f'size {size[0]}x{size[1]}', size, patch)
    images = []
    for path in paths:
        if not os.path.isfile(path):
            raise ConfigError(
                f'image {path!r}: {no_file(path)}')
        image = read_image(path)
        if image is None:
            raise ConfigError(
                f'image {path!r} cannot be read: it is damaged or no image. '
                'Leave it out, or save it as PNG or JPEG.')
        check_patch(f'image {path!r} of {image.shape[0]}x{image.shape[1]} '
                    'pixels', image.shape, patch)
        images.append(with_channels(cover(image, size), image_channels(
            student)).flip(0))  # BGR, as pipelines give
    preprocessor = distiller.data_preprocessor
    # mmseg's asks for samples where it pads pictures
    samples = [BaseDataElement() for _ in images] if getattr(
        preprocessor, 'test_cfg', None) else None
    inputs = preprocessor(dict(inputs=images, data_samples=samples),
                          False)['inputs']
    return inputs if torch.is_tensor(inputs) else \
        torch.stack([image.float() for image in inputs])


def map_figure(args):
    distiller = load_distiller(
        open_config(args.config, args.cfg_options), args.checkpoint)
    distiller.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
    inputs = read_images(args.images, distiller, args.size)
    features = extract_features(distiller, inputs)
    images = pictures_of(distiller, inputs)
    note = f'{os.path.basename(args.config)}, ' \
        f'{os.path.basename(args.checkpoint)}; images: ' \
        f'{", ".join(map(os.path.basename, args.images))}.'
    # File names may hold bytes that no text can
    note = note.encode(errors='backslashreplace').decode()
    return draw_maps(args.kind, images, features, note, tuple(args.patch))


def main():
    args = parse_args()
    check_output(args.out)
    save_figure(args.draw(args), args.out)
    print(f'Written to {args.out}')


if __name__ == '__main__':
    with readable_errors():
        main()
