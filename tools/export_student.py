"""Write the student alone out of a training checkpoint.

    python tools/export_student.py CHECKPOINT [--config CONFIG] [--out FILE]

Training does this by itself; this is for checkpoints that have no student
file beside them.
"""

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.registry import init_default_scope

from mmsinger.checkpoint import load_checkpoint
from mmsinger.engine.prepare import load_config
from mmsinger.errors import readable_errors
from mmsinger.export import export_student
from mmsinger.schema import ToolParser


def parse_args():
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='the training checkpoint')
    parser.add_argument(
        '--config', help='the recipe; if given, the weights must load '
        'strictly into its plain student before anything is written')
    parser.add_argument(
        '--out', help='where to write (default: CHECKPOINT_student.pth '
        'beside it)')
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = None
    if args.config:
        cfg = load_config(args.config)
        init_default_scope(cfg.get('default_scope') or 'mmengine')
    path = export_student(args.checkpoint, args.out, cfg)
    count = len(load_checkpoint(path)['state_dict'])
    print(f'{path}: {count} tensors')


if __name__ == '__main__':
    with readable_errors():
        main()
