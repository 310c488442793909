# The NYUd-v2 recipe cut down to seconds on a CPU. Run in a folder with nyu/
# in mmseg's layout and teacher.pth.
_base_ = ['../../configs/depth/singer_vitl_to_vits_1xb16_nyu.py']
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
            img_size=(32, 32), patch_size=8, embed_dims=16, num_layers=4,
            num_heads=2, out_indices=(0, 1, 2, 3)),
        neck=dict(in_channels=[16] * 4, out_channels=16),
        decode_head=dict(
            in_channels=[16] * 4, embed_dim=4, feature_dim=32)))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='nyu', pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs', meta_keys=_base_.meta_keys),
    ]))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root='nyu', pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
        dict(type='PackSegInputs', meta_keys=_base_.meta_keys),
    ]))
test_dataloader = val_dataloader
val_evaluator = dict(crop_type=None)
test_evaluator = val_evaluator
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2))
