# The same on the mean of the patch tokens
_base_ = ['./cls_photos.py']
model = dict(backbone=dict(output='mean_patch'))
