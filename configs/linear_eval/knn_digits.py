# The digit in front by its nearest neighbours among the first 3000 scenes
_base_ = [
    '../_base_/linear_eval/knn.py',
    '../_base_/datasets/digit_scenes_cls.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(num_classes=10)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
bank = {**_base_.train_dataloader.dataset, 'indices': 3000,
        'pipeline': _base_.test_pipeline}
train_dataloader = None
custom_hooks = [
    dict(type='mmsinger.KNNBankHook', dataloader=dict(
        batch_size=250, num_workers=0, dataset=bank,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False))),
]
