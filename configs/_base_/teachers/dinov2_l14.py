# DINOv2-L/14, in mmpretrain's key layout. Patches of 14 px: the student's
# tokens are resampled to the teacher's grid.
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer', arch='l', img_size=518,
        patch_size=14, layer_scale_init_value=1e-5, out_type='raw'),
    checkpoint='checkpoints/dinov2_l14.pth',
    prefix='backbone.',
    layers=(17, 23),
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
