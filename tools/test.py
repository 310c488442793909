"""Evaluate a model, or the student of a distiller, on the test set.

    python tools/test.py CONFIG CHECKPOINT

With a distillation recipe, the plain student is built and evaluated; the
checkpoint may be a training checkpoint or a student-only file.
"""
import inspect
import os

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS, METRICS, init_default_scope
from mmengine.runner import Runner

from mmsinger.checkpoint import load_strict, safe_loading
from mmsinger.command_line import ToolParser
from mmsinger.engine.checks import check_data_folders, check_work_dir
from mmsinger.engine.hooks import RunGuardHook
from mmsinger.engine.logs import demote_details
from mmsinger.engine.prepare import fit_workers, load_config
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import (ConfigError, check_output_file,
                             readable_errors)
from mmsinger.export import load_student, student_config
from mmsinger.models.distillers import is_distiller


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('config', help='the config file')
    parser.add_argument(
        'checkpoint', nargs='?', help='the checkpoint file (not needed for a '
        'model that loads its own, such as mmsinger.KNNClassifier)')
    parser.add_argument(
        '--work-dir', help='where logs and metrics go '
        '(default: work_dirs/NAME of the config)')
    parser.add_argument(
        '--out', help='where predictions are written: FILE.pkl, of any model; '
        'a folder, for metrics that can (output_dir)')
    parser.add_argument(
        '--show-dir', help='where painted predictions are written')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation, by the '
        "config's tta_model and tta_pipeline; of classifiers without them, "
        'the mean of an image and its mirror image')
    parser.add_cfg_options('the config')
    parser.add_launcher()
    return parser.parse_args()


def keep_predictions(cfg, out):
    """Have predictions written to a .pkl file, or by the metric to a folder.

    Raises:
        ConfigError: If the metric cannot.
    """
    evaluators = cfg.test_evaluator
    if os.path.isfile(out) and not out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out={out!r} is a file. Name one that ends with '
                          '.pkl, or a folder.')
    if out.endswith(('.pkl', '.pickle')):
        check_output_file(out)
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        cfg.test_evaluator = [*evaluators, dict(
            type='mmengine.DumpResults', out_file_path=out)]
        return
    name = evaluators.get('type') if isinstance(evaluators, dict) else None
    metric = name
    if isinstance(name, str):
        with METRICS.switch_scope_and_registry(None) as registry:
            metric = registry.get(name)
    known = inspect.signature(metric).parameters if metric else {}
    if 'output_dir' not in known:
        raise ConfigError(
            f'--out {out!r} is a folder, which {name or "several metrics"} '
            'cannot write predictions to. Name a file that ends with .pkl.')
    evaluators.output_dir = out
    if 'keep_results' in known:
        evaluators.keep_results = True


def paint(cfg, folder):
    """Let the toolbox's hook write painted predictions into a folder."""
    hook = cfg.default_hooks.visualization
    cls = hook.type
    if isinstance(cls, str):
        cls = HOOKS.children.get(cfg.get('default_scope'), HOOKS).get(cls)
    if cls and 'enable' in inspect.signature(cls).parameters:  # mmpretrain's
        hook.update(enable=True, out_dir=folder, interval=1)
    else:
        hook.draw = True
        cfg.visualizer.save_dir = folder


def augment(cfg):
    """Test the mean of several views of each image.

    Raises:
        ConfigError: If the config does not say how, and the model is neither
            a classifier nor an EncoderDecoder.
    """
    pipeline = cfg.test_dataloader.dataset.get('pipeline')
    kind = str(cfg.model.type).split('.')[-1]
    merged = 'mmseg.SegTTAModel' if 'EncoderDecoder' in kind else \
        'mmpretrain.AverageClsScoreTTA' if 'Classifier' in kind else None
    if merged and pipeline:
        cfg.setdefault('tta_model', dict(type=merged))
        # The annotations of the first view are those of the image
        flips = [dict(type='RandomFlip', prob=0.),
                 dict(type='RandomFlip', prob=1.)]
        cfg.setdefault('tta_pipeline', [*pipeline[:-1], dict(
            type='TestTimeAug', transforms=[flips, [pipeline[-1]]])])
    missing = [key for key in ('tta_model', 'tta_pipeline')
               if not cfg.get(key)]
    if missing:
        raise ConfigError(
            f'--tta: the config has no {" and no ".join(missing)}, and there '
            f'is no usual way for a {kind}. Set both; see mmengine\'s '
            'documentation of test-time augmentation.')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


class TestRunner(Runner):
    """A runner that leaves the config which training has dumped as it is;
    its own lies beside its log (``vis_data/config.py``)."""

    def dump_config(self):
        pass


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if not cfg.get('model'):
        raise ConfigError(f'{args.config!r} has no model: give a recipe.')
    lacking = [key for key in ('test_dataloader', 'test_evaluator', 'test_cfg')
               if cfg.get(key) in (None, [])]
    if lacking:
        raise ConfigError(
            f'{args.config!r} has no {" and no ".join(lacking)}: there is '
            'nothing to test. A student without a head is evaluated by '
            'tools/linear_eval.py.')
    if args.out:
        keep_predictions(cfg, args.out)
    if args.show_dir:
        if not (cfg.get('default_hooks') or {}).get('visualization') or \
                not cfg.get('visualizer'):
            raise ConfigError('--show-dir: the config has no default_hooks.'
                              'visualization hook that could paint, or no '
                              'visualizer.')
        paint(cfg, args.show_dir)
    fit_workers(cfg)
    check_work_dir(cfg.work_dir, '--work-dir')
    check_data_folders(cfg, ('test_dataloader', ))

    distilled = is_distiller(cfg.model)
    cfg = student_config(cfg)
    if args.tta:
        augment(cfg)
    weights = load_student(args.checkpoint) if args.checkpoint else None
    cfg.load_from, cfg.resume = None, False
    runner = TestRunner.from_cfg(cfg)
    runner.logger.addFilter(demote_details)
    runner.register_hook(RunGuardHook())
    model = unwrap(runner.model)
    model = model.module if isinstance(model, BaseTTAModel) else model
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
    with readable_errors(), safe_loading():
        main()
