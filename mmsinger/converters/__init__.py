"""Checkpoints of other libraries in mmpretrain's key layout."""
from mmsinger.converters.convert import (Conversion, Entry, convert,
                                         convert_checkpoint)
from mmsinger.converters.layouts import LAYOUTS, detect

__all__ = [
    'Conversion', 'Entry', 'LAYOUTS', 'convert', 'convert_checkpoint',
    'detect'
]
