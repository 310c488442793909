"""How much of a teacher's features do a student's determine, linearly?

    python tools/explained_variance.py TASK SOURCE CHECKPOINT TEACHER

TASK is a classification of configs/linear_eval, whose training and test
images and kind of feature (model.backbone.output) are used; SOURCE and
CHECKPOINT are as of tools/linear_eval.py. TEACHER is a file of
configs/_base_/teachers. A ridge regression from the student's features to
the teacher's is fitted on the training images; printed is the share of the
teacher's variance on the test images that it explains, over all channels, each
scaled to unit variance. Needs no labels, and tells students apart that a
classification of a few hundred images does not.
"""
from typing import List

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor

from mmsinger.checkpoint import safe_loading
from mmsinger.command_line import ToolParser
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError, check_output_file, readable_errors
from mmsinger.files import write_json
from mmsinger.images import dataset_batches
from mmsinger.linear_eval import evaluation_config
from mmsinger.registry import MODELS

RIDGE = 0.05  # penalty for each training image, of standardised features
CONSTANT = 1e-6  # a channel's standard deviation


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('task', metavar='TASK',
                        help='a classification of configs/linear_eval')
    parser.add_argument('source', metavar='SOURCE',
                        help='a distillation recipe or a plain config')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='weights of the student')
    parser.add_argument('teacher', metavar='TEACHER',
                        help='one of configs/_base_/teachers, or a recipe')
    parser.add_argument('--out', metavar='FILE',
                        help='a JSON file for the share, in per cent')
    parser.add_cfg_options('the task')
    return parser.parse_args()


@torch.no_grad()
def features(cfg: Config) -> List[Tensor]:
    """Features of the training and of the test images, in the data sets'
    order.

    Args:
        cfg (Config): Of a linear evaluation.

    Returns:
        list[Tensor]: Shapes (N, C) and (M, C), float64.

    Raises:
        ConfigError: If it has no training or test images, or its features
            are maps.
    """
    if not (cfg.get('train_dataloader') and cfg.get('val_dataloader')) or \
            cfg.model.backbone.get('output') not in ('cls_token',
                                                     'mean_patch'):
        raise ConfigError(
            f'{cfg.filename!r}: a regression needs one feature for each of '
            'some training and test images. Take a classification, such as '
            'configs/linear_eval/cls_mean_digits.py.')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.backbone.init_weights()
    model.eval()
    found = []
    for loader in ('train_dataloader', 'val_dataloader'):
        dataset = DATASETS.build(cfg[loader].dataset)
        batches = dataset_batches(dataset, range(len(dataset)), 64,
                                  model.data_preprocessor)
        found.append(torch.cat([model.backbone(batch['inputs'])[0]
                                for batch in batches]).double())
    return found


def explained(source: Tensor, target: Tensor, source_test: Tensor,
              target_test: Tensor) -> float:
    """Share of the target's variance on test images that a ridge regression
    explains.

    Args:
        source (Tensor): Features to predict from, shape (N, C).
        target (Tensor): Features to predict, shape (N, D).
        source_test (Tensor): Shape (M, C).
        target_test (Tensor): Shape (M, D).

    Returns:
        float: 1 for a perfect prediction, 0 for the mean, less for worse.
        Channels of the target that are constant on the training images do
        not count.

    Raises:
        ConfigError: If there are fewer than two images of either kind.
    """
    if min(len(source), len(source_test)) < 2:
        raise ConfigError(
            f'{len(source)} training and {len(source_test)} test images: at '
            'least two of each are needed. Name other data with '
            '--cfg-options.')
    varied = target.std(dim=0) > CONSTANT
    target, target_test = target[:, varied], target_test[:, varied]

    def scaled(values: Tensor, of: Tensor) -> Tensor:
        return (values - of.mean(dim=0)) / of.std(dim=0).clamp(min=CONSTANT)

    x, y = scaled(source, source), scaled(target, target)
    penalty = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    y_test = scaled(target_test, target)
    error = y_test - scaled(source_test, source) @ weight
    spread = y_test - y_test.mean(dim=0)
    return 1 - (error.square().sum() / spread.square().sum()).item()


def main():
    args = parse_args()
    if args.out:
        check_output_file(args.out)
    task = load_config(args.task, args.cfg_options)
    source, source_test = features(evaluation_config(
        task, load_config(args.source), args.checkpoint))
    target, target_test = features(evaluation_config(
        task, load_config(args.teacher), teacher=True))
    share = 100 * explained(source, target, source_test, target_test)
    print(f'{len(source_test)} images: {share:.1f} % of the teacher\'s '
          "variance follows from the student's features")
    if args.out:
        write_json(dict(explained_variance=share), args.out)


if __name__ == '__main__':
    with readable_errors(), safe_loading():
        main()
