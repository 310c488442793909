"""Reading checkpoints safely and loading them strictly."""
import contextlib
import hashlib
import io
import os
import pickle
import re
import zipfile
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple, Union
from urllib.parse import urlparse

import torch
from torch import nn

from mmsinger.errors import ConfigError, no_file

SHIPPED = 'mmsinger://'
STUDENT = 'student.'  # what a student's keys begin with in a distiller
TRUSTED = 'MMSINGER_TRUST_CHECKPOINT'
_torch_load = torch.load
_replaced: List[Tuple[Callable, Callable]] = []  # by safe_loading


def load_checkpoint(path: str, key: str = 'checkpoint') -> Dict[str, Any]:
    """Read a checkpoint to the CPU without running code from it.

    Args:
        path (str): A local path, ``mmsinger://NAME`` for a file that ships
            with the package, an http(s) address (kept in torch's cache of
            checkpoints), or an address that mmengine's file backends know.
            ``.safetensors`` files hold the state dict alone; anything else
            is what ``torch.save`` wrote.
        key (str): The config key that named the path, for error messages.

    Returns:
        dict: The checkpoint as it was saved.

    Raises:
        ConfigError: If the file is missing, truncated, no checkpoint, or
            holds objects that ``torch.load(weights_only=True)`` refuses.
    """
    path = os.fspath(path)
    source = _fetch(path, key)
    if urlparse(path).path.lower().endswith('.safetensors'):
        return _load_safetensors(source, path, key)
    checkpoint = _load_safely(source, f'{key}={path!r}',
                              _into(source, path), map_location='cpu')
    if not isinstance(checkpoint, dict):
        raise ConfigError(
            f'{key}={path!r} holds a {type(checkpoint).__name__}, not a '
            'dictionary of weights. Save model.state_dict() instead.')
    return checkpoint


def check_there(path: str, key: str) -> None:
    """Raise :class:`ConfigError` unless a path is a file, or an address.

    Args:
        path (str): Of a checkpoint.
        key (str): The config key that named it.
    """
    if '://' not in path and not os.path.isfile(path):
        raise ConfigError(
            f'{key}={path!r}: {no_file(path)} Download the weights, or set '
            f'{key} to where they are.')


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Let no file run code: within it, each ``torch.load`` reads tensors and
    plain values alone, whoever calls it.

    mmengine, timm and torch.hub all end there, with local files and
    downloads, and unpickle anything where the safe way fails. The safe
    function is in place of ``torch.load``, or of what has replaced it, for as
    long as any such context is open, in whichever order they end.

    Raises:
        ConfigError: By ``torch.load``, for a file that is damaged or holds
            more than tensors and plain values. The environment variable
            ``MMSINGER_TRUST_CHECKPOINT`` names, by their SHA-256, files that
            may hold more.
    """
    _replaced.append((torch.load, torch.serialization.load))
    torch.load = torch.serialization.load = _guarded_load
    try:
        yield
    finally:
        torch.load, torch.serialization.load = _replaced.pop()


def _guarded_load(f: Any, map_location: Any = None, pickle_module: Any = None,
                  *, weights_only: Any = None, **kwargs: Any) -> Any:
    """``torch.load`` within :func:`safe_loading`; ``weights_only`` is always
    true and the standard unpickler is not used."""
    name = f if isinstance(f, (str, os.PathLike)) else \
        getattr(f, 'name', type(f).__name__)
    content = _load_safely(f, f'checkpoint {os.fspath(name)!r}',
                           map_location=map_location, **kwargs)
    meta = content.get('meta') if isinstance(content, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)  # mmengine executes it on resume
    return content


def _load_safely(source: Any, name: str, where: str = '', **kwargs: Any
                 ) -> Any:
    """``torch.load`` without code, or one error that says what is wrong."""
    # Damaged bytes make the unpickler raise nearly anything.
    try:
        _check_sums(source)  # which torch does not look at
        with _safe_globals():
            return _torch_load(source, weights_only=True, **kwargs)
    except pickle.UnpicklingError as error:
        _refuse_other_files(source, name, where)
        digest = sha256(source)
        if digest in os.environ.get(TRUSTED, '').lower().split(','):
            return _torch_load(source, weights_only=False, **kwargs)
        raise ConfigError(
            f'{name} is no torch checkpoint, is damaged, or holds Python '
            'objects that cannot be loaded safely: they may run any code. '
            'Ask for a file with tensors only (torch.save({\'state_dict\': '
            '…}, path)). If you trust whoever made it, set the environment '
            f'variable {TRUSTED}={digest}, and it is loaded all the same. '
            f'torch said: {_refused(error)}') from error
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ConfigError(
            f'{name} cannot be read: it is truncated, damaged or no torch '
            f'checkpoint. Fetch it again{where}. torch said: '
            f'{_first_line(error)}') from error


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Any]:
    """A file, by its path, or an open one that goes back to its beginning."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(source, 'rb')) \
            if isinstance(source, (str, os.PathLike)) else source
        file.seek(0)
        yield file
        file.seek(0)


