"""Errors that users see: what, where, got, valid choices, how to fix."""
import contextlib
import difflib
import errno
import inspect
import os
import re
import sys
import traceback
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple
from urllib.error import URLError

# Environment variable: show tracebacks of mistakes in a config too
TRACEBACK = 'MMSINGER_TRACEBACK'
# Classes of sections that need no type, and where these stand
UNTYPED = {'OptimWrapper': 'optim_wrapper',
           'ClsDataPreprocessor': 'data_preprocessor',
           'SegDataPreProcessor': 'data_preprocessor'}


class ConfigError(ValueError):
    """A mistake in a config, a checkpoint or a data folder.

    The message says what is wrong, which key it concerns, the value found,
    the valid choices and how to fix it. Tools print it without a traceback,
    by :func:`readable_errors`.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (for instance a non-finite loss).

    Raised before any checkpoint is written, so that the last one stays good.
    """


def near_matches(word: str, choices: Iterable[str], limit: int = 3,
                 likeness: float = 0.6) -> str:
    """A hint that lists the choices nearest to a misspelt word, whatever its
    capitals.

    Args:
        word (str): What the user wrote.
        choices (Iterable[str]): The valid spellings.
        limit (int): The most choices to list. Defaults to 3.
        likeness (float): How near they have to be, from 0 to 1. Defaults to
            0.6.

    Returns:
        str: ``" Did you mean 'a', 'b'?"`` with a leading blank, or an empty
        string when nothing is near.
    """
    lower: Dict[str, List[str]] = {}
    for choice in choices:
        lower.setdefault(choice.lower(), []).append(choice)
    near = [choice for found in difflib.get_close_matches(
        str(word).lower(), lower, limit, likeness)
        for choice in lower[found]]
    if not near:
        return ''
    return ' Did you mean ' + ', '.join(repr(n) for n in near[:limit]) + '?'


def near_paths(path: str) -> str:
    """A hint for a path that does not exist: what its folder holds."""
    folder = os.path.dirname(path) or '.'
    return near_matches(os.path.basename(path), os.listdir(folder)) \
        if os.path.isdir(folder) else ''


def no_file(path: str) -> str:
    """Why a path is no file that can be read, for a message.

    Args:
        path (str): Not a file, by ``os.path.isfile``.

    Returns:
        str: A sentence without its subject, with near matches.
    """
    if os.path.isdir(path):
        return 'a folder, not a file.'
    if os.path.islink(path):
        return f'a link to {os.readlink(path)!r}, where there is no file.'
    return f'no such file (working directory {os.getcwd()}).' \
        f'{near_paths(path)}'


def check_output_file(path: str) -> None:
    """Raise :class:`ConfigError` unless a file can be written there, which
    ``--out`` named: said before the work, not after it."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise ConfigError(f'--out={path!r} is a folder. Name a file, for '
                          f'instance {os.path.join(path, "out")!r} with a '
                          'suffix.')
    if os.path.exists(path) and re.fullmatch(
            r'(iter|epoch|best)_(?!.*_student).*\.pth',
            os.path.basename(path)):
        raise ConfigError(f"--out={path!r} is a run's checkpoint, which would "
                          'be gone. Choose another name.')
    if not os.path.isdir(folder):
        raise ConfigError(f'--out={path!r}: no folder {folder!r}. Make it, '
                          'or choose another.')
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f'--out={path!r} cannot be written. Choose another '
                          'place, or mend its permissions.')


def check_choice(key: str, value, choices: Iterable) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``.

    Args:
        key (str): The config key, as the user writes it.
        value: What the user wrote.
        choices (Iterable): The valid values.
    """
    choices = tuple(choices)
    if value not in choices:
        hint = near_matches(value, [c for c in choices if isinstance(c, str)])
        raise ConfigError(f'{key}={value!r} is not valid. Choose from '
                          f'{", ".join(map(repr, choices))}.{hint}')


