"""Write the student alone out of a training checkpoint.

    python tools/export_student.py CHECKPOINT [--config CONFIG] [--out FILE]
        [--layout timm | --onnx]

Training writes the student in the plain layout by itself; this is for
checkpoints that have no student file beside them, for timm and for ONNX.
"""

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.registry import init_default_scope

from mmsinger.checkpoint import load_checkpoint
from mmsinger.command_line import ToolParser
from mmsinger.converters import export_onnx, export_timm
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.export import export_student


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('checkpoint', help='the training checkpoint; with '
                        '--layout timm or --onnx also a student file')
    parser.add_argument(
        '--config', help='the recipe, or the plain config of the student; if '
        'given, the weights must load strictly into it before anything is '
        'written')
    parser.add_argument(
        '--out', help='where to write (default: CHECKPOINT_student.pth, '
        '_student_timm.pth or _student.onnx)')
    parser.add_argument(
        '--layout', choices=['mm', 'timm'], default='mm',
        help="mm: mmpretrain's or mmseg's. timm: the backbone alone, for "
        'timm.create_model; needs --config (default: mm)')
    parser.add_argument(
        '--timm-model', metavar='NAME', help="timm's name of the backbone "
        '(default: from the config, for the families that docs/students.md '
        'names)')
    parser.add_argument(
        '--onnx', action='store_true',
        help='an ONNX file for batches of any size; needs --config')
    parser.add_size('--size', 'with --onnx, of the images',
                    "the backbone's, or 224")
    args = parser.parse_args()
    other = '--onnx' if args.onnx else \
        '--layout timm' if args.layout == 'timm' else ''
    if args.onnx and args.layout == 'timm':
        parser.error('--onnx and --layout timm are two files: export twice')
    if other and not args.config:
        parser.error(f'{other} builds the student: give its --config')
    if args.timm_model and args.layout != 'timm':
        parser.error('--timm-model is for --layout timm')
    if args.size and not args.onnx:
        parser.error('--size is for --onnx')
    return args


def main():
    args = parse_args()
    cfg = None
    if args.config:
        cfg = load_config(args.config)
        if not cfg.get('model'):
            raise ConfigError(f'--config {args.config!r} has no model.')
        init_default_scope(cfg.get('default_scope') or 'mmengine')
    if args.onnx:
        path, shape = export_onnx(args.checkpoint, cfg, args.out, args.size)
        print(f'{path}: image (N, {", ".join(map(str, shape))}), normalised '
              "as the config's data_preprocessor does it")
    elif args.layout == 'timm':
        path, found = export_timm(args.checkpoint, cfg, args.out,
                                  args.timm_model)
        print(f'{path}: {len(found.state_dict)} tensors'
              + (f', {len(found.left_out)} left out: '
                 f'{", ".join(found.left_out[:4])}'
                 + ' …' * (len(found.left_out) > 4)
                 if found.left_out else ''))
        arguments = ', '.join(f'{k}={v!r}' for k, v in found.kwargs.items())
        print(f'timm.create_model({found.model_name!r}, {arguments}, '
              f'checkpoint_path={path!r})')
    else:
        path = export_student(args.checkpoint, args.out, cfg)
        count = len(load_checkpoint(path)['state_dict'])
        print(f'{path}: {count} tensors')


if __name__ == '__main__':
    with readable_errors():
        main()
