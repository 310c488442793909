# 300 iterations of 16 images: one minute (ViT) to four (ResNet-18) on one
# core. The rate is the best for both by docs/evidence.md
_base_ = ['./adamw_digits_distil.py']
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(max_iters=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, end=30),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, begin=30,
         end=300)
]
