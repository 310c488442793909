"""Files that are complete or not there, and names that follow content."""
import contextlib
import hashlib
import json
import os
import tempfile
from typing import Any, Dict, Iterator, Optional

import torch
from torch import Tensor


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Write a file completely or not at all.

    Args:
        path (str): Where it shall be; its folder exists. A file that is
            there is replaced at the end.

    Yields:
        str: An empty file beside it, to write to instead.
    """
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, suffix='.tmp')
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def content_hash(settings: Any, weights: Dict[str, Tensor]) -> Any:
    """Names what a module computes: its settings and its weights.

    Args:
        settings (Any): What else its outputs depend on; configs, numbers,
            strings.
        weights (dict[str, Tensor]): Its state dict.

    Returns:
        A hashlib object, to add more to or to take the ``hexdigest()`` of.
    """
    digest = hashlib.sha256(json.dumps(
        settings, sort_keys=True, default=repr).encode())
    for name, value in sorted(weights.items()):
        digest.update(f'{name} {value.dtype}'.encode())
        add_tensor(digest, value)
    return digest


def add_tensor(digest: Any, value: Tensor) -> None:
    """Add a tensor's dtype, shape and bytes to a hashlib object."""
    digest.update(f'{value.dtype} {tuple(value.shape)}'.encode())
    digest.update(value.detach().cpu().contiguous().flatten()
                  .view(torch.uint8).numpy())


def cache_folder() -> Optional[str]:
    """Where things are kept that can be computed again at any time.

    ``$MMSINGER_CACHE``, else ``$XDG_CACHE_HOME/mmsinger``, else
    ``~/.cache/mmsinger``. It may be deleted at any time.

    Returns:
        str | None: None if ``MMSINGER_CACHE`` is set and empty: nothing is
        to be kept.
    """
    folder = os.environ.get('MMSINGER_CACHE')
    if folder is None:
        base = os.environ.get('XDG_CACHE_HOME') or os.path.join(
            os.path.expanduser('~'), '.cache')
        folder = os.path.join(base, 'mmsinger')
    return folder or None
