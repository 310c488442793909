# The head of cls_mean_digits.py on blurred scenes
_base_ = ['./cls_digits_blurred.py']
model = dict(backbone=dict(output='mean_patch'))