def _check_sums(source: Any) -> None:
    start = source.tell() if hasattr(source, 'tell') else 0
    with _opened(source) as file:
        if zipfile.is_zipfile(file):
            damaged = zipfile.ZipFile(file).testzip()
            if damaged:
                raise ValueError(f'the checksum of {damaged} does not fit')
    if hasattr(source, 'seek'):
        source.seek(start)


def _refuse_other_files(source: Any, name: str, where: str) -> None:
    with _opened(source) as file:
        begin = file.read(32)
    kind = ''
    if begin.startswith(b'version https://git-lfs'):
        kind = 'a pointer of Git LFS: fetch the file by git lfs pull'
    elif begin.lstrip().startswith(b'<'):
        kind = f'a page of HTML: fetch the file again{where}'
    elif begin[8:9] == b'{':
        kind = 'of the kind .safetensors: give it this suffix'
    if kind:
        raise ConfigError(f'{name} is no torch checkpoint, but {kind}.')


def sha256(source: Any) -> str:
    """The digest of a file, by its path; or of an open one, which goes back to
    its beginning."""
    digest = hashlib.sha256()
    with _opened(source) as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def _refused(error: Exception) -> str:
    """What torch says between its general advice, which ends with a link."""
    said = str(error).split('WeightsUnpickler error:')[-1]
    parts = [part.strip() for part in said.split('\n\n')
             if part.strip() and 'documentation of torch.load' not in part]
    return _first_line(Exception(parts[-1] if parts else error))


def _fetch(path: str, key: str) -> Union[str, io.BytesIO]:
    """A local path, or the content of a remote file."""
    from mmengine.fileio import get
    if path.startswith(SHIPPED):
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                            'assets', path[len(SHIPPED):])
    if os.path.isfile(path):
        return path
    check_there(path, key)
    try:
        return _download(path) if path.startswith('http') else \
            io.BytesIO(get(path))
    except Exception as error:
        raise ConfigError(
            f'{key}={path!r} cannot be fetched: {_first_line(error)}. '
            f'Download it by other means and set {key} to the local file.'
        ) from error


def _download(address: str) -> str:
    """Where torch.hub and mmengine keep downloaded checkpoints too; names
    without a hash, such as model.safetensors, in a folder for each address."""
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    name = os.path.basename(urlparse(address).path)
    if not re.search(r'[-_][0-9a-f]{8,}\.', name):
        folder = os.path.join(
            folder, hashlib.sha256(address.encode()).hexdigest()[:12])
    target = os.path.join(folder, name)
    if not os.path.isfile(target):
        os.makedirs(folder, exist_ok=True)
        # Written under another name first: safe with several processes.
        torch.hub.download_url_to_file(address, target)
    return target


