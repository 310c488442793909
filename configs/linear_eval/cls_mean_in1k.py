# The same on the mean of the patch tokens
_base_ = ['./cls_in1k.py']
model = dict(backbone=dict(output='mean_patch'))
