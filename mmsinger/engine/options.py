"""Overrides of a config: ``--cfg-options KEY=VALUE`` of every tool."""
import ast
import copy
import inspect
import os
from argparse import ArgumentParser, Namespace
from typing import Any, Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.runner import FlexibleRunner, Runner

from mmsinger.compat import onedl_config_packages
from mmsinger.errors import (ConfigError, check_spelling, near_matches,
                             walk_config)

# Top-level keys that mmengine's runners read; everything else in a config is
# a variable that such a part was made of when the file was read.
READ = {
    name for runner in (Runner, FlexibleRunner)
    for name in inspect.signature(runner.__init__).parameters
} - {'self', 'cfg'} | {
    'activation_checkpointing', 'compile', 'efficient_conv_bn_eval',
    'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn'
}
# Read when a config is opened, and by tools/test.py --tta
READ_BY_OTHERS = {'custom_imports', 'tta_model', 'tta_pipeline'}


class ConfigOptions(DictAction):
    """An argparse action: mmengine's ``DictAction``, and beyond it values
    such as ``"[dict(type='EMAHook', momentum=0.001)]"``."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace,
                 values: Sequence[str], option_string: Optional[str] = None
                 ) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        try:
            for pair in values:  # a later one may be inside an earlier one
                key, equals, text = pair.partition('=')
                options.pop(key, None)
                if not equals:
                    raise ValueError(f'{pair!r} has no =')
                options[key] = evaluate(
                    ast.parse(text.strip(), mode='eval').body) \
                    if 'dict(' in text or (
                        '{' in text and text.lstrip()[0] in '{[(') \
                    else self._parse_iterable(text)
            setattr(namespace, self.dest, options)
        except (AssertionError, ValueError, SyntaxError) as error:
            parser.error(f'{option_string} {" ".join(values)}: expected '
                         f'KEY=VALUE ({error})')


def evaluate(node: ast.expr) -> Any:
    """The value of a literal, with calls of ``dict`` and bare words in it.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(node, ast.Call) and not node.args and \
            ast.unparse(node.func) == 'dict':
        return {pair.arg: evaluate(pair.value) for pair in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        items = map(evaluate, node.elts)
        return list(items) if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict):
        return {evaluate(key): evaluate(value)
                for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.Name, ast.Attribute)):
        return ast.unparse(node)
    return ast.literal_eval(node)


def apply_options(cfg: Config, options: Dict[str, Any]) -> None:
    """Set overrides where they are read.

    Configs have variables, such as ``teacher`` or ``train_pipeline``, that
    nothing reads once the file is: ``model.teacher`` and
    ``train_dataloader.dataset.pipeline`` were copied from them. An override
    of a variable goes to all its copies.

    Args:
        cfg (Config): The config; changed in place.
        options (dict): Values by dotted path. Numbers are places in a list;
            the one after the last appends.

    Raises:
        ConfigError: If a path is misspelt, or nothing would read what is set
            there.
    """
    parts = list(walk_config({key: cfg[key] for key in cfg if key in READ}))
    copied, direct = [], []
    for option, value in options.items():
        _check_spelling(cfg, option)
        copies = _copies(cfg, option, parts)
        if copies:
            print_log(f'--cfg-options {option} sets {", ".join(copies)}',
                      logger='current')
        copied += [(copy, value) for copy in copies]
        direct.append((option, value))
    for option, value in copied + direct:
        path, value = _whole_lists(cfg, option, copy.deepcopy(value))
        try:
            cfg.merge_from_dict({path: value})
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f'--cfg-options {option}: cannot be set in '
                f'{cfg.filename!r}: {error.args[0]}') from error


def check_variables(cfg: Config) -> None:
    """Raise :class:`ConfigError` for a variable that a config file sets and
    nothing reads, such as a ``data_root`` of its own: its bases have made
    their parts already.

    Args:
        cfg (Config): As read from a file. Installed recipes are taken as they
            are; a base without a model is read by others.
    """
    path = cfg.filename
    if 'model' not in cfg or not path.endswith('.py') or \
            f'{os.sep}.mim{os.sep}' in path or Config._is_lazy_import(path):
        return
    with open(path, encoding='utf-8') as file:
        names = [node for node in ast.walk(ast.parse(file.read()))
                 if isinstance(node, ast.Name)]
    unread = {node.id for node in names if isinstance(node.ctx, ast.Store)
              and node.id in cfg} - READ_BY_OTHERS - READ - {
        node.id for node in names if isinstance(node.ctx, ast.Load)}
    found = Config._get_base_files(path) if unread else []
    if not found or any('{{' in base for base in found):
        return  # it is whole, as a dumped one; or mmengine fills paths in
    bases: Dict[str, Any] = {}
    with onedl_config_packages():
        for base in found:
            base, _ = Config._get_cfg_path(base, path)
            bases.update(Config.fromfile(base, import_custom_modules=False))
    parts = dict(walk_config({key: cfg[key] for key in cfg if key in READ}))
    for name in sorted(unread):
        old = bases.get(name)
        if name in bases and old == cfg[name]:
            continue
        ends = [place for place in parts if place.endswith(f'.{name}')]
        meant = [place for place, node in parts.items()
                 if isinstance(old, str) and node == old
                 or _is_copy(node, old, whole=False)] or [
            place for place in ends if parts[place] != cfg[name]]
        if meant or name in bases and not ends:
            raise ConfigError(
                f'{path}: {name} has no effect: nothing reads this variable '
                'once the bases are read. Set '
                f'{", ".join(meant[:6]) or "the parts made of it"} instead.')


