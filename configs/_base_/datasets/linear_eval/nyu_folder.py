# NYUd-v2 in mmseg's folder layout: .jpg images, 16-bit .png depths in
# millimetres
_base_ = ['./nyu_224.py']
data_root = 'data/nyu'
load = [
    dict(type='LoadImageFromFile'),
    dict(type='mmseg.LoadDepthAnnotation', depth_rescale_factor=1e-3),
]
train_dataloader = dict(dataset=dict(
    type='mmseg.NYUDataset', data_root=data_root,
    data_prefix=dict(
        img_path='images/train', depth_map_path='annotations/train'),
    pipeline=[*load, *_base_.augment]))
val_dataloader = dict(dataset=dict(
    type='mmseg.NYUDataset', data_root=data_root, test_mode=True,
    data_prefix=dict(
        img_path='images/test', depth_map_path='annotations/test'),
    pipeline=[*load, *_base_.fit]))
test_dataloader = val_dataloader
