"""What values a setting takes: the type hint of the argument that reads it.

``quantile: Quantile = 0.95`` in a signature is all there is to say. Configs,
constructors and command lines are checked against the same hints.
"""
import argparse
import math
from collections.abc import Mapping
from typing import (Annotated, Any, Callable, Dict, Literal, NamedTuple, Tuple,
                    Union, get_args, get_origin, get_type_hints)

from mmsinger.errors import ConfigError, check_keys, near_matches


class Range(NamedTuple):
    """The numbers that are valid.

    Attributes:
        low (float): The least.
        high (float): The largest.
        ends (str): Whether they are valid themselves, ``'[]'``, or not,
            ``'()'``.
    """
    low: float = 0
    high: float = math.inf
    ends: str = '[]'

    def __contains__(self, value: Any) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and \
            not (self.ends[0] == '(' and value == self.low) and \
            not (self.ends[1] == ')' and value == self.high)

    def __str__(self) -> str:
        if self.ends == '()' and self.high < math.inf:
            return f'between {self.low} and {self.high}, both excluded'
        least = f'above {self.low}' if self.ends[0] == '(' \
            else f'{self.low} or more'
        if self.high == math.inf:
            return least
        return f'{least} and ' + (f'below {self.high}' if self.ends[1] == ')'
                                  else f'at most {self.high}')


class DefaultType(NamedTuple):
    """Of a config: the ``type`` that it stands for without one."""
    type: str


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, ends='(]')]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, '(]')]
Quantile = Annotated[float, Range(0, 1, '()')]
Fraction = Annotated[float, Range(0, 1, '[)')]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # as numpy takes it
Point = Tuple[Fraction, Fraction]  # of an image, down and to the right


def hints_of(function: Callable) -> Dict[str, Any]:
    """Type hints by argument; none of what cannot be read."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def check_value(key: str, value: Any, hint: Any) -> None:
    """Raise :class:`ConfigError` unless a value is what a hint says.

    Args:
        key (str): The setting, as the user writes it.
        value: What the user wrote.
        hint: A type hint; of classes of other packages, anything is right.
    """
    if fits(value, hint):
        return
    owner = _mapping(hint)
    if owner is not None and isinstance(value, Mapping):
        hints = hints_of(owner)
        check_keys(key, value, hints)
        for name, item in value.items():
            check_value(f'{key}.{name}', item, hints[name])
    for option in _options(hint):
        items = {}
        if get_origin(option) is dict and isinstance(value, Mapping):
            items = value
        elif _item(option) is not None and isinstance(value, (list, tuple)):
            items = dict(enumerate(value))
        for name, item in items.items():
            check_value(f'{key}.{name}', item,
                        _item(option) or get_args(option)[1])
    near = near_matches(value, [
        choice for option in _options(hint) for choice in get_args(option)
        if isinstance(choice, str)]) if isinstance(value, str) else ''
    raise ConfigError(f'{key}={value!r} is not valid: give '
                      f'{describe(hint)}.{near}')


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type hint says."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0]) and all(
            value is None or value in rule for rule in inner[1:]
            if isinstance(rule, Range))
    if origin is Union:
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(value is choice or type(value) is type(choice)
                   and value == choice for choice in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and \
            not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if _mapping(hint) is not None:
        hints = hints_of(hint)
        return isinstance(value, Mapping) and \
            _mapping(hint).__required_keys__ <= set(value) and all(
                name in hints and fits(item, hints[name])
                for name, item in value.items())
    if hint is dict or origin is dict:
        return isinstance(value, Mapping) and all(
            fits(item, hint) for hint in inner[1:] for item in value.values())
    item = _item(hint)
    if item is not None:
        fixed = len(inner) if origin is tuple and inner[-1:] != (Ellipsis, ) \
            else None
        return isinstance(value, (list, tuple)) and \
            fixed in (None, len(value)) and \
            all(fits(one, item) for one in value)
    return True


def _options(hint: Any) -> Tuple[Any, ...]:
    """What a hint is one of."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) is Union else (hint, )


def _mapping(hint: Any) -> Any:
    """The ``TypedDict`` that a hint allows; None if there is none."""
    return next((option for option in _options(hint)
                 if hasattr(option, '__total__')), None)


def _item(hint: Any) -> Any:
    """What a hint of a list says of its items; None if it is of no list."""
    origin = get_origin(hint)
    if isinstance(origin, type) and not issubclass(origin, (str, Mapping)) \
            and hasattr(origin, '__getitem__'):
        return (*get_args(hint), Any)[0]
    return None


def describe(hint: Any) -> str:
    """A type hint in words, as they stand after "give"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rules = [str(rule) for rule in inner[1:] if isinstance(rule, Range)]
        return ', '.join([describe(inner[0]), *rules])
    if origin is Union:
        return ', or '.join(describe(option) for option in inner)
    if origin is Literal:
        return 'one of ' + ', '.join(map(repr, inner)) if len(inner) > 1 \
            else repr(inner[0])
    item = _item(hint)
    if item is not None:
        count = f' of {len(inner)}' if origin is tuple and \
            inner[-1:] != (Ellipsis, ) else ''
        return f'a list{count} (each {describe(item)})'
    mapping = _mapping(hint)
    if mapping is not None:
        return f'a dict with the keys {", ".join(hints_of(mapping))}'
    names = {int: 'a whole number', float: 'a number', bool: 'True or False',
             str: 'a text', dict: 'a dict', type(None): 'None'}
    return names.get(origin or hint, getattr(hint, '__name__', str(hint)))


def reader(hint: Any) -> Callable[[str], Union[int, float]]:
    """What argparse reads a number with: ``type=reader(Count)``.

    Args:
        hint: ``int``, ``float``, or one of the kinds above.

    Returns:
        Callable: Takes the text; raises ``ArgumentTypeError``.
    """
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint

    def read(text: str) -> Union[int, float]:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value, hint):
            raise argparse.ArgumentTypeError(
                f'{text!r} is not valid: give {describe(hint)}')
        return value

    return read