def _check_spelling(cfg: Config, option: str) -> None:
    """A name that is not there is a mistake at the top, and where another
    one is nearly the same; merging would make it, and nothing read it."""
    top, *inner = option.split('.')
    if top not in cfg and top not in READ:
        raise ConfigError(
            f'--cfg-options {option}: the config has no {top!r}, and nothing '
            f'reads it.{near_matches(top, {*cfg.keys(), *READ}, 1)}')
    for i in range(1, len(inner)):
        parent = _at(cfg.get(top), inner[:i - 1])
        if isinstance(parent, dict):
            check_spelling(f'--cfg-options {option}', inner[i - 1], parent,
                           0.85)


def _copies(cfg: Config, option: str, parts: List[Tuple[str, Any]]
            ) -> List[str]:
    """Where else a variable's override has to be set.

    Raises:
        ConfigError: If there is no copy of the variable in what is read.
    """
    top, *inner = option.split('.')
    if top in READ:
        return []
    value = cfg[top]
    copies = ['.'.join([path, *inner]) for path, node in parts
              if _is_copy(node, value, whole=not inner)]
    # Of a variable that was changed elsewhere: what is the same in its place
    old = _at(value, inner)
    tails = [f'.{option}'] if inner else []
    if len(inner) > 1:
        tails.append('.' + '.'.join(inner))
    copies += [path for path, node in parts if path.endswith(tuple(tails))
               and path not in copies and old is not None and node == old]
    if not copies and 'model' in cfg:  # else it is a base, which is the part
        alike = _alike(option.split('.'), parts)
        fix = f'Set {alike[0]} instead.' if len(alike) == 1 else \
            f'Set those that you mean: {", ".join(alike[:6])}.' if alike \
            else 'Set the part of the config that is to change.'
        raise ConfigError(
            f'--cfg-options {option}: {top!r} is a variable of the config, '
            'which nothing reads once the config is made, and no part is a '
            f'copy of it any more. {fix}')
    return copies


def _at(node: Any, words: Sequence[str]) -> Any:
    """What a path leads to; None if nothing is there."""
    for word in words:
        if isinstance(node, dict):
            node = node.get(word)
        elif isinstance(node, (list, tuple)) and word.isdigit() and \
                int(word) < len(node):
            node = node[int(word)]
        else:
            return None
    return node


def _is_copy(node: Any, value: Any, whole: bool) -> bool:
    if isinstance(value, dict) and isinstance(node, dict):
        # dict(..., **variable) has further keys
        return bool(value) and (node == value or (
            not whole and len(value) > 1 and
            all(key in node and node[key] == item
                for key, item in value.items())))
    # Equal numbers and texts may well be a coincidence
    return isinstance(value, (list, tuple)) and node == value and any(
        isinstance(item, dict) for item in value)


def _alike(words: List[str], parts: List[Tuple[str, Any]]) -> List[str]:
    """Paths that end like an override's."""
    found: List[str] = []
    while words and not found:
        *owner, leaf = words
        found = [f'{path}.{leaf}' for path, node in parts
                 if f'.{path}'.endswith('.'.join(['', *owner]))
                 and isinstance(node, dict) and (owner or leaf in node)]
        words = words[1:]
    return found


def _whole_lists(cfg: Config, option: str, value: Any) -> Tuple[str, Any]:
    """Override the whole list where an item is replaced or appended, which
    mmengine's merge does not do."""
    node, words = cfg, option.split('.')
    for i, name in enumerate(words):
        if name.isdigit() and i and (
                node is None or isinstance(node, (list, tuple))):
            items, index = list(node or ()), int(name)
            last = i + 1 == len(words)
            if index == len(items) or last and index < len(items):
                for word in reversed(words[i + 1:]):
                    value = ConfigDict({word: value})
                items[index:index + 1] = [value]
                return '.'.join(words[:i]), type(node or items)(items)
            node = items[index] if index < len(items) else None
        elif isinstance(node, (dict, Config)):
            node = node.get(name)
        else:
            break
    return option, value
