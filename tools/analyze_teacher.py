"""Look at a teacher: has it artifacts, from which block on, what to choose?

    python tools/analyze_teacher.py CONFIG [CHECKPOINT] --images DIR

CONFIG is a distillation recipe (its teacher), a file of
configs/_base_/teachers, or any config whose backbone is a vision transformer.
Writes report.html, a page that needs nothing beside itself, and report.json.
docs/analysis.md explains the verdict.
"""
import os

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch

from mmsinger.analysis import (ImageFolder, analyse, load_subject,
                               natural_size, render)
from mmsinger.command_line import ToolParser
from mmsinger.engine.checks import check_work_dir
from mmsinger.engine.loading import open_config
from mmsinger.errors import readable_errors
from mmsinger.files import write_json, write_text
from mmsinger.images import check_patch
from mmsinger.schema import Count, Natural, Positive, Seed, reader


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('config', help='a recipe, a teacher, or a model')
    parser.add_argument('checkpoint', nargs='?',
                        help="the teacher's weights (default: the config's)")
    parser.add_argument('--images', required=True, metavar='DIR',
                        help='a folder of images, searched with all below')
    parser.add_argument('--out', metavar='DIR',
                        help='where to write (default: '
                        'work_dirs/analysis/CONFIG)')
    parser.add_argument('--num', type=reader(Count), default=64, metavar='N',
                        help='images to look at, a random choice')
    parser.add_size('--size', 'what images are brought to',
                    "the teacher's own")
    parser.add_argument('--samples', type=reader(Natural),
                        default=4, metavar='N',
                        help='images to show in the report')
    parser.add_argument('--batch-size', type=reader(Count),
                        default=8, metavar='N')
    parser.add_argument('--jacobian', type=reader(Natural),
                        nargs='?', const=2, default=0,
                        metavar='N', help='compare the FFN with the Jacobian '
                        'of whole blocks at N images (2 without a number): '
                        'slow')
    parser.add_argument('--jacobian-products', type=reader(Count), default=64,
                        metavar='N', help='Jacobian products for each block '
                        'and image; more find more')
    parser.add_argument('--mean', type=reader(float), nargs=3, metavar='X',
                        help="the teacher's normalisation, RGB, 0 to 255 "
                        "(default: the config's)")
    parser.add_argument('--std', type=reader(Positive), nargs=3, metavar='X')
    parser.add_argument('--seed', type=reader(Seed), default=0,
                        help='of the choice of images and all that is random')
    parser.add_cfg_options('the config')
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = open_config(args.config, args.cfg_options)
    name = os.path.splitext(os.path.basename(args.config))[0]
    out = args.out or os.path.join('work_dirs', 'analysis', name)
    check_work_dir(out, '--out')
    subject = load_subject(cfg, args.checkpoint, args.mean, args.std)
    size = args.size or natural_size(subject.teacher)
    patch = subject.teacher.blocks.stride
    check_patch(f'--size {size[0]} {size[1]}', size, patch)
    folder = ImageFolder(args.images, size, patch, args.num, args.seed)
    subject.teacher.to('cuda' if torch.cuda.is_available() else 'cpu')
    analysis = analyse(
        subject, folder, args.config, args.batch_size, args.samples,
        args.jacobian, args.jacobian_products, args.seed)

    paths = [os.path.join(out, f'report.{kind}') for kind in ('html', 'json')]
    write_text(render(analysis), paths[0])
    write_json(analysis.numbers(), paths[1])
    print(f'\n{analysis.verdict.headline}')
    for reason in analysis.verdict.reasons + subject.notes:
        print(f'- {reason}')
    if folder.skipped():
        print(f'- Skipped images: {folder.skipped()}.')
    print(f'\n{analysis.verdict.introduction}\n\n{analysis.snippet}\n'
          f'{paths[0]}\n{paths[1]}')


if __name__ == '__main__':
    with readable_errors():
        main()
