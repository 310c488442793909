# Depth from patch tokens alone: for backbones without a CLS token
_base_ = ['./depth_digits.py']
model = dict(backbone=dict(output='featmap'))
