# DINOv2-S/14 for images of 84 px, in mmpretrain's key layout. It sees each
# image once: for small data sets without random augmentation.
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer', arch='deit-small', img_size=84,
        patch_size=14, layer_scale_init_value=1e-5, out_type='raw'),
    checkpoint='checkpoints/dinov2_s14_84px.pth',
    prefix='backbone.',
    layers=(8, 11),
    feature_cache=4000,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
