# Oxford-IIIT Pet: 3,680 training and 3,669 test images of 37 breeds
_base_ = ['./classification_224.py']
num_classes = 37
data_root = 'data/oxford-iiit-pet'
train_dataloader = dict(dataset=dict(
    type='mmpretrain.OxfordIIITPet', data_root=data_root, split='trainval'))
val_dataloader = dict(dataset=dict(
    type='mmpretrain.OxfordIIITPet', data_root=data_root, split='test'))
test_dataloader = val_dataloader
