# DeiT-III-S/16 with its head, ImageNet-1k, in mmpretrain's key layout.
# Not mmpretrain's DeiT3, see docs/converters.md.
teacher = dict(
    model=dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(
            type='mmpretrain.VisionTransformer', arch='deit-small', img_size=224,
            patch_size=16, layer_scale_init_value=1e-4),
        head=dict(
            type='mmpretrain.VisionTransformerClsHead', num_classes=1000,
            in_channels=384)),
    checkpoint='checkpoints/deit3_s16_in1k.pth',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
