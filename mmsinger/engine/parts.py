"""Every ``type`` in a config, and its arguments, looked up before anything is
built: what nothing would read, and what cannot be meant, ends in an error."""
import ast
import functools
import importlib.util
import inspect
import math
import re
from collections.abc import Mapping
from typing import (Any, Callable, Iterable, List, Literal,
                    NamedTuple, Optional, Union, get_args)

import torch
from mmengine import registry as mmengine_registry
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmsinger.compat import import_datasets
from mmsinger.engine.options import READ
from mmsinger.errors import (ConfigError, check_choice, check_keys,
                             check_spelling, near_matches, walk_config)
from mmsinger.images import check_scale
from mmsinger.registry import arguments_of, check_arguments, source_of
from mmsinger.schema import (Count, DefaultType, Fraction, Natural,
                             NonNegative, Positive, Seed, Share, check_value)


class Slot(NamedTuple):
    """What a config is expected to build in some place.

    Attributes:
        name (str): The registry, by the name it has in mmengine.
        default (str): The ``type`` of one that has none. Defaults to none.
        also (tuple[str]): Keys that its builder takes out before.
        strict (bool): Whether all of that registry, and no other, is right.
    """
    name: str
    default: str = ''
    also: Iterable[str] = ()
    strict: bool = True


HOOK = Slot('HOOKS', also=('priority', ))
TRANSFORM = Slot('TRANSFORMS')
LOADER_KEYS = dict(
    dataset=Slot('DATASETS'), sampler=Slot('DATA_SAMPLERS'),
    batch_sampler=Slot('DATA_SAMPLERS'), collate_fn=Slot('FUNCTIONS'),
    worker_init_fn=Slot('FUNCTIONS'))
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader',
           'dataloader')
# By key, wherever it stands; what stands elsewhere is most likely of the
# registry of what it stands in
PLACES = dict(
    {key: Slot('METRICS') for key in ('val_evaluator', 'test_evaluator')},
    model=Slot('MODELS', strict=False),
    tta_model=Slot('MODELS', strict=False),
    data_preprocessor=Slot('MODELS'), model_wrapper_cfg=Slot('MODEL_WRAPPERS'),
    optim_wrapper=Slot('OPTIM_WRAPPERS',
                       also=('constructor', 'paramwise_cfg')),
    optimizer=Slot('OPTIMIZERS'), train_cfg=Slot('LOOPS', also=['by_epoch']),
    param_scheduler=Slot('PARAM_SCHEDULERS',
                         also=('convert_to_iter_based', )),
    val_cfg=Slot('LOOPS', 'ValLoop'), test_cfg=Slot('LOOPS', 'TestLoop'),
    custom_hooks=HOOK, default_hooks=HOOK, visualizer=Slot('VISUALIZERS'),
    log_processor=Slot('LOG_PROCESSORS', 'LogProcessor'),
    strategy=Slot('STRATEGIES'), tta_pipeline=TRANSFORM)
INSIDE = dict(
    init_cfg=Slot('WEIGHT_INITIALIZERS', also=('override', )),
    override=Slot('WEIGHT_INITIALIZERS', also=('name', )),
    pipeline=TRANSFORM, vis_backends=Slot('VISBACKENDS'),
    dataset=Slot('DATASETS'), datasets=Slot('DATASETS'),
    policies=Slot('TRANSFORMS', also=('magnitude_key', 'magnitude_range')),
    norm_cfg=Slot('MODELS', also=('requires_grad', )),
    act_cfg=Slot('MODELS'))
# As mmengine's runner fills them in
HOOK_TYPES = dict(
    runtime_info='RuntimeInfoHook', timer='IterTimerHook',
    sampler_seed='DistSamplerSeedHook', logger='LoggerHook',
    param_scheduler='ParamSchedulerHook', checkpoint='CheckpointHook')
