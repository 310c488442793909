# The official linear evaluation for 200 epochs
_base_ = ['./linear_eval_150e.py']
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-8, by_epoch=True, end=200,
         convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=200)
