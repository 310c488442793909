# The demo's teacher, shipped with the package (mmsinger/assets)
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=96, num_layers=6, num_heads=4,
                  feedforward_channels=384),
        img_size=32,
        patch_size=4,
        patch_cfg=dict(conv_type='mmsinger.ConvStem'),
        out_type='raw'),
    checkpoint='mmsinger://digits_teacher.pth',
    prefix='backbone.',
    ignore_keys=[],
    layers=(2, 5))
