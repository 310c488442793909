"""Checkpoints of other libraries in mmpretrain's key layout; students for
timm and as ONNX graphs."""
from mmsinger.converters.convert import (Conversion, Entry, convert,
                                         convert_checkpoint)
from mmsinger.converters.layouts import LAYOUTS, detect
from mmsinger.converters.to_onnx import export_onnx
from mmsinger.converters.to_timm import TimmWeights, export_timm, to_timm

__all__ = [
    'Conversion', 'Entry', 'LAYOUTS', 'TimmWeights', 'convert',
    'convert_checkpoint', 'detect', 'export_onnx', 'export_timm', 'to_timm'
]
