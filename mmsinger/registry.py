"""Child registries of mmengine's, in the scope ``mmsinger``.

mmengine imports this module by itself when a config names a type such as
``mmsinger.SiNGERDistiller``, and the locations below when it looks one up: a
recipe needs no ``custom_imports``.
"""
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='mmsinger',
    locations=['mmsinger.models'])
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmsinger',
    locations=['mmsinger.engine.hooks'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmsinger',
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
