# Mean patch token, trained on long-tailed data
_base_ = ['./cls_digits_longtail.py']
model = dict(backbone=dict(output='mean_patch'))