# What a section is; another plain value would end in a bare traceback
SECTIONS = {
    **dict.fromkeys((
        'optim_wrapper', 'optim_wrapper.paramwise_cfg',
        'optim_wrapper.clip_grad', 'train_cfg', 'val_cfg', 'test_cfg',
        'default_hooks', 'default_hooks.*', 'visualizer', 'log_processor',
        'auto_scale_lr', 'model_wrapper_cfg', 'strategy', *LOADERS[:3],
        *(f'{place}data_preprocessor'
          for place in ('', 'model.', 'model.student.')),
        *(f'{loader}.sampler' for loader in LOADERS[:3])), Optional[dict]),
    **dict.fromkeys((
        'env_cfg', 'env_cfg.dist_cfg', 'env_cfg.mp_cfg', 'randomness',
        'optim_wrapper.optimizer', 'optim_wrapper.paramwise_cfg.custom_keys',
        *(f'{loader}.dataset' for loader in LOADERS[:3])), dict),
    'param_scheduler': Union[dict, List[dict], None],
    'log_level': Union[Literal[
        'DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL', 'NOTSET'], int],
    'default_scope': Optional[str], 'load_from': Optional[str],
    'env_cfg.mp_cfg.mp_start_method': Optional[Literal[
        'fork', 'spawn', 'forkserver']]}
# Values of other packages' classes, which check little
VALUES = dict(
    data_root=Optional[str], out_dir=Optional[str],
    max_epochs=Count, max_iters=Count, val_interval=Count, batch_size=Count,
    num_classes=Count, num_workers=Natural, lr=NonNegative,
    weight_decay=NonNegative, loss_weight=NonNegative,
    accumulative_counts=Count, eta_min=NonNegative, clip_value=Positive,
    max_norm=Union[Positive, Literal[math.inf]], decay_rate=Share,
    layer_decay_rate=Share, base_batch_size=Positive,
    prefetch_factor=Optional[Count], seed=Optional[Seed],
    **dict.fromkeys(('drop_rate', 'attn_drop_rate', 'drop_path_rate'),
                    Fraction),
    **dict.fromkeys(
        ('lr_mult', 'decay_mult', 'bias_lr_mult', 'bias_decay_mult',
         'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult',
         'dcn_offset_lr_mult'), Optional[NonNegative]))
HOOK_INTERVAL = Union[Count, Literal[-1]]


def check_parts(cfg: Config) -> None:
    """Look up every ``type`` in a config in its registry, as the builder
    would, and hold its keys against what the class takes.

    Where a class hands ``**kwargs`` on to what cannot be known, its keys are
    believed. Nothing is built.

    Args:
        cfg (Config): A recipe, or a part of one.

    Raises:
        ConfigError: For a type that is not there, an argument that its class
            does not have, or a value that cannot be meant.
    """
    for key in cfg:
        # The right one is there too where it is inherited; then the two must
        # be nearer, as a variable's name may be close by chance (`models`)
        if key not in READ:
            check_spelling(key, key, READ - set(cfg), 0.88)
            check_spelling(key, key, READ, 0.92)
    _check_sections(cfg)
    scope = cfg.get('default_scope') or 'mmengine'
    import_datasets(scope)
    with DefaultScope.overwrite_default_scope(scope):
        for key in (*LOADERS[:3], *PLACES):
            value = cfg.get(key)
            if value is not None and key != 'optimizer':
                _check(key, value, _top_slot(key, value))
        for key, known in (
                ('randomness', arguments_of(Runner.set_randomness).hints),
                ('compile', (*arguments_of(torch.compile).hints, 'target')),
                ('env_cfg', constants_in(Runner.setup_env)),
                ('auto_scale_lr', constants_in(Runner.scale_lr))):
            if isinstance(cfg.get(key), Mapping):
                check_keys(key, cfg[key], known)
                _check_values(key, cfg[key], None, None)


def _check_sections(cfg: Config) -> None:
    """Raise :class:`ConfigError` for a section that is a number, a text or a
    list where a dict is expected."""
    for place, value in walk_config({key: cfg[key] for key in cfg}):
        hint = SECTIONS.get(re.sub(r'^default_hooks\.[^.]+$',
                                   'default_hooks.*', place))
        if hint is not None and (value is None or isinstance(
                value, (int, float, str, list, tuple))):
            check_value(place, value, hint)


def _top_slot(key: str, value: Any) -> Optional[Slot]:
    slot = PLACES.get(key)
    if key == 'train_cfg' and isinstance(value, Mapping):
        if ('type' in value) == ('by_epoch' in value):
            raise ConfigError(f'train_cfg={dict(value)!r}: set by_epoch to '
                              'True or False, or a type, not both.')
        slot = slot._replace(default='' if 'type' in value else (
            'EpochBasedTrainLoop' if value['by_epoch']
            else 'IterBasedTrainLoop'))
    if key in ('val_evaluator', 'test_evaluator') and \
            isinstance(value, Mapping) and 'metrics' in value:
        return Slot('EVALUATOR', 'Evaluator')
    if key == 'optim_wrapper' and 'optimizer' in value:
        slot = slot._replace(default='OptimWrapper')
    return slot


