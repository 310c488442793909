# Linear classification of the picture that a crop was cut from: CLS token
_base_ = [
    '../_base_/linear_eval/cls.py',
    '../_base_/datasets/photos_cls.py',
    '../_base_/schedules/linear_eval_digits.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(num_classes=64))
train_dataloader = dict(batch_size=256)
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type='mmsinger.CacheFeaturesHook')]
