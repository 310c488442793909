"""Checkpoints of other libraries in mmpretrain's key layout, and back."""
from mmsinger.converters.convert import (Conversion, Entry, convert,
                                         convert_checkpoint)
from mmsinger.converters.layouts import LAYOUTS, detect
from mmsinger.converters.to_timm import (TimmWeights, export_timm,
                                         to_timm)

__all__ = [
    'Conversion', 'Entry', 'LAYOUTS', 'TimmWeights', 'convert',
    'convert_checkpoint', 'detect', 'export_timm', 'to_timm'
]
