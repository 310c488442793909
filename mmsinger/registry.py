"""Child registries of mmengine's, in the scope ``mmsinger``.

mmengine imports this module by itself when a config names a type such as
``mmsinger.SiNGERDistiller``, and the locations below when it looks one up: a
recipe needs no ``custom_imports``.
"""
import ast
import functools
import inspect
import textwrap
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Set, Tuple

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

from mmsinger.errors import (ConfigError, check_keys, check_spelling,
                             near_matches, prefixed_errors)
from mmsinger.schema import check_value, hints_of


class CheckedRegistry(Registry):
    """A registry whose classes look at their arguments when they are built,
    wherever that happens: see :func:`check_values`."""

    def _register_module(self, module: Any, *args: Any, **kwargs: Any
                         ) -> None:
        if inspect.isclass(module):
            checked(module)
        super()._register_module(module, *args, **kwargs)


def checked(cls: type) -> type:
    """A class decorator: look at arguments when an instance is made, see
    :func:`check_values`. Registered classes have it."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(type(self).__init__, 'checks_arguments') or \
                type(self).__init__ is __init__:
            names = list(inspect.signature(init).parameters)[1:]
            check_values(getattr(cls, 'place', cls.__name__), cls,
                         {**dict(zip(names, args)), **kwargs})
        init(self, *args, **kwargs)

    __init__.checks_arguments = True
    cls.__init__ = __init__
    return cls


def _child(name: str, *locations: str) -> CheckedRegistry:
    """The child of one of mmengine's registries, with the modules that are
    imported when a type is looked up in it."""
    parent = getattr(mmengine_registry, name)
    return CheckedRegistry(parent.name, parent=parent, scope='mmsinger',
                           locations=list(locations))


MODELS = _child('MODELS', 'mmsinger.models')
HOOKS = _child('HOOKS', 'mmsinger.engine.hooks')
OPTIM_WRAPPERS = _child('OPTIM_WRAPPERS', 'mmsinger.engine.optim')
OPTIM_WRAPPER_CONSTRUCTORS = _child(
    'OPTIM_WRAPPER_CONSTRUCTORS', 'mmsinger.engine.optim')
STRATEGIES = _child('STRATEGIES', 'mmsinger.engine.strategy')
DATASETS = _child(
    'DATASETS', 'mmsinger.datasets.imagenet_variants',
    'mmsinger.datasets.inat2019', 'mmsinger.datasets.nyu_mat',
    'mmsinger.datasets.random_images')
TRANSFORMS = _child('TRANSFORMS', 'mmsinger.datasets.transforms')


class Arguments(NamedTuple):
    """What a constructor or a function takes by name.

    Attributes:
        hints (dict): Type hints by name, those of its bases too where it
            hands ``**kwargs`` on to them.
        closed (bool): Whether there are no others. False where ``**kwargs``
            go to what cannot be known.
        defaults (dict): Default values by name, of those that have one.
    """
    hints: Dict[str, Any]
    closed: bool
    defaults: Dict[str, Any]


@functools.lru_cache(maxsize=None)
def arguments_of(target: Callable) -> Arguments:
    """The arguments of a class or a function."""
    functions = [vars(base)['__init__'] for base in target.__mro__
                 if '__init__' in vars(base) and base is not object] \
        if inspect.isclass(target) else [target]
    hints: Dict[str, Any] = {}
    defaults: Dict[str, Any] = {}
    taken: Set[str] = set()  # which a subclass sets itself
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C
            return Arguments(hints, False, defaults)
        types = hints_of(function) if str(
            function.__module__).startswith('mmsinger.') else {}
        for p in parameters[inspect.isclass(target):]:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and \
                    p.name not in {*taken, *hints}:
                hints[p.name] = types.get(p.name, Any)
                if p.default is not p.empty:
                    defaults[p.name] = p.default
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        if inspect.unwrap(function) is not function and \
                not hasattr(function, 'checks_arguments'):
            return Arguments(hints, False, defaults)  # mmcv renames some
        if not rest or rest == ['unknown']:  # by which ours mean none
            break
        read, handed_up, elsewhere, set_itself = _use_of(
            inspect.unwrap(function), rest[0])
        for name in read - set(hints):
            hints[name] = Any
        if elsewhere or not inspect.isclass(target):
            return Arguments(hints, False, defaults)
        if not handed_up:  # to nothing
            break
        taken |= set_itself
    return Arguments(hints, True, defaults)


def source_of(target: Callable) -> List[ast.AST]:
    """All nodes of the source of a function or class; none where it cannot be
    read."""
    try:
        return list(ast.walk(ast.parse(textwrap.dedent(
            inspect.getsource(target)))))
    except (OSError, SyntaxError, TypeError):
        return []


def _use_of(function: Callable, name: str
            ) -> Tuple[Set[str], bool, bool, Set[str]]:
    """What a constructor does with its ``**kwargs``: the keys that it takes
    out; whether they go to the constructor of a base, or elsewhere; and which
    arguments of that constructor it sets itself."""
    nodes = source_of(function)
    above = {child: node for node in nodes
             for child in ast.iter_child_nodes(node)}
    read: Set[str] = set()
    taken: Set[str] = set()
    handed_up, elsewhere = False, not nodes
    for node in nodes:
        if not isinstance(node, ast.Name) or node.id != name:
            continue
        user = above[node]
        call = above[user]
        if isinstance(user, ast.keyword) and user.arg is None and \
                ast.unparse(call.func).endswith('.__init__'):
            handed_up = True
            taken |= {keyword.arg for keyword in call.keywords} - {None}
        elif isinstance(user, ast.Attribute) and isinstance(
                call, ast.Call) and call.args and isinstance(
                call.args[0], ast.Constant) and user.attr in ('get', 'pop'):
            read.add(call.args[0].value)
        elif isinstance(user, ast.Subscript) and isinstance(
                user.slice, ast.Constant):
            read.add(user.slice.value)
        elif isinstance(user, ast.Compare):
            read |= {part.value for part in [user.left]
                     if isinstance(part, ast.Constant)}
        elif not (isinstance(user, ast.Attribute)
                  and user.attr in ('setdefault', 'update')):
            elsewhere = True
    return read, handed_up, elsewhere, taken


def check_arguments(place: str, target: Callable, given: Dict[str, Any],
                    also: Iterable[str] = ()) -> None:
    """Raise :class:`ConfigError` for an argument that a class does not have,
    or a value that a type hint of ours excludes.

    Args:
        place (str): Where the arguments stand, as the user writes it:
            ``'model.loss_kd'``.
        target (Callable): The class, or a function.
        given (dict): Arguments by name; of a config too.
        also (Iterable[str]): Further names that are read by others.
    """
    arguments = arguments_of(target)
    if arguments.closed:
        check_keys(place, given, [*arguments.hints, *also, 'type', '_scope_'],
                   getattr(target, '__name__', str(target)))
    else:
        for name in set(given) - set(also):
            check_spelling(f'{place}.{name}', name, arguments.hints, 0.9)
    check_values(place, target, given)


def check_values(place: str, target: Callable, given: Dict[str, Any]) -> None:
    """Raise :class:`ConfigError` for a value that a type hint of ours
    excludes, see :func:`check_arguments`."""
    hints = arguments_of(target).hints
    for name, value in given.items():
        check_value(f'{place}.{name}', value, hints.get(name, Any))


def find_type(kind: Any, registry: Registry = MODELS) -> Any:
    """The class of a ``type``; of our own the scope may be left out. None if
    there is no such type."""
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    return kind and (registry.get(kind) or registry.get(f'mmsinger.{kind}'))


def build_part(key: str, cfg: Any, default: str = '', **given: Any) -> Any:
    """Build a part of a model from its config.

    Args:
        key (str): Where the config stands, as the user writes it:
            ``'loss_kd'``.
        cfg (dict): The config; ``type`` may be left out if there is a
            default. Of our own types the scope may be left out.
        default (str): The type then. Defaults to none.
        **given: Arguments that are not the user's to set.

    Returns:
        nn.Module: The part.

    Raises:
        ConfigError: If there is no such type, or it does not take one of the
            keys.
    """
    example = default or 'mmsinger.ClipNorms'
    if not isinstance(cfg, dict):
        raise ConfigError(f'{key}={cfg!r} is not valid: give a dict, for '
                          f'instance dict(type={example!r}).')
    cfg = dict(cfg)
    kind = cfg.setdefault('type', default)
    cls = find_type(kind)
    if not callable(cls):
        name = str(kind).split('.')[-1]
        raise ConfigError(
            f'{key}.type={kind!r}: there is no such type.'
            f'{near_matches(name, MODELS.module_dict)} Write its scope too, '
            f'as in {example!r}.')
    cfg['type'] = cls
    check_arguments(key, cls, cfg)
    with prefixed_errors(key):
        return MODELS.build(dict(cfg, **given))
