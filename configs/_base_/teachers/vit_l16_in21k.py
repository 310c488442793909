# ViT-L/16, augreg, ImageNet-21k, in mmpretrain's key layout
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer', arch='l', img_size=224,
        patch_size=16, out_type='raw'),
    checkpoint='checkpoints/vit_l16_in21k.pth',
    prefix='backbone.',
    ignore_keys=['head.'],
    layers=(17, 23),
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5])
