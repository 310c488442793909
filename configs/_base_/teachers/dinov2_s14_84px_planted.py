# DINOv2-S/14 with planted artifacts: after block 7, about 30 % of the patch
# tokens get a vector in a subspace of 8 dimensions. Norms grow more than
# tenfold from there to the output, where such tokens still stand out by 4 to 7
# times.
teacher = dict(
    backbone=dict(
        type='mmsinger.PlantedArtifacts',
        backbone=dict(
            type='mmpretrain.VisionTransformer', arch='deit-small',
            img_size=84, patch_size=14, layer_scale_init_value=1e-5,
            out_type='raw'),
        after=7,
        share=0.3,
        norm=(60., 100.),
        dims=8,
        direction='random'),
    checkpoint='checkpoints/dinov2_s14_84px.pth',
    prefix='backbone.',
    layers=(8, 11),
    feature_cache=4000,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375])
