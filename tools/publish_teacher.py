"""Make the demo's teacher file from a training run of its recipe.

    python tools/publish_teacher.py

Rounds the weights to float16, evaluates what is left, and writes the weights,
their SHA-256 and a README. `make teacher` trains and then calls this.
"""
import glob
import os

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.runner import Runner, find_latest_checkpoint

from mmsinger.checkpoint import load_strict, read_weights, sha256
from mmsinger.command_line import ToolParser
from mmsinger.engine.checks import check_data_folders
from mmsinger.engine.prepare import load_config
from mmsinger.errors import (ConfigError, check_output_file,
                             readable_errors)
from mmsinger.files import atomic_save, write_text

OUT = 'mmsinger/assets/digits_teacher.pth'
README = """\
# The demo's teacher

`{name}` is a ViT ({dims} channels, {layers} blocks, patch {patch}, convolutional stem)
with a segmentation head, trained on scenes composed from scikit-learn's
handwritten digits (`tools/make_digit_scenes.py`).

| | |
|---|---|
| SHA-256 | `{sha256}` |
| size | {size:,} bytes, float16 |
| mIoU on unseen digits | {miou:.2f} % ({num_val} validation scenes, 11 classes) |
| recipe | `{recipe}`, seed {seed}, {iters} iterations of batch {batch} |

`make teacher` repeats it and overwrites the files of this folder; the weights
differ a little between machines. `torch.load(path, weights_only=True)` gives
`state_dict` (the whole segmentor) and `meta`.
"""


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('--config', default='configs/demo/digits_teacher.py',
                        help='the recipe')
    parser.add_argument('--work-dir', default='work_dirs/digits_teacher',
                        help='where the recipe was trained')
    parser.add_argument('--out', default=OUT,
                        help='the file to write')
    return parser.parse_args()


def main():
    args = parse_args()
    check_output_file(args.out)
    # The settings of the run, --cfg-options included.
    dumped = os.path.join(args.work_dir, os.path.basename(args.config))
    path = find_latest_checkpoint(args.work_dir) if glob.glob(
        os.path.join(glob.escape(args.work_dir), '*.pth')) else None
    if path is None or not os.path.isfile(dumped):
        raise ConfigError(
            f'--work-dir={args.work_dir!r} holds no checkpoint, or no '
            f'{os.path.basename(dumped)}. Train first: python tools/train.py '
            f'{args.config} --work-dir {args.work_dir}')
    cfg = load_config(dumped)
    if 'embed_dims' not in str((cfg.model.get('backbone') or {}).get('arch')):
        raise ConfigError(
            f'--config={args.config!r}: model.backbone is no ViT whose arch '
            'is a dict, as in configs/demo/digits_teacher.py. This tool '
            'makes the file of the demo\'s teacher.')
    weights = read_weights(path)
    weights = {k: v.half() if v.is_floating_point() else v
               for k, v in weights.items()}

    cfg.work_dir = args.work_dir
    cfg.load_from, cfg.resume = None, False
    check_data_folders(cfg, ('test_dataloader', ))
    runner = Runner.from_cfg(cfg)
    load_strict(runner.model, weights, what=f'{dumped!r} and {path!r}',
                fix='Both must come from the same run.')
    miou = runner.test()['mIoU']

    dataset = runner.test_dataloader.dataset
    meta = dict(
        classes=list(dataset.metainfo['classes']),
        palette=dataset.metainfo['palette'],
        mIoU=float(miou),
        seed=cfg.randomness.seed,
        iterations=cfg.train_cfg.max_iters,
        recipe=args.config)
    name = os.path.basename(args.out)
    atomic_save(dict(state_dict=weights, meta=meta), args.out)
    digest = sha256(args.out)
    stem = os.path.splitext(args.out)[0]
    write_text(f'{digest}  {name}\n', stem + '.sha256')
    backbone = cfg.model.backbone
    # Beside the file that ships; elsewhere it would take the place of another
    page = os.path.join(os.path.dirname(args.out), 'README.md') \
        if args.out == OUT else stem + '.md'
    write_text(README.format(
        name=name, sha256=digest, size=os.path.getsize(args.out),
        miou=miou, num_val=len(dataset), recipe=args.config,
        seed=meta['seed'], iters=meta['iterations'],
        batch=cfg.train_dataloader.batch_size,
        dims=backbone.arch.embed_dims, layers=backbone.arch.num_layers,
        patch=backbone.patch_size), page)
    print(f'{args.out}: mIoU {miou:.2f} %, '
          f'{os.path.getsize(args.out) / 1e6:.2f} MB, SHA-256 {digest}')


if __name__ == '__main__':
    with readable_errors():
        main()
