# NYUd-v2 from nyu_depth_v2_labeled.mat: 795 training and 654 test frames
_base_ = ['./nyu_224.py']
data_root = 'data/nyu'
train_dataloader = dict(dataset=dict(
    type='mmsinger.NYUMatDataset', data_root=data_root, split='train',
    pipeline=_base_.augment))
val_dataloader = dict(dataset=dict(
    type='mmsinger.NYUMatDataset', data_root=data_root, split='test',
    test_mode=True, pipeline=_base_.fit))
test_dataloader = val_dataloader