def _check(place: str, node: Any, slot: Optional[Slot]) -> None:
    """Check a config, or several, and all below."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            _check(f'{place}.{i}', item, slot)
    if not isinstance(node, Mapping):
        return
    with DefaultScope.overwrite_default_scope(node.get('_scope_')):
        target = None
        if place.split('.')[-1] in LOADERS:
            target, also = DataLoader, (
                'num_batch_per_epoch', 'disable_subprocess_warning')
        elif slot is not None and (node.get('type') or slot.default):
            target = _find(place, node.get('type') or slot.default, slot)
            also = slot.also
        for key, value in node.items():
            _check(f'{place}.{key}', value,
                   _slot_of(place, key, slot, target))
        if target is CheckpointHook:  # which hands the others on
            check_keys(place, node, [
                *arguments_of(target).hints, *also, 'type', '_scope_',
                *arguments_of(Runner.save_checkpoint).hints])
            _check_template(f'{place}.filename_tmpl',
                            node.get('filename_tmpl'))
        elif target is not None:
            check_arguments(place, target, node, also)
        teacher_class = getattr(target, 'teacher_class', None)
        if teacher_class and isinstance(node.get('teacher'), Mapping):
            check_arguments(f'{place}.teacher', teacher_class,
                            node['teacher'])
        _check_values(place, node, slot, target)
        if 'paramwise_cfg' in node or 'constructor' in node:
            _check_paramwise(place, node)
        if isinstance(node.get('clip_grad'), Mapping):
            _check_clipping(f'{place}.clip_grad', node['clip_grad'])


def _slot_of(place: str, key: str, slot: Optional[Slot], target: Any
             ) -> Optional[Slot]:
    """What a key of a config is expected to build."""
    if place == 'default_hooks':
        return HOOK._replace(default=HOOK_TYPES.get(key, ''))
    if place.split('.')[-1] in LOADERS:
        return LOADER_KEYS.get(key)
    if slot is not None and slot.name == 'EVALUATOR' and key == 'metrics':
        return Slot('METRICS')
    if key in INSIDE or key in ('optimizer', 'data_preprocessor'):
        return INSIDE.get(key) or PLACES[key]
    if key == 'metainfo' or slot is None:
        return None
    default = ''
    if target is not None:
        default = next((rule.type for rule in get_args(
            arguments_of(target).hints.get(key))
            if isinstance(rule, DefaultType)), '')
    return Slot(slot.name, default, strict=False)


def _find(place: str, kind: Any, slot: Slot) -> Optional[Callable]:
    """The class of a type, as the builder would find it; None if it may be no
    type of a registry."""
    if not isinstance(kind, str):
        if callable(kind):
            return kind
        raise ConfigError(f'{place}.type={kind!r} is not valid: give a name '
                          'or a class.')
    expected = getattr(mmengine_registry, slot.name)
    found = _get(expected, kind)
    if found is None and not slot.strict:
        found = next(filter(None, (
            _get(root, kind) for root in _all_roots())), None)
    if found is not None:
        return found
    scope = kind.rpartition('.')[0]
    if scope and importlib.util.find_spec(scope.split('.')[0]) is None:
        raise ConfigError(f'{place}.type={kind!r}: there is no package '
                          f'{scope!r}. Install it, or take another type.')
    without = () if scope else ('mmengine', current_scope())
    names = {name if registry.scope in without else f'{registry.scope}.{name}'
             for registry in (expected, *expected.children.values())
             for name in registry.module_dict}
    bare = {name.rpartition('.')[2] for name in names}
    if not (slot.strict or scope in expected.children
            or near_matches(kind.rpartition('.')[2], bare, likeness=0.8)):
        return None
    raise ConfigError(f'{place}.type={kind!r}: there is no such '
                      f'{expected.name}.{near_matches(kind, sorted(names))}')


def current_scope() -> str:
    """The scope in which types are looked up now."""
    return DefaultScope.get_current_instance().scope_name


def _get(root: Registry, kind: str) -> Any:
    return root.children.get(current_scope(), root).get(kind)


def _all_roots() -> List[Registry]:
    """The registries of mmengine, and those that a toolbox has alone."""
    modules = [mmengine_registry]
    if importlib.util.find_spec(current_scope()):
        modules.append(importlib.import_module(f'{current_scope()}.registry'))
    return list({id(value.root): value.root for module in modules
                 for value in vars(module).values()
                 if isinstance(value, Registry)}.values())


def _check_values(place: str, node: Mapping, slot: Optional[Slot],
                  target: Any) -> None:
    defaults = arguments_of(target).defaults if target is not None else {}
    for key, value in node.items():
        if key in VALUES and not isinstance(value, (list, tuple, Mapping)) \
                and (value is not None or defaults.get(key, 0) is not None):
            check_value(f'{place}.{key}', value, VALUES[key])
        elif key == 'interval' and slot is not None and slot.name == 'HOOKS' \
                and slot.also and arguments_of(target).hints.get(key) is Any:
            check_value(f'{place}.{key}', value, HOOK_INTERVAL)
        elif isinstance(value, float) and math.isnan(value):
            raise ConfigError(f'{place}.{key}={value!r} is not valid: give a '
                              'number.')
        elif isinstance(value, str) and \
                type(defaults.get(key)) in (bool, int, float) and re.fullmatch(
                    r'[-+.\de]+|nan|true|false|yes|no|on|off', value, re.I):
            check_value(f'{place}.{key}', value, type(defaults[key]))
    if place.endswith('data_preprocessor'):
        check_scale(place, node.get('mean'), node.get('std'))


def _check_template(place: str, template: Any) -> None:
    """Raise :class:`ConfigError` for names of checkpoints that would all be
    the same, or cannot be made."""
    try:
        if template is None or template.format(1) != template.format(2):
            return
    except (AttributeError, IndexError, KeyError, ValueError):
        pass
    raise ConfigError(
        f'{place}={template!r}: each checkpoint would have the same name, or '
        "none. Put {} where the number of its iteration goes: 'iter_{}.pth'.")


def _check_paramwise(place: str, node: Mapping) -> None:
    """Hold ``paramwise_cfg`` against what the constructors read."""
    options = dict(node.get('paramwise_cfg') or {})
    known = set()
    for name, kind in (
            ('constructor', node.get('constructor')
             or 'DefaultOptimWrapperConstructor'),
            ('paramwise_cfg.student_constructor',
             options.get('student_constructor'))):
        if kind is not None:
            known |= constants_in(_find(
                f'{place}.{name}', kind, Slot('OPTIM_WRAPPER_CONSTRUCTORS')))
    _check_words(f'{place}.paramwise_cfg', options, known)
    settings = {'lr_mult', 'decay_mult'}
    optimizer = node.get('optimizer')
    if isinstance(optimizer, Mapping) and 'type' in optimizer:
        kind = _find(f'{place}.optimizer', optimizer['type'],
                     PLACES['optimizer'])
        settings |= {*arguments_of(kind).hints, *constants_in(kind)}
    for key, value in dict(options.get('custom_keys') or {}).items():
        where = f'{place}.paramwise_cfg.custom_keys[{key!r}]'
        check_value(where, value, dict)
        _check_words(where, value, settings)
        for name in {'lr_mult', 'decay_mult'} & set(value):
            check_value(f'{where}.{name}', value[name], NonNegative)


def _check_clipping(place: str, options: Mapping) -> None:
    """Hold ``clip_grad`` against torch's function that reads it."""
    kinds = dict(norm=torch.nn.utils.clip_grad_norm_,
                 value=torch.nn.utils.clip_grad_value_)
    kind = options.get('type', 'norm')
    check_choice(f'{place}.type', kind, kinds)
    check_keys(place, options, ['type', *arguments_of(kinds[kind]).hints],
               kinds[kind].__name__)


def _check_words(place: str, given: Iterable[str], known: Iterable[str]
                 ) -> None:
    """As :func:`check_keys`, of keys that stock configs have some unread ones
    among: an error if one is like another, a warning if not."""
    for name in set(given) - set(known):
        check_spelling(f'{place}.{name}', name, known, 0.75)
        print_log(f'{place}.{name}: neither the optimizer nor its '
                  'constructor reads it.', logger='current', level=30)


@functools.lru_cache(maxsize=None)
def constants_in(target: Any) -> frozenset:
    """The words in the source of a function, or of a class and its bases:
    among them the keys that it reads from a dict."""
    return frozenset(
        node.value for part in (
            target.__mro__[:-1] if inspect.isclass(target) else [target])
        for node in source_of(part)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and node.value.isidentifier())
