"""Train a model, plain or with a distiller, from a config.

    python tools/train.py configs/singer_vitl_to_vits_ade20k.py
"""

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)

from mmengine.dist import is_main_process

from mmsinger.checkpoint import safe_loading
from mmsinger.command_line import ToolParser
from mmsinger.engine.dry_run import dry_run
from mmsinger.engine.prepare import (build_runner, load_config,
                                     prepare_training, scale_learning_rate)
from mmsinger.engine.resume import (check_checkpoint_files,
                                    refuse_to_overwrite)
from mmsinger.errors import ConfigError, readable_errors


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('config', help='the config file')
    parser.add_argument(
        '--work-dir', help='where logs and checkpoints go '
        '(default: work_dirs/NAME of the config)')
    parser.add_argument(
        '--resume', nargs='?', const='auto', metavar='CHECKPOINT',
        help='go on from a checkpoint; without a path, from the latest one '
        'in the work dir')
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true',
        help="scale the learning rate by the actual over the recipe's batch "
        'size (auto_scale_lr.base_batch_size); actual is images a process, '
        'times processes, times accumulated iterations')
    parser.add_argument(
        '--no-validate', action='store_true',
        help='do not evaluate during training')
    parser.add_argument(
        '--dry-run', action='store_true',
        help='build everything, take a few steps, say what is trained and '
        'what it costs, and keep nothing')
    parser.add_cfg_options('CONFIG, for instance model.adapter.rank=32 '
                           'train_dataloader.batch_size=8')
    parser.add_launcher()
    return parser.parse_args()


def main():
    args = parse_args()
    options = dict(args.cfg_options or {})
    if args.amp:  # before options that it reads are looked up
        options['optim_wrapper.type'] = 'AmpOptimWrapper'
    cfg = load_config(args.config, options)
    missing = [key for key in ('model', 'train_dataloader', 'train_cfg',
                               'optim_wrapper') if not cfg.get(key)]
    if missing:
        raise ConfigError(f'{args.config!r} has no {", ".join(missing)}: '
                          'there is nothing to train. Give a recipe.')
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    if args.amp:
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    # A dumped config of a run that was resumed has both
    start = None if cfg.get('resume') else cfg.get('load_from')
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume

    if args.dry_run:
        report = dry_run(cfg)
        if is_main_process():
            print(report)
        return
    prepare_training(cfg)
    if args.resume == 'auto' and cfg.load_from is None and start is not None:
        cfg.resume, cfg.load_from = False, start  # there was nothing yet
        check_checkpoint_files(cfg)
    refuse_to_overwrite(cfg)
    build_runner(cfg).train()


if __name__ == '__main__':
    with readable_errors(), safe_loading():
        main()