def _load_safetensors(source: Union[str, io.BytesIO], path: str, key: str
                      ) -> Dict[str, Any]:
    try:
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ConfigError(
            f'{key}={path!r} needs the package safetensors: '
            '`pip install safetensors`.') from error
    try:
        if isinstance(source, str):
            return load_file(source)
        return load(source.getvalue())
    except Exception as error:
        raise ConfigError(
            f'{key}={path!r} cannot be read: it is truncated, damaged or no '
            f'safetensors file. Fetch it again{_into(source, path)}. '
            f'safetensors said: {_first_line(error)}') from error


def _into(source: Union[str, io.BytesIO], path: str) -> str:
    """Names the cached copy of a download, which has to go first."""
    if isinstance(source, str) and path.startswith('http'):
        return f' (first delete the cached copy {source})'
    return ''


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rstrip('.')


@contextlib.contextmanager
def _safe_globals() -> Iterator[None]:
    """Allow what mmengine puts beside the weights, histories and numpy
    numbers, and what the program allows already."""
    import numpy as np
    from mmengine.logging import HistoryBuffer
    try:
        from numpy._core import multiarray
    except ImportError:  # before numpy 1.26
        from numpy.core import multiarray
    dtypes = [type(np.dtype(t)) for t in (
        np.float64, np.float32, np.int64, np.int32, np.bool_)]
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([
        # mmengine allows all of getattr while it loads
        *(entry for entry in before if entry not in (getattr, np.dtype)),
        HistoryBuffer, (_history_method, 'builtins.getattr'),
        np.ndarray, (_number_type, 'numpy.dtype'), *dtypes,
        # numpy 1 and numpy 2 call the same functions by different names
        *((getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
          for name in ('_reconstruct', 'scalar') for core in ('core', '_core'))
    ])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _history_method(owner: Any, name: str) -> Any:
    """Stands in for ``getattr``, with which histories refer to their methods
    and other files could reach anything."""
    from mmengine.logging import HistoryBuffer
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not safe')


def _number_type(name: str, *args: Any) -> Any:
    """Stands in for ``numpy.dtype``, of which histories need the numbers
    alone; arrays of objects could hold pointers to anywhere."""
    import numpy as np
    if isinstance(name, str) and re.fullmatch(r'[<>=|]?[biufc]\d*', name):
        return np.dtype(name)
    raise pickle.UnpicklingError(f'numpy.dtype({name!r}) is not safe')


def weights_of(checkpoint: Dict[str, Any], path: str) -> Dict[str, Any]:
    """The state dict inside a checkpoint, wherever its writer put it.

    Args:
        checkpoint (dict): As read by :func:`load_checkpoint`.
        path (str): Where it came from, for error messages.

    Returns:
        dict[str, Tensor]: The state dict; a ``module.`` left by
        DistributedDataParallel is removed.

    Raises:
        ConfigError: If there is no tensor in it, or one is not finite.
    """
    weights = checkpoint
    for key in ('state_dict', 'model', 'model_state_dict', 'module'):
        if isinstance(checkpoint.get(key), dict):
            weights = checkpoint[key]
            break
    weights = {k: v for k, v in weights.items()
               if isinstance(k, str) and torch.is_tensor(v)}
    if not weights:
        raise ConfigError(
            f'{path!r} holds no weights; its keys are '
            f'{list(checkpoint)[:10]}. Expected a state dict, or one under '
            "'state_dict' or 'model'.")
    if all(k.startswith('module.') for k in weights):
        weights = {k[len('module.'):]: v for k, v in weights.items()}
    refuse_broken(weights, path)
    return weights


def read_weights(path: str, key: str = 'checkpoint') -> Dict[str, Any]:
    """The state dict in a file, see :func:`load_checkpoint` and
    :func:`weights_of`."""
    return weights_of(load_checkpoint(path, key), path)


def refuse_broken(weights: Dict[str, torch.Tensor], path: str) -> None:
    """Raise :class:`ConfigError` for weights that are not finite.

    Args:
        weights (dict[str, Tensor]): A state dict.
        path (str): Where it came from.
    """
    odd = [key for key, value in weights.items()
           if value.is_meta or value.layout != torch.strided]
    if odd:
        raise ConfigError(f'{path} has tensors without values or sparse ones, '
                          f'{", ".join(odd[:4])}. Save dense tensors.')
    broken = [key for key, value in weights.items()
              if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ConfigError(f'{path} has weights that are not finite, in '
                          f'{", ".join(broken[:4])}: the file is damaged, or '
                          'its training diverged. Take another.')


def refuse_foreign(what: str, found: Iterable[str], expected: Iterable[str],
                   fitting: int, fix: str) -> None:
    """Raise :class:`ConfigError` where less than a tenth of a model is in a
    file: the toolboxes log that, and train from random weights.

    Args:
        what (str): The beginning of the message.
        found (Iterable[str]): Keys of the file.
        expected (Iterable[str]): Keys of the model.
        fitting (int): How many of these the file has.
        fix (str): What the user may do about it.
    """
    found, expected = list(found), list(expected)
    if fitting * 10 < len(expected):
        raise ConfigError(
            f'{what}: {fitting} of {len(expected)} tensors.\n  The file has '
            f'{", ".join(found[:6])}, …\n  The model has '
            f'{", ".join(expected[:6])}, …\n{fix}')


def student_state_dict(state_dict: Dict[str, torch.Tensor]
                       ) -> Dict[str, torch.Tensor]:
    """The student's part of a distiller's state dict, in the plain layout.

    Args:
        state_dict (dict[str, Tensor]): Keys ``student.backbone.…``,
            ``adapters.…`` and so on.

    Returns:
        dict[str, Tensor]: Keys ``backbone.…``, ``decode_head.…`` and so on;
        empty if there is no student in it.
    """
    return {key[len(STUDENT):]: value for key, value in state_dict.items()
            if key.startswith(STUDENT)}


def load_strict(module: nn.Module, weights: Dict[str, torch.Tensor],
                what: str, fix: str, ignore: Iterable[str] = ()) -> None:
    """``load_state_dict`` that is strict and says all that does not fit.

    The hooks that a backbone has for its own loading (resizing of position
    embeddings, for instance) run as usual.

    Args:
        module (nn.Module): What to load into.
        weights (dict[str, Tensor]): The state dict; not changed.
        what (str): Names module and file in the error message.
        fix (str): What the user may do about it.
        ignore (Iterable[str]): Prefixes of keys in ``weights`` that may be
            left over, such as ``'head.'``. Defaults to none.

    Raises:
        ConfigError: If a key is missing or left over, a shape differs, or
            integers or complex numbers are to be real ones.
    """
    ignore = tuple(ignore)
    weights = {k: v for k, v in weights.items() if not k.startswith(ignore)} \
        if ignore else dict(weights)
    real = {k for k, v in module.state_dict().items() if v.is_floating_point()}
    other = [k for k, v in weights.items()
             if k in real and not v.is_floating_point()]
    if other:
        raise ConfigError(
            f'{what}: {weights[other[0]].dtype} in place of real numbers, in '
            f'{", ".join(other[:4])}. {fix}')
    # What a backbone's own hooks raise where a shape is beyond resizing can
    # be anything; load_state_dict itself raises a RuntimeError.
    try:
        result = module.load_state_dict(weights, strict=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ConfigError(f'{what}: shapes differ.\n  '
                          + '\n  '.join(_shorten(lines[1:] or lines))
                          + f'\n{fix}') from error
    missing = set(result.missing_keys)
    if missing:  # Swin V2 passes over what it computes anew
        missing -= set(module.load_state_dict(
            module.state_dict(), strict=False).missing_keys)
    problems = []
    for title, keys in (('missing', sorted(missing)),
                        ('unexpected', result.unexpected_keys)):
        if keys:
            problems.append(f'{len(keys)} {title} keys:\n    '
                            + '\n    '.join(_shorten(keys)))
    if problems:
        raise ConfigError(f'{what}:\n  ' + '\n  '.join(problems)
                          + f'\n{fix}')


def _shorten(lines: List[str]) -> List[str]:
    return lines if len(lines) <= 20 else [
        *lines[:20], f'… and {len(lines) - 20} more']
