"""Say what is there of a data set, what is missing, and how to fix it.

    python tools/check_dataset.py pets --root /data/oxford-iiit-pet
    python tools/check_dataset.py configs/singer_vitl_to_vits_ade20k.py

NAME is a data set of the linear evaluation, checked against its published
form; any OpenMMLab config is checked for what its data loaders read. The exit
status is 1 if something is wrong.
"""
import sys

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)

from dataset_check import KNOWN, check_config, check_known
from mmsinger.command_line import ToolParser
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.schema import Count, reader


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument(
        'dataset', metavar='NAME|CONFIG',
        help=f'{", ".join(KNOWN)}, or a config file')
    parser.add_argument(
        '--root', help='where the data are (default: data_root of the config)')
    parser.add_argument(
        '--samples', type=reader(Count), default=64,
        help='images of each split to read (default: 64)')
    parser.add_argument(
        '--all', action='store_true', help='read every image')
    parser.add_cfg_options('CONFIG')
    return parser.parse_args()


def main():
    args = parse_args()
    samples = None if args.all else args.samples
    if args.dataset.endswith('.py'):
        cfg = load_config(args.dataset, args.cfg_options)
        report = check_config(cfg, args.dataset, args.root, samples)
    else:
        if args.cfg_options:
            raise ConfigError('--cfg-options belong to a config, and '
                              f'{args.dataset!r} is a name. Use --root, or '
                              'name a config file.')
        report = check_known(args.dataset, args.root, samples)
    print(report)
    sys.exit(1 if report.problems else 0)


if __name__ == '__main__':
    with readable_errors():
        main()
