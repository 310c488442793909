"""Files that are complete or not there, and folders that one run has."""
import atexit
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from typing import Any, Dict, Iterator, List, Tuple

import torch

from mmsinger.errors import ConfigError

LOCK = 'run.lock'
# Open files by process and path: a fork holds none of its parent's locks
_locks: Dict[Tuple[int, str], int] = {}


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[str]:
    """Write a file completely or not at all, whatever stops the process
    meanwhile. It is on the disk then, so that it outlives the machine too.

    Args:
        path (str): Where it shall be; its folder exists. A file that is
            there, or that a link there leads to, is replaced at the end and
            its permissions kept; a device or a pipe is written to.

    Yields:
        str: An empty file beside it, to write to instead.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        yield path
        return
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}.tmp')
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL,
                         0o666))
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(folder)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            error.filename = path
        raise


def atomic_save(content: Any, path: str) -> None:
    """``torch.save`` by :func:`atomic_write`.

    Args:
        content (Any): What to save.
        path (str): Where it shall be.

    Raises:
        OSError: If it cannot be written; given a path, ``torch.save`` would
            raise a RuntimeError without the reason.
    """
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        torch.save(content, file)


def write_text(text: str, path: str) -> None:
    """Text by :func:`atomic_write`, in UTF-8; what cannot be told in it (file
    names may hold any bytes) comes with backslashes."""
    with atomic_write(path) as temporary, open(
            temporary, 'w', encoding='utf-8',
            errors='backslashreplace') as file:
        file.write(text)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(content: Any, path: str) -> None:
    """JSON by :func:`atomic_write`, in which numbers that are none, NaN and
    infinities, are null.

    Args:
        content (Any): Dictionaries, lists, strings and numbers.
        path (str): The file.
    """
    content = json.loads(json.dumps(content, default=float),
                         parse_constant=lambda _: None)
    write_text(json.dumps(content, indent=2), path)


@contextlib.contextmanager
def complete_folder(path: str) -> Iterator[str]:
    """Make a folder that is there under its name only when it is complete.

    Args:
        path (str): Where it shall be; nothing is there, or an empty folder.

    Yields:
        str: A new folder beside it, to write to instead. Killed, a process
        leaves it behind.
    """
    path = os.path.realpath(path)
    partial = f'{path}.partial{os.getpid()}'
    try:
        os.makedirs(partial)
        yield partial
        if os.path.isdir(path):
            os.rmdir(path)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: str) -> List[str]:
    """Remove what an :func:`atomic_write` that was killed has left.

    Args:
        folder (str): Where nobody writes at the moment.

    Returns:
        list[str]: The names of the files that were to be written.
    """
    found = []
    for entry in list(os.scandir(folder)):
        match = re.fullmatch(r'\.(.+)\.\w{8}\.tmp', entry.name)
        if match and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
            found.append(match[1])
    return found


def lock_folder(folder: str) -> None:
    """Claim a folder for this process, until it ends or
    :func:`unlock_folder`. Claiming it again changes nothing.

    The operating system gives the lock up when the process ends, however it
    does, so that a lock file that was left behind locks nobody out. Where it
    has no locks (Windows, some network drives), nothing is claimed.

    Args:
        folder (str): It exists and can be written to.

    Raises:
        ConfigError: If another process has it, on this machine or on another
            that shares the drive.
    """
    path = os.path.join(os.path.realpath(folder), LOCK)
    if (os.getpid(), path) in _locks:
        return
    try:
        import fcntl
    except ImportError:
        return
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW,
                             0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise ConfigError(f'{path!r} is a link or a folder, which a '
                                  'lock must not be. Remove it.') from error
            if isinstance(error, PermissionError) and os.path.exists(path):
                raise ConfigError(
                    f'work_dir={folder!r} is in use by another user\'s run, '
                    f'or was when that was killed: {LOCK} in it is theirs. '
                    'Choose another folder with --work-dir, or remove that '
                    'file if their run is over.') from error
            raise
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 1000).decode(errors='replace')
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            raise ConfigError(
                f'work_dir={folder!r} is in use by another run ({owner}). '
                'Wait for it, end it, or choose another folder with '
                '--work-dir.') from error
        # Whoever had it may have removed the file meanwhile
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                break
        os.close(handle)
    os.ftruncate(handle, 0)
    os.write(handle, f'process {os.getpid()} on {socket.gethostname()}, since '
             f'{time.strftime("%Y-%m-%d %H:%M:%S")}'.encode())
    _locks[os.getpid(), path] = handle
    atexit.register(unlock_folder, os.path.dirname(path))


def unlock_folder(folder: str) -> None:
    """Give up the claim of :func:`lock_folder`, if there is one."""
    path = os.path.join(os.path.realpath(folder), LOCK)
    handle = _locks.pop((os.getpid(), path), None)
    if handle is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)
