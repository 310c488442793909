# The ADE20K recipe cut down to seconds on a CPU; run in a folder that
# tests/tiny.py has filled.
_base_ = ['../../configs/singer_vitl_to_vits_ade20k.py']
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    layers=(1, 3),
    adapter=dict(rank=4),
    teacher=dict(
        backbone=dict(
            _delete_=True, type='mmpretrain.VisionTransformer',
            arch=dict(embed_dims=32, num_layers=4, num_heads=4,
                      feedforward_channels=64),
            img_size=32, patch_size=8),
        checkpoint='teacher.pth', ignore_keys=[]),
    student=dict(
        data_preprocessor=dict(size=(32, 32)),
        backbone=dict(
            img_size=(32, 32), patch_size=8, embed_dims=16, num_layers=2,
            num_heads=2, out_indices=(0, 1), drop_path_rate=0.),
        neck=dict(in_channels=[16] * 2, out_channels=16, scales=[1, 1]),
        decode_head=dict(
            _delete_=True, type='FCNHead', in_channels=16, in_index=1,
            channels=16, num_convs=1, num_classes=3, dropout_ratio=0.,
            norm_cfg=norm_cfg,
            loss_decode=dict(type='CrossEntropyLoss')),
        auxiliary_head=None))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset', data_root='scenes', img_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='annotations'),
    metainfo=dict(classes=('a', 'b', 'c'),
                  palette=[[0, 0, 0], [255, 0, 0], [0, 0, 255]]))
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    dataset=dict(_delete_=True, pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(_delete_=True, pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, end=6),
]
train_cfg = dict(max_iters=6, val_interval=3)
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(interval=2, max_keep_ckpts=2, save_best='mIoU'))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
