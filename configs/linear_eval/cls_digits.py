# Linear classification of the digit in front: CLS token, the first 3000 scenes
_base_ = [
    '../_base_/linear_eval/cls.py',
    '../_base_/datasets/digit_scenes_cls.py',
    '../_base_/schedules/linear_eval_digits.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(num_classes=10))
train_dataloader = dict(
    batch_size=256, num_workers=0, persistent_workers=False,
    dataset=dict(indices=3000, pipeline=_base_.test_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type='mmsinger.CacheFeaturesHook')]
