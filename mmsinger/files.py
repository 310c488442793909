"""Files that are complete or not there."""
import contextlib
import os
import tempfile
from typing import Iterator


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
