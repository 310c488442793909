"""Convert timm's, transformers', DINOv2's … checkpoints for mmpretrain.

    python tools/convert_checkpoint.py SOURCE OUT [--img-size N] [--report]

Prints the backbone's config to paste as `teacher`.
"""

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsinger.command_line import ToolParser
from mmsinger.converters import LAYOUTS, convert_checkpoint
from mmsinger.converters.describe import ACTIVATIONS
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError, readable_errors, walk_config
from mmsinger.schema import Count, reader

# Where a config may have its backbone, first come first served
PLACES = ('model.teacher.backbone', 'teacher.backbone', 'model.backbone',
          'backbone')


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('source', metavar='SOURCE', help='the file to '
                        'convert: .pth, .bin, .safetensors')
    parser.add_argument('out', metavar='OUT', help='the file to write')
    parser.add_argument('--source', dest='family', default='auto',
                        choices=['auto', *LAYOUTS], help='whose layout SOURCE '
                        'has (default: from its keys)')
    parser.add_argument('--key', help="which entry of SOURCE holds the "
                        "weights, such as 'teacher' (default: the usual "
                        'ones)')
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        '--arch', help="mmpretrain's name of the architecture, such as l or "
        'dinov2-g (default: from the shapes)')
    target.add_argument(
        '--config', help='a config with the backbone to convert for: its '
        f'{", ".join(PLACES[:-1])} or {PLACES[-1]}')
    parser.add_argument('--num-heads', type=reader(Count),
                        help='attention heads, for '
                        'models of uncommon width')
    parser.add_argument('--act', choices=list(ACTIVATIONS),
                        help="the FFN's activation, for CLIP")
    parser.add_size('--img-size', 'resample the position embeddings for '
                    'images of this size', "the source's")
    parser.add_argument('--prefix', default='backbone.', help='what keys in '
                        "OUT begin with (default: 'backbone.')")
    parser.add_argument('--head', action='store_true', help='keep the '
                        'classification head, for logit distillation')
    parser.add_argument('--report', action='store_true',
                        help='list every tensor')
    args = parser.parse_args()
    if args.head and args.prefix.rstrip('.') != 'backbone':
        parser.error("--head is for a whole model, whose backbone's keys "
                     "begin with 'backbone.': leave --prefix out")
    return args


def read_backbone(path):
    """The backbone in a config file."""
    cfg = load_config(path)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    parts = dict(walk_config(cfg._cfg_dict))
    for place in PLACES:
        if 'type' in (parts.get(place) or ()):
            return parts[place].to_dict()
    raise ConfigError(f'--config={path!r} has no backbone: none of '
                      f'{", ".join(PLACES)}.')


def main():
    args = parse_args()
    backbone = read_backbone(args.config) if args.config else None
    result = convert_checkpoint(
        args.source, args.out, prefix=args.prefix, key=args.key,
        family=args.family,
        backbone=backbone, arch=args.arch, num_heads=args.num_heads,
        act=args.act, head=args.head,
        img_size=args.img_size)

    how = 'from its keys' if args.family == 'auto' else 'as you said'
    print(f'{args.source}: {LAYOUTS[result.family].title} layout '
          f'({result.family!r}, {how})')
    if args.report:
        print(result.report())
    for entry in [] if args.report else result.entries:
        if entry.action not in ('kept', 'renamed', 'joined'):
            print(f'  {entry.source}: {entry.action}')
    dropped = sum(not entry.target for entry in result.entries)
    print(f'{args.out}: {len(result.weights)} tensors, which load strictly '
          f'into {result.backbone["type"]}; {dropped} of '
          f'{len(result.entries)} were dropped.\n'
          'For a recipe (mean and std are not in the file: '
          'docs/converters.md lists them):\n')
    teacher = dict(backbone=result.backbone, checkpoint=args.out,
                   prefix=args.prefix)
    if result.head:
        classes, dim = result.head['layers.head.weight'].shape
        teacher['ignore_keys'] = ['head.']
    print(Config(dict(teacher=teacher)).pretty_text)
    if result.head:
        print('With its head, for LogitKDDistiller:\n')
        backbone = {key: value for key, value in result.backbone.items()
                    if key != 'out_type'}  # the class token, normalised
        print(Config(dict(teacher=dict(
            model=dict(
                type='mmpretrain.ImageClassifier', backbone=backbone,
                head=dict(type='mmpretrain.VisionTransformerClsHead',
                          num_classes=classes, in_channels=dim)),
            checkpoint=args.out))).pretty_text)


if __name__ == '__main__':
    with readable_errors():
        main()
