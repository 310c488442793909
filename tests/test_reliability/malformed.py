"""Mistakes in configs and on command lines, and what has to be said of each.

    python tests/test_reliability/malformed.py

counts them by kind. Most are made from what the tools take: each key of ours
with values that its type hint excludes, each part of a recipe with a misspelt
type and an unknown key, each option with values of other kinds.
"""
import argparse
import collections
import contextlib
import importlib.util
import os
import re
import sys
from typing import Any, Dict, Iterator, List, NamedTuple
from unittest import mock

if __name__ == '__main__':  # where conftest.py does it for tests
    TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:0] = [TESTS, os.path.join(os.path.dirname(TESTS), 'tools')]

import tiny  # noqa: E402

from mmsinger import schema  # noqa: E402
from mmsinger.command_line import ToolParser  # noqa: E402
from mmsinger.engine.options import READ  # noqa: E402
from mmsinger.engine.prepare import load_config  # noqa: E402
from mmsinger.models.targets.refine import Adapter, Gate  # noqa: E402
from mmsinger.models.teachers.frozen import FrozenTeacher  # noqa: E402
from mmsinger.registry import HOOKS, MODELS, arguments_of  # noqa: E402


class Row(NamedTuple):
    """One malformed call.

    Attributes:
        kind (str): Of mistake.
        tool (str): ``'train'`` for ``tools/train.py``.
        args (tuple[str]): Of the command line.
        text (str): A regular expression that the message has to match.
    """
    kind: str
    tool: str
    args: tuple
    text: str


def train(kind: str, option: str, text: str, *more: str) -> Row:
    return Row(kind, 'train', (tiny.SEG_CONFIG, '--cfg-options', *more,
                               option), text)


# -- our own keys -------------------------------------------------------------

def own_parts() -> Dict[str, tuple]:
    """Hints of what stands in each place, and the options that put it
    there."""
    parts = dict(
        [(f'model.{name}', (arguments_of(MODELS.get(f'mmsinger.{kind}')).hints,
                            ())) for name, kind in (
            ('loss_kd', 'FeatureMSELoss'),
            ('loss_outlier', 'OutlierSuppressionLoss'),
            ('loss_info', 'GramInformationLoss'))])
    parts['model'] = arguments_of(MODELS.get('mmsinger.SiNGERDistiller')
                                  ).hints, ()
    parts['model.adapter'] = schema.hints_of(Adapter), ()
    parts['model.gate'] = schema.hints_of(Gate), ()
    parts['model.teacher'] = arguments_of(FrozenTeacher).hints, ()
    for place, kinds, form in (
            ('model.targets.0', ('ClipNorms', 'MaskTokens'), 'model.targets'),
            ('custom_hooks.0', ('DiagnosticsHook', 'SiNGERAdapterHook',
                                'TargetNormHook'), 'custom_hooks')):
        registry = MODELS if 'model' in place else HOOKS
        for kind in kinds:
            parts[f'{place} {kind}'] = arguments_of(
                registry.get(f'mmsinger.{kind}')).hints, (
                    f"{form}=[dict(type='mmsinger.{kind}')]", )
    return parts


WRONG = {'a text': 'yes', 'negative': -3, 'nan': float('nan'), 'None': None}


def own_keys() -> Iterator[Row]:
    for place, (hints, before) in own_parts().items():
        place = place.split()[0]
        for key, hint in hints.items():
            path = f'{place}.{key}'
            for name, value in WRONG.items():
                if not schema.fits(value, hint):
                    yield train(f'our keys: {name}', f'{path}={value}',
                                re.escape(path), *before)
            misspelt = key[:-1] + key[-1] * 2 + 'x'
            yield train('our keys: misspelt', f'{place}.{misspelt}=1',
                        re.escape(misspelt), *before)


# -- parts of other packages --------------------------------------------------

def typed_parts(node: Any, place: str = '') -> Iterator[tuple]:
    items = node.items() if hasattr(node, 'items') else \
        enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in items:
        if not place and key not in READ:
            continue
        below = f'{place}.{key}' if place else str(key)
        if hasattr(value, 'items') and isinstance(value.get('type'), str):
            yield below, value
        yield from typed_parts(value, below)


