# The head of cls_mean_digits.py on inverted scenes
_base_ = ['./cls_digits_inverted.py']
model = dict(backbone=dict(output='mean_patch'))
