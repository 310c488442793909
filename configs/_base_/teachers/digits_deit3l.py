# Stands in for DeiT-III-L on the digit scenes; trained by
# configs/digits/supervised_deit3l.py
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=96, num_layers=6, num_heads=4,
                  feedforward_channels=384),
        layer_scale_init_value=0.1,
        img_size=32,
        patch_size=4,
        patch_cfg=dict(kernel_size=8, stride=4, padding=2),
        out_type='raw'),
    checkpoint='work_dirs/supervised_deit3l/iter_400.pth',
    prefix='backbone.',
    ignore_keys=[],
    mean=[127.5, 127.5, 127.5],
    std=[64., 64., 64.],
    feature_cache=4000,
    layers=(3, 5))
