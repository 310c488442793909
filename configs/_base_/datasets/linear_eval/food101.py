# Food-101: 75,750 training and 25,250 test images
_base_ = ['./classification_224.py']
num_classes = 101
data_root = 'data/food-101'
train_dataloader = dict(dataset=dict(
    type='mmpretrain.Food101', data_root=data_root, split='train'))
val_dataloader = dict(dataset=dict(
    type='mmpretrain.Food101', data_root=data_root, split='test'))
test_dataloader = val_dataloader
