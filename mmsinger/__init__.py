"""mmsinger: distil vision transformers with SiNGER on OpenMMLab.

Importing it makes torchvision importable beside a CPU-only torch (see
:mod:`mmsinger.compat`); everything else is loaded when it is needed.
"""
from mmsinger import compat as _compat
from mmsinger.version import __version__

_compat.define_missing_torchvision_operators()

__all__ = ['__version__']
