# The picture that a crop was cut from by its nearest neighbours: mean of the
# patch tokens
_base_ = [
    '../_base_/linear_eval/knn.py',
    '../_base_/datasets/photos_cls.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(num_classes=64, backbone=dict(output='mean_patch'))
bank = _base_.train_dataloader.dataset
train_dataloader = None
custom_hooks = [
    dict(type='mmsinger.KNNBankHook', dataloader=dict(
        batch_size=128, num_workers=0, dataset=bank,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False))),
]
