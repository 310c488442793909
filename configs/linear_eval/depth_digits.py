# Linear depth of the digit scenes, trained on the first 3000. Bins of 16 cm:
# a quarter of the work
_base_ = [
    '../_base_/linear_eval/depth.py',
    '../_base_/datasets/digit_scenes_depth.py',
    '../_base_/schedules/linear_eval_digits.py',
    '../_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(32, 32)), decode_head=dict(num_bins=64))
train_dataloader = dict(
    batch_size=16, num_workers=0, persistent_workers=False,
    dataset=dict(indices=3000, pipeline=_base_.test_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
custom_hooks = [dict(type='mmsinger.CacheFeaturesHook')]