def check_keys(key: str, given: Iterable[str], known: Iterable[str],
               owner: str = '') -> None:
    """Raise :class:`ConfigError` for a key that nobody reads.

    Args:
        key (str): Where the keys stand, as the user writes it:
            ``'model.adapter'``.
        given (Iterable[str]): The keys that the user wrote.
        known (Iterable[str]): The valid ones.
        owner (str): Whose keys they are, for the message. Defaults to ``''``.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ConfigError(
                f'{key}.{name}: {f"{owner} has " if owner else ""}no such '
                f'key.{near_matches(name, known)} Its keys are '
                f'{", ".join(known)}.')


def check_spelling(place: str, name: str, known: Iterable[str],
                   likeness: float) -> None:
    """Raise :class:`ConfigError` for a key that is nearly one of those that
    are read, where nobody knows all of them.

    Args:
        place (str): Where it stands, as the user writes it.
        name (str): The key.
        known (Iterable[str]): Valid ones.
        likeness (float): How near it has to be, from 0 to 1.
    """
    near = difflib.get_close_matches(name, known, 1, likeness)
    if near and near[0] != name:
        raise ConfigError(f'{place}: nothing reads {name!r}. Did you mean '
                          f'{near[0]!r}?')


@contextlib.contextmanager
def prefixed_errors(place: str) -> Iterator[None]:
    """Put a place in front of the keys that errors name: what is built in
    here does not know where its config stands.

    Args:
        place (str): As the user writes it: ``'model.targets.0'``.
    """
    try:
        yield
    except ConfigError as error:
        error.args = (f'{place}.{error}', )
        raise


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """End a command line tool with the message alone, no traceback, when the
    mistake is the user's, the disk is full, or Ctrl-C was pressed. What a
    class of another package, named in the config, raises when it is built or
    first used is such a mistake too, and the message says where it stands.
    Any other exception keeps its traceback."""
    try:
        yield
    except (ConfigError, TrainingError) as error:
        said = _as_first_raised(error)
    except URLError as error:  # of mmengine's and torch's own downloads
        said = ConfigError(
            f'Weights cannot be fetched: {error.reason}. The config names an '
            "address in load_from, or in the student's pretrained or "
            'init_cfg.checkpoint (model.student.backbone.init_cfg). Download '
            'the file by other means and set that key to it, or to None.')
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
        said = TrainingError(
            f'{error.filename or "A file"} cannot be written: '
            f'{error.strerror}. Make room and start again; a training run '
            'goes on with --resume.') if full else _as_config_error(error)
        if said is None or os.environ.get(TRACEBACK):
            raise
    except KeyboardInterrupt:
        print('\nInterrupted.', file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f'\n{type(said).__name__}: {said}', file=sys.stderr)
    sys.exit(1)


def _as_first_raised(error: Exception) -> Exception:
    """Some registries raise what comes out of a constructor anew, with the
    class in front; this is the error under it."""
    first, current = error, error
    while current is not None:
        if isinstance(current, (ConfigError, TrainingError)):
            first = current
        current = current.__cause__ or current.__context__
    return first


def _as_config_error(error: Exception) -> Optional[ConfigError]:
    """A mistake in a config that a class of another package found when it
    was built, or first used; None if no class of the config was at work."""
    if '`epoch_length` must be a positive' in str(error):
        return ConfigError(
            'train_dataloader: an epoch has no batch. With drop_last=True '
            'there have to be at least batch_size images: lower '
            'train_dataloader.batch_size, or set drop_last=False.')
    frames = list(traceback.walk_tb(error.__traceback__))
    while error.__context__ is not None:  # some registries raise anew
        error = error.__context__
        frames += traceback.walk_tb(error.__traceback__)
    begun = any(
        isinstance(steps := getattr(frame.f_locals.get('self'), '_iter', 0),
                   int) and steps > 0 for frame, _ in frames)
    found: Dict[str, List[str]] = {}  # places by type
    for frame, _ in frames:
        cfg = frame.f_locals.get('cfg')
        if hasattr(type(cfg), 'pretty_text'):  # a slow property
            from mmengine.runner import Runner
            read = inspect.signature(Runner.__init__).parameters
            for place, kind in walk_config(
                    {k: cfg[k] for k in cfg if k in read}):
                if place.endswith('.type'):
                    found.setdefault(type_name(kind), []).append(
                        place[:-len('.type')])
            for name, place in UNTYPED.items():
                found.setdefault(name, [place])
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    hint = ''
    for frame, _ in reversed(frames):
        known = frame.f_locals
        if unknown and not hint and 'obj_cls' in known:
            hint = near_matches(unknown[1], inspect.signature(
                known['obj_cls']).parameters)
        for cls in (known.get('obj_cls'), type(known.get('self'))):
            name = getattr(cls, '__name__', '')
            if str(getattr(cls, '__module__', '')).startswith('mmsinger.'):
                return None  # then it is a mistake of ours
            if name in found:
                where = ' or '.join(dict.fromkeys(found[name]))
                if begun and 'evaluator' not in where:
                    return None  # it has worked before
                last, line = frames[-1]
                return ConfigError(
                    f'{where} ({name}) cannot be used as it is: '
                    f'{type(error).__name__}: {error}.{hint}\n(at '
                    f'{last.f_code.co_filename}:{line}; set {TRACEBACK}=1 for '
                    'the traceback)')
    return None


def type_name(kind: Any) -> str:
    """The name of a ``type`` in a config, a class or a text, without its
    scope."""
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def walk_config(node: Any, place: str = '') -> Iterator[Tuple[str, Any]]:
    """All that a config holds, with its place as the user writes it:
    ``'custom_hooks.0.type'``."""
    items = node.items() if isinstance(node, dict) else \
        enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, item in items:
        below = f'{place}.{key}' if place else str(key)
        yield below, item
        yield from walk_config(item, below)
