"""Child registries of mmengine's, in the scope ``mmsinger``.

mmengine imports this module by itself when a config names a type such as
``mmsinger.SiNGERDistiller``, and the locations below when it looks one up: a
recipe needs no ``custom_imports``.
"""
import inspect
from typing import Any, List

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import \
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from mmsinger.errors import ConfigError, check_keys, near_matches

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='mmsinger',
    locations=['mmsinger.models'])
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmsinger',
    locations=['mmsinger.engine.hooks'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmsinger',
    locations=['mmsinger.engine.optim'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, scope='mmsinger',
    locations=['mmsinger.engine.optim'])
STRATEGIES = Registry(
    'strategy', parent=MMENGINE_STRATEGIES, scope='mmsinger',
    locations=['mmsinger.engine.strategy'])
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='mmsinger',
    locations=[
        'mmsinger.datasets.imagenet_variants', 'mmsinger.datasets.inat2019',
        'mmsinger.datasets.nyu_mat'
    ])
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='mmsinger',
    locations=['mmsinger.datasets.transforms'])


def argument_names(cls: type) -> List[str]:
    """What a constructor takes by name, its bases' arguments too where it
    hands them on as ``**kwargs``."""
    names: List[str] = []
    for base in cls.__mro__:
        if base.__module__.split('.')[0] in ('mmengine', 'torch'):
            break
        if '__init__' not in vars(base):
            continue
        parameters = list(inspect.signature(
            base.__init__).parameters.values())[1:]
        names += [p.name for p in parameters if p.name not in names
                  and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def build_part(key: str, cfg: Any, default: str = '', **given: Any) -> Any:
    """Build a part of a model from its config.

    Args:
        key (str): Where the config stands, as the user writes it:
            ``'model.loss_kd'``.
        cfg (dict, optional): The config; ``type`` may be left out if there
            is a default. Of our own types the scope may be left out.
        default (str): The type then. Defaults to none.
        **given: Arguments that are not the user's to set.

    Returns:
        nn.Module: The part.

    Raises:
        ConfigError: If there is no such type, or it does not take one of the
            keys.
    """
    example = default or 'mmsinger.ClipNorms'
    if not isinstance(cfg, (dict, type(None) if default else dict)):
        raise ConfigError(f'{key} must be a dict, got {cfg!r}. For instance '
                          f'dict(type={example!r}).')
    cfg = dict(cfg or {})
    kind = cls = cfg.setdefault('type', default)
    if kind and isinstance(kind, str):
        cls = MODELS.get(kind) or MODELS.get(f'mmsinger.{kind}')
    if not callable(cls):
        name = str(kind).split('.')[-1]
        raise ConfigError(
            f'{key}.type={kind!r}: there is no such type.'
            f'{near_matches(name, MODELS.module_dict)} Write its scope too, '
            f'as in {example!r}.')
    cfg['type'] = cls
    if inspect.isclass(cls) and (
            cls.__module__.startswith('mmsinger.') or not any(
                p.kind is p.VAR_KEYWORD
                for p in inspect.signature(cls).parameters.values())):
        check_keys(key, cfg, ['type', '_scope_', *argument_names(cls)],
                   cls.__name__)
    return MODELS.build(dict(cfg, **given))