def other_parts() -> Iterator[Row]:
    for place, part in typed_parts(load_config(tiny.SEG_CONFIG)):
        kind = part['type']
        yield train('other packages: misspelt type',
                    f'{place}.type={kind}x',
                    rf'{re.escape(place)}\.type=.*Did you mean')
        yield train('other packages: unknown argument',
                    f'{place}.no_such_argument=1',
                    rf'{re.escape(place)}\.no_such_argument')
    for loader in ('train_dataloader', 'val_dataloader'):
        yield train('other packages: unknown argument',
                    f'{loader}.batch_sise=2', "Did you mean 'batch_size'")


# -- command lines ------------------------------------------------------------

TOOLS = sorted(
    name[:-3] for name in os.listdir(os.path.join(tiny.ROOT, 'tools'))
    # The two that work without the package have no options
    if name.endswith('.py') and name not in ('check_env.py', 'gpu_report.py'))
BAD_TEXTS = ('x', '-1', '0', '1.5', 'nan', 'inf')
_modules: Dict[str, Any] = {}


def load_tool(name: str) -> Any:
    """A tool as a module, once."""
    if name not in _modules:
        path = os.path.join(tiny.ROOT, 'tools', f'{name}.py')
        spec = importlib.util.spec_from_file_location(f'tool_{name}', path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _modules[name] = module
    return _modules[name]


def parser_of(name: str) -> argparse.ArgumentParser:
    """A tool's parser."""
    found: List[argparse.ArgumentParser] = []

    def keep(self, *args, **kwargs):
        found.append(self)
        raise SystemExit

    module = load_tool(name)
    with mock.patch.object(ToolParser, 'parse_args', keep), \
            contextlib.suppress(SystemExit):
        (getattr(module, 'parse_args', None) or module.main)()
    return found[0]


def command_lines() -> Iterator[Row]:
    for tool in TOOLS:
        parser = parser_of(tool)
        subparsers = [action for action in parser._actions
                      if isinstance(action, argparse._SubParsersAction)]
        if subparsers:
            for name, sub in subparsers[0].choices.items():
                yield from options_of(tool, sub, (name, ))
        else:
            yield from options_of(tool, parser, ())


def options_of(tool: str, parser: argparse.ArgumentParser, first: tuple
               ) -> Iterator[Row]:
    needed = list(first)
    for action in parser._actions:
        if action.required and action.option_strings:
            needed += [action.option_strings[0], 'x']
    positional = ['x' for action in parser._actions
                  if not action.option_strings and action.nargs != '?']
    for action in parser._actions:
        if not action.option_strings or '--help' in action.option_strings \
                or 'local_rank' in action.dest:
            continue
        option = action.option_strings[0]
        count = action.nargs if isinstance(action.nargs, int) else 1

        def row(kind, value, text):
            return Row(f'command line: {kind}', tool, (
                *needed, *positional, option, *[value] * count), text)

        if action.choices:
            yield row('no such choice', 'nothing', f'argument {option}')
        elif action.type is not None:
            for value in BAD_TEXTS:
                try:
                    action.type(value)
                except (argparse.ArgumentTypeError, ValueError):
                    yield row('not such a number', value, f'argument {option}')
        elif action.nargs != 0 and action.dest not in ('prefix',
                                                       'cfg_options') and \
                not first and 'options' not in action.dest and \
                action.default != '':
            yield row('empty text', '', f'argument {option}')
        if action.nargs == 0:
            yield Row('command line: misspelt option', tool, (
                *needed, *positional, f'{option}x'),
                f'{option}x')


# -- by hand ------------------------------------------------------------------

def by_hand() -> Iterator[Row]:
    for option, text in (
            # Said to be silent or bare by those who tried them
            ('optim_wrapper.paramwise_cfg.custom_keys.adaptors.lr_mult=0.1',
             "adaptors'.*Did you mean '.*adapters'"),
            ('optim_wrapper.paramwise_cfg.custom_keys.adapters.lr_mul=0.1',
             "lr_mul.*Did you mean 'lr_mult'"),
            ('optim_wrapper.clip_grad=1.0', r'optim_wrapper\.clip_grad=1\.0'),
            *((f'{place}={value}', rf'{re.escape(place)}={value}')
              for place, value in (
                  ('env_cfg', None), ('env_cfg.dist_cfg', 5),
                  ('randomness', None), ('log_level', None),
                  ('default_hooks', 5), ('default_hooks.checkpoint', 5),
                  ('default_hooks.checkpoint.out_dir', 5),
                  ('visualizer', 5), ('log_processor', 5),
                  ('auto_scale_lr', 5), ('model_wrapper_cfg', 5),
                  ('strategy', 5), ('default_scope', 5),
                  ('optim_wrapper', 5), ('optim_wrapper.optimizer', None),
                  ('optim_wrapper.paramwise_cfg', 5),
                  ('optim_wrapper.paramwise_cfg.custom_keys', None),
                  ('param_scheduler', 5), ('param_scheduler.0', 5),
                  ('train_cfg', 5), ('val_cfg', 5), ('train_dataloader', 5),
                  ('train_dataloader.dataset', 5),
                  ('train_dataloader.sampler', 5),
                  ('train_dataloader.dataset.data_root', 5))),
            ('optim_wrapper.paramwise_cfg.norm_decay_mlt=0',
             "Did you mean 'norm_decay_mult'"),
            ('optim_wrapper.optimizer.learning_rate=1e-3', 'learning_rate'),
            ('optim_wrapper.optimizer.lr=-1e-3', r'optimizer\.lr=-0\.001'),
            ('optim_wrapper.optimizer.lr=nan', r'optimizer\.lr=nan'),
            ('optim_wrapper.optimizer.lr=inf', r'optimizer\.lr=inf'),
            ('optim_wrapper.clip_gradd.max_norm=1', 'clip_grad'),
            ('optim_wrapper.accumulative_counts=0', 'accumulative_counts=0'),
            ('optim_wrapper.constructor=LearningRateDecayConstructor',
             r'optim_wrapper\.constructor\.type='),
            ('train_cfg.max_itres=6', "max_itres.*Did you mean 'max_iters'"),
            ('train_cfg.max_iters=0', r'train_cfg\.max_iters=0'),
            ('train_cfg.max_iters=-6', r'train_cfg\.max_iters=-6'),
            ('train_cfg.max_iters=None', r'max_iters'),
            ('train_cfg.max_iters=6.5', r'train_cfg\.max_iters=6\.5'),
            ('train_cfg.val_interval=0', r'train_cfg\.val_interval=0'),
            ('train_cfg.by_epoch=True', r'train_cfg=.*by_epoch'),
            ('default_hooks.checkpoint.interval=0',
             r'default_hooks\.checkpoint\.interval=0'),
            ('default_hooks.checkpoint.interval=-5', 'checkpoint.interval=-5'),
            ('default_hooks.logger.interval=0', 'logger.interval=0'),
            ('default_hooks.checkpoint.max_keep_ckpt=1',
             "Did you mean 'max_keep_ckpts'"),
            ('default_hooks.checkpoint.save_last=yes', 'save_last=.yes'),
            ('train_dataloader.batch_size=0', 'batch_size=0'),
            ('train_dataloader.batch_size=-1', 'batch_size=-1'),
            ('train_dataloader.batch_size=two', 'batch_size=.two'),
            ('train_dataloader.num_workers=-1', 'num_workers=-1'),
            ('train_dataloader.dataset.data_root=nowhere', 'nowhere'),
            ('train_dataloader.dataset.img_suffix=.jpg', 'img_suffix'),
            ('train_dataloader.dataset.ann_file=nope.txt',
             r'train_dataloader\.dataset.*nope\.txt'),
            ('model.loss_kd=None', r'model\.loss_kd=None'),
            ('model.loss_kd.loss_weight=-1', r'loss_kd\.loss_weight=-1'),
            ('model.loss_info.loss_weight=nan', 'loss_weight=nan'),
            ('model.student.decode_head.loss_decode.loss_weight=-1',
             r'loss_decode\.loss_weight=-1'),
            ('model.student.decode_head.dropout_ratio=lots', 'decode_head'),
            ('model.student_layers=[1,0]', r'student_layers=.*ascending'),
            ('model.layers=[3,1]', r'layers=.*ascending'),
            ('model.cap=True', r'model\.cap=True'),
            ('model.teacher.mean=None', r'teacher\.mean'),
            ('model.teacher.mean=[0.5,0.5,0.5] model.teacher.std=[.5,.5,.5]',
             r'teacher\.mean.*0 to 255'),
            ('model.student.data_preprocessor.mean=[0.485,0.456,0.406] '
             'model.student.data_preprocessor.std=[0.229,0.224,0.225]',
             r'data_preprocessor\.mean=.*0 to 255'),
            ('model.teacher.std=[0,1,1]', r'teacher\.std\.0=0'),
            ('model.teacher.mean=[1.,2.] model.teacher.std=[1.,2.,3.]',
             r'teacher\.mean=.*2 and 3 channels'),
            ('model.teacher.mean=[1.,2.] model.teacher.std=[1.,2.]',
             r'teacher\.mean=.*takes images of 3'),
            ('model.teacher.input_size=[32]', r'teacher\.input_size='),
            ('model.teacher.input_size=[32,32,3]', r'teacher\.input_size='),
            ('model.teacher.checkpoint=scenes', 'a folder'),
            ("model.projector=dict(type='mmsinger.MLPProjector',"
             "norm_cfg=dict(type='GN',num_groups=7))",
             r'model\.projector\.norm_cfg=.*divisible'),
            ("model.projector=dict(type='mmsinger.MLPProjector',"
             "norm_cfg=dict(type='BN2d'))",
             r'model\.projector\.norm_cfg=.*4D'),
            ('default_hooks.checkpoint.filename_tmpl=last.pth',
             r'checkpoint\.filename_tmpl='),
            ('default_hooks.checkpoint.filename_tmpl={}_{}.pth',
             r'checkpoint\.filename_tmpl='),
            ('model.teacher.feature_cache=all', r'feature_cache=.all'),
            ('model.teacher.prefix=vit.', 'teacher.prefix'),
            ('model.teacher.checkpoint=nowhere.pth', 'nowhere.pth'),
            ('model.teacher.backbone.arch=huge_', 'VisionTransformer'),
            ('model.teacher.backbone.patch_size=0', 'VisionTransformer'),
            ('model.student.backbone.num_heads=3', 'backbone'),
            ('model.student.backbone.embed_dims=wide', 'embed_dims|backbone'),
            ('model.student.decode_head.in_channels=7', 'decode_head'),
            ('model.student.decode_head.num_classes=none', 'num_classes'),
            ('model.student.decode_head.in_index=9', 'decode_head'),
            ('model.student.decode_head.norm_cfg.type=BatchNrm', 'norm_cfg'),
            ('model.student.neck.scales=[1]', 'decode_head'),
            ('model.student=None', r'model\.student=None'),
            ('model.teacher=None', r'model\.teacher=None'),
            ('model=None', 'no model'),
            ('train_cfg=None', 'train_cfg'),
            ('train_dataloader=None', 'train_dataloader'),
            ('optim_wrapper=None', 'optim_wrapper'),
            ('optim_wraper.type=OptimWrapper', "'optim_wrapper'"),
            ('default_hook.checkpoint.interval=1', "'default_hooks'"),
            ('nothing=1', 'nothing'),
            ('randomness.sed=1', "Did you mean 'seed'"),
            ('env_cfg.cudnn_benchmrk=True', "Did you mean 'cudnn_benchmark'"),
            ('auto_scale_lr.base_batch_sise=4', 'base_batch_sise'),
            ('compile.moed=default', 'moed'),
            ('param_scheduler.0.etamin=0', "Did you mean 'eta_min'"),
            ('param_scheduler.0.by_epoch=no', 'by_epoch=.no'),
            ('visualizer.vis_backends.0.type=TensorbordVisBackend',
             "Did you mean 'TensorboardVisBackend'"),
            ('val_evaluator.iou_metrics=[mIuO]', 'val_evaluator.*mIuO'),
            ('custom_hooks=[EMAHook]', 'custom_hooks'),
            ('custom_hooks.0.type=EMAHok', "Did you mean 'EMAHook'"),
            ("custom_hooks=[dict(type='EMAHook', momentm=0.1)]", 'momentm'),
            ('default_scope=mmsegg', 'mmsegg|there is no such'),
            ('load_from=nowhere.pth', 'nowhere.pth'),
            ('strategy.type=FSDPStrategie', "Did you mean"),
            ('model.type=mmsinger.SingerDistiller',
             "Did you mean 'mmsinger.SiNGERDistiller'"),
            ('model.type=mmsinger.Singer', 'there is no such model'),
    ):
        yield train('by hand', *reversed_pair(option, text))
    config = tiny.SEG_CONFIG
    for tool, args, text in (
            ('train', ('nowhere.py', ), 'no such file'),
            ('train', (config, '--resume', ''), '--resume'),
            ('train', (config, '--resume', 'nowhere.pth'), 'nowhere.pth'),
            ('train', (config, '--cfg-options', 'a'), 'KEY=VALUE'),
            ('train', (config, '--cfg-options', 'a=[(1]'), 'KEY=VALUE'),
            ('train', (), 'config'),
            ('test', (config, 'nowhere.pth'), 'nowhere.pth'),
            ('test', (config, ), 'needs a checkpoint|checkpoint'),
            ('test', (config, 'teacher.pth'), 'teacher.pth'),
            ('test', ('nowhere.py', 'x.pth'), 'no such file'),
            ('measure', (config, 'nowhere.pth'), 'nowhere.pth'),
            ('measure', (config, '--metrics', 'cosin'), "'cosine'|--metrics"),
            ('measure', (config, '--out', 'no/folder.json'), '--out'),
            ('plot', ('norms', config, 'nowhere.pth', 'scenes/images/0.png'),
             'nowhere.pth'),
            ('plot', ('norms', config, 'teacher.pth', 'nowhere.png'),
             'nowhere.png|teacher.pth'),
            ('plot', ('radar', 'nowhere.csv'), 'nowhere.csv'),
            ('plot', ('sweep', 'teacher.pth'), 'teacher.pth'),
            ('plot', ('curves', 'nowhere'), 'nowhere'),
            ('plot', ('nothing', ), 'nothing'),
            ('export_student', ('nowhere.pth', ), 'nowhere.pth'),
            ('export_student', ('teacher.pth', '--out', 'x.pth'),
             'teacher.pth'),
            ('convert_checkpoint', ('nowhere.pth', 'x.pth'), 'nowhere.pth'),
            ('convert_checkpoint', ('nan.pth', 'x.pth'), 'not finite'),
            ('convert_checkpoint', ('scenes/images/0.png', 'x.pth'), '0.png'),
            ('analyze_teacher', (config, '--images', 'nowhere'), 'nowhere'),
            ('analyze_teacher', (config, 'nowhere.pth', '--images', 'scenes'),
             'nowhere.pth'),
            ('analyze_teacher', (config, '--images', 'scenes', '--mean', '1',
                                 '1', '1'), '--std'),
            ('check_dataset', ('ade20', ), "Did you mean"),
            ('check_dataset', ('nowhere.py', ), 'no such file'),
            ('linear_eval', ('nowhere.py', config), 'no such file'),
            ('linear_eval', (config, 'nowhere.py'), 'nowhere.py|TASK'),
            ('explained_variance', ('nowhere.py', config, 'x.pth', config),
             'no such file'),
            ('cut_photos', ('nowhere', 'x'), 'nowhere'),
            ('cut_photos', ('scenes', 'scenes'), 'is there already'),
            ('reproduce', ('11', ), 'table'),
            ('reproduce', ('1', '--profile', 'digit'), 'digits'),
            ('reproduce', ('1', '--root', 'scenes/images/0.png'), '0.png'),
            ('make_digit_scenes', ('--canvas', '4'), 'canvas'),
            ('make_digit_scenes', ('--max-digits', '9'), 'max_digits'),
            ('make_digit_scenes', ('--digit-size', '30', '9'), 'digit_size'),
            ('plan_scale', ('--sizes', '8'), '--sizes'),
            ('plan_scale', ('--sizes', '99999999'), '--sizes'),
            ('sweep_stock', ('--only', '('), '--only'),
            ('sweep_stock', ('--results', 'teacher.pth'), 'teacher.pth'),
            ('export_student', ('nan.pth', '--out', 'x.pth'), 'not finite'),
            ('measure', (config, 'nan.pth'), 'not finite'),
            ('train', ('scenes', ), 'a folder'),
            ('benchmark_step', ('--teacher', 'vit_x'), 'vit_x'),
            ('benchmark_step', ('--out', 'no/x.json'), 'no/x.json'),
            ('benchmark_growth', ('--out', 'no/x'), 'no/x'),
    ):
        yield Row('by hand', tool, args, text)


def reversed_pair(option: str, text: str) -> tuple:
    first, *more = option.split(' model.')
    return (first, text, *(f'model.{one}' for one in more))


def rows() -> List[Row]:
    return list({(row.tool, row.args): row for row in (
        *own_keys(), *other_parts(), *command_lines(), *by_hand())}.values())


if __name__ == '__main__':
    counts = collections.Counter(row.kind for row in rows())
    print('| mistake | calls |\n|---|---|')
    for kind, count in counts.items():
        print(f'| {kind} | {count} |')
    print(f'| together | {sum(counts.values())} |')
