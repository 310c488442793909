"""Where an installed mmsinger keeps its recipes and tools.

    TOOLS=$(python -c 'import mmsinger.paths as p; print(p.tools())')
    python "$TOOLS/train.py" CONFIG
"""
import os


def configs() -> str:
    """The folder of the recipes."""
    return _shipped('configs')


def tools() -> str:
    """The folder of the command line tools."""
    return _shipped('tools')


def _shipped(folder: str) -> str:
    package = os.path.dirname(os.path.abspath(__file__))
    places = [
        os.path.join(package, '.mim', folder),  # installed
        os.path.join(os.path.dirname(package), folder),  # a plain checkout
    ]
    for place in places:
        if os.path.isdir(place):
            return os.path.realpath(place)
    raise FileNotFoundError(
        f'no folder {folder!r} of mmsinger in {" or ".join(places)}. '
        'Install mmsinger again: pip install --force-reinstall --no-deps .')
