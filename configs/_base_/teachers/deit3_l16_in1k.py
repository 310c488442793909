# DeiT-III-L/16, ImageNet-1k, in mmpretrain's key layout.
# Not mmpretrain's DeiT3, see docs/converters.md.
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer', arch='l', img_size=224,
        patch_size=16, layer_scale_init_value=1e-4,
        out_type='raw'),
    checkpoint='checkpoints/deit3_l16_in1k.pth',
    prefix='backbone.',
    ignore_keys=['head.'],
    layers=(17, 23),
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
