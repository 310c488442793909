"""Evaluate a frozen student or teacher with a linear head, or by k-NN.

    python tools/linear_eval.py configs/linear_eval/seg_digits.py \\
        configs/demo/singer_digits.py work_dirs/NAME/iter_400_student.pth

Trains the head of TASK_CONFIG on the backbone of SOURCE_CONFIG, prints the
metrics and writes them to metrics.json in the work dir. The config that this
amounts to is there, too; tools/train.py repeats the run with it.
"""
import os

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from mmsinger.checkpoint import load_strict, read_weights, safe_loading
from mmsinger.command_line import ToolParser
from mmsinger.engine.prepare import (build_runner, launched, load_config,
                                     prepare_training)
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.files import write_json
from mmsinger.linear_eval import evaluation_config
from mmsinger.schema import Seed, reader


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('task', metavar='TASK_CONFIG',
                        help='one of configs/linear_eval')
    parser.add_argument('source', metavar='SOURCE_CONFIG',
                        help='a distillation recipe or a plain config')
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', nargs='?',
        help='a student file, a training checkpoint or a plain checkpoint '
        '(default with --teacher: the one that the recipe names)')
    parser.add_argument('--teacher', action='store_true',
                        help="evaluate the recipe's teacher")
    parser.add_argument(
        '--head', metavar='CHECKPOINT', help='train nothing: evaluate the '
        'head of an earlier linear evaluation on other data')
    parser.add_argument(
        '--work-dir', help='where logs and the head go '
        '(default: work_dirs/linear_eval/SOURCE/CHECKPOINT/TASK)')
    parser.add_argument(
        '--resume', action='store_true',
        help='go on from the latest checkpoint in the work dir')
    parser.add_argument('--seed', type=reader(Seed),
                        help="(default: the task's)")
    parser.add_cfg_options('the task config')
    parser.add_cfg_options('the source config', '--source-options')
    parser.add_launcher()
    args = parser.parse_args()
    if args.head and args.resume:
        parser.error('--head trains nothing that --resume could go on with')
    return args


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


class LastMetrics(Hook):
    """Keeps what the last validation found: lists, too, which logs leave
    out."""
    metrics = {}

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics or {}


def divide_batch(cfg):
    """Divide the images of a step among the processes.

    Raises:
        ConfigError: If they cannot be divided.
    """
    loader, processes = cfg.get('train_dataloader'), launched(cfg)[1]
    if not loader or 'batch_size' not in loader:
        return
    if loader.batch_size % processes:
        raise ConfigError(
            f'train_dataloader.batch_size={loader.batch_size} images a step '
            f'cannot be divided among {processes} processes. Start another '
            'number of them, or set another batch size with --cfg-options.')
    loader.batch_size //= processes


def load_head(model, path, option, task, fix):
    """Load a head that was trained on the same backbone.

    Raises:
        ConfigError: If it does not fit, or was trained on another backbone.
    """
    model.backbone.load_weights()
    expected = {key: value.clone()
                for key, value in model.backbone.state_dict().items()}
    load_strict(
        model, read_weights(path, option),
        what=f'{option} {path!r} and {task!r}',
        fix='Give a checkpoint that tools/linear_eval.py made with the '
        'same source and the same number of classes.')
    found = model.backbone.state_dict()
    if not all(torch.equal(found[key], value)
               for key, value in expected.items()):
        raise ConfigError(f'{option} {path!r} was trained on other weights '
                          f'than {model.backbone.checkpoint!r}. {fix}')


def main():
    args = parse_args()
    cfg = evaluation_config(
        load_config(args.task, args.cfg_options),
        load_config(args.source, args.source_options), args.checkpoint,
        args.teacher)
    cfg.launcher = args.launcher
    evaluated = stem(args.source) + ('_teacher' if args.teacher else '')
    cfg.work_dir = args.work_dir or os.path.join(
        'work_dirs', 'linear_eval', evaluated, stem(args.checkpoint or ''),
        stem(args.task))
    if args.seed is not None:
        cfg.setdefault('randomness', {})['seed'] = args.seed
    if args.head:
        for key in ('train_dataloader', 'train_cfg', 'optim_wrapper',
                    'param_scheduler'):
            cfg[key] = None
    else:
        divide_batch(cfg)
    if args.resume:
        cfg.resume = True
    prepare_training(cfg)
    runner = build_runner(cfg)
    if args.head:
        load_head(unwrap(runner.model), args.head, '--head', args.task,
                  'Give the head of this one, from its own work dir.')
    elif cfg.get('resume') and cfg.get('load_from'):
        load_head(unwrap(runner.model), cfg.load_from, '--resume', args.task,
                  'Leave --resume out, or choose another --work-dir.')
    found = LastMetrics()
    runner.register_hook(found)
    if cfg.get('train_cfg') is None:  # a trained head, or k-NN
        runner.val()
    else:
        runner.train()
    if is_main_process():
        write_json(found.metrics, os.path.join(cfg.work_dir, 'metrics.json'))
        print(f'{evaluated} on {stem(args.task)}: ' + ', '.join(
            f'{name} {value:.4f}' for name, value in found.metrics.items()
            if not isinstance(value, list)))


if __name__ == '__main__':
    with readable_errors(), safe_loading():
        main()
