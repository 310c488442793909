# ImageNet-v2 (matched frequency): 10,000 images, for a head trained on
# ImageNet-1K
_base_ = ['./imagenet.py']
val_dataloader = dict(dataset=dict(
    _delete_=True, type='mmsinger.ImageNetV2', data_root='data/imagenet-v2',
    pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
