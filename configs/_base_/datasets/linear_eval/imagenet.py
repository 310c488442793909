# ImageNet-1K: 1,281,167 training and 50,000 validation images
_base_ = ['./classification_224.py']
num_classes = 1000
data_root = 'data/imagenet'
train_dataloader = dict(dataset=dict(
    type='mmpretrain.ImageNet', data_root=data_root, split='train'))
val_dataloader = dict(dataset=dict(
    type='mmpretrain.ImageNet', data_root=data_root, split='val'))
test_dataloader = val_dataloader
