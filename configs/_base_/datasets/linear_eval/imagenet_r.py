# ImageNet-R: 30,000 images of 200 classes, for a head trained on ImageNet-1K.
# As in the official code, a prediction may be any of the 1,000 classes.
_base_ = ['./imagenet.py']
val_dataloader = dict(dataset=dict(
    _delete_=True, type='mmsinger.ImageNetR', data_root='data/imagenet-r',
    pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
