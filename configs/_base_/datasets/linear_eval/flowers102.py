# Flowers-102: 1,020 images each; tested on 'val', as the official code does
_base_ = ['./classification_224.py']
num_classes = 102
data_root = 'data/flowers-102'
train_dataloader = dict(dataset=dict(
    type='mmpretrain.Flowers102', data_root=data_root, split='train'))
val_dataloader = dict(dataset=dict(
    type='mmpretrain.Flowers102', data_root=data_root, split='val'))
test_dataloader = val_dataloader
