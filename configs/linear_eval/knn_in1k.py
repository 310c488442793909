# k-NN classification on ImageNet-1K
_base_ = [
    '../_base_/linear_eval/knn.py',
    '../_base_/datasets/linear_eval/imagenet.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(num_classes=_base_.num_classes)
bank = {**_base_.train_dataloader.dataset, 'pipeline': _base_.test_pipeline}
custom_hooks = [
    dict(type='mmsinger.KNNBankHook',
         dataloader={**_base_.val_dataloader, 'dataset': bank}),
]
train_dataloader = None
