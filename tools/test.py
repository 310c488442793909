"""Evaluate a model, or the student of a distiller, on the test set.

    python tools/test.py CONFIG CHECKPOINT

With a distillation recipe, the plain student is built and evaluated; the
checkpoint may be a training checkpoint or a student-only file.
"""
import argparse
import os

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.config import DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmsinger.checkpoint import load_strict
from mmsinger.engine.config import (check_data_folders, check_work_dir,
                                    load_config)
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.export import is_distiller, load_student, student_config


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='the config file')
    parser.add_argument(
        'checkpoint', nargs='?', help='the checkpoint file (not needed for a '
        'model that loads its own, such as mmsinger.KNNClassifier)')
    parser.add_argument(
        '--work-dir', help='where logs and metrics go '
        '(default: work_dirs/NAME of the config)')
    parser.add_argument(
        '--out', help='where the metric writes its predictions, for metrics '
        'that can (output_dir)')
    parser.add_argument(
        '--show-dir', help='where painted predictions are written, below the '
        'work dir')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
        help='override settings of the config')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none', help='how a distributed job was started')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    if args.out:
        cfg.test_evaluator['output_dir'] = args.out
        cfg.test_evaluator['keep_results'] = True
    if args.show_dir:
        if 'visualization' not in cfg.get('default_hooks', {}):
            raise ConfigError('--show-dir: the config has no default_hooks.'
                              'visualization hook that could paint.')
        cfg.default_hooks.visualization.draw = True
        cfg.visualizer.save_dir = args.show_dir
    check_work_dir(cfg.work_dir)
    check_data_folders(cfg, ('test_dataloader', ))

    init_default_scope(cfg.get('default_scope') or 'mmengine')
    distilled = is_distiller(cfg.model)
    cfg = student_config(cfg)
    weights = load_student(args.checkpoint)['state_dict'] \
        if args.checkpoint else None
    cfg.load_from, cfg.resume = None, False
    runner = Runner.from_cfg(cfg)
    model = unwrap(runner.model)
    if weights is not None:
        load_strict(
            model, weights,
            what=f"{'student' if distilled else 'model'} of {args.config!r} "
            f'and checkpoint {args.checkpoint!r}',
            fix='Give the config that the checkpoint was trained with.')
    elif getattr(model, 'needs_checkpoint', True):
        raise ConfigError(f'A {type(model).__name__} needs a checkpoint: '
                          f'python tools/test.py {args.config} CHECKPOINT')
    runner.test()


if __name__ == '__main__':
    with readable_errors():
        main()
