# iNaturalist-2019: 80 % of the 268,243 labelled images for training
_base_ = ['./classification_224.py']
num_classes = 1010
data_root = 'data/inat'
train_dataloader = dict(dataset=dict(
    type='mmsinger.INaturalist2019', data_root=data_root, split='train'))
val_dataloader = dict(dataset=dict(
    type='mmsinger.INaturalist2019', data_root=data_root, split='val'))
test_dataloader = val_dataloader
