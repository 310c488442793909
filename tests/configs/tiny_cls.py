# The ImageNet recipe cut down to seconds on a CPU: features only, no head.
# Run in a folder with images/CLASS/*.png and teacher.pth.
_base_ = ['../../configs/classification/singer_vitl_to_vits_8xb64_in1k.py']
arch = dict(_delete_=True, embed_dims=16, num_layers=2, num_heads=2,
            feedforward_channels=32)
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
        backbone=dict(arch=arch, img_size=32, patch_size=8)))
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    dataset=dict(
        _delete_=True, type='CustomDataset', data_prefix='images',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ]))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=0., end=3,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=1))
