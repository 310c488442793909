"""mmsinger: distil vision transformers with SiNGER on OpenMMLab.

Importing it makes torchvision importable beside a CPU-only torch (see
:mod:`mmsinger.compat`) and keeps known warnings of other packages quiet, which
no user can act on; everything else is loaded when it is needed.
"""
from mmsinger.version import __version__

try:
    from mmsinger import compat as _compat
except (ImportError, OSError) as error:
    raise ImportError(
        f'mmsinger needs torch, whose import failed: {error}. '
        '`python tools/check_env.py` names the fix.') from error

_compat.define_missing_torchvision_operators()
_compat.ignore_known_warnings()

__all__ = ['__version__']
