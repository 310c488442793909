# ViT-S/16, augreg, ImageNet-21k, in mmpretrain's key layout: evaluated as it is
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer', arch='deit-small', img_size=224,
        patch_size=16, out_type='raw'),
    checkpoint='checkpoints/vit_s16_in21k.pth',
    prefix='backbone.',
    ignore_keys=['head.'],
    layers=(8, 11),
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5])
