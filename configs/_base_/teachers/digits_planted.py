# The demo's teacher with planted artifacts: after block 1, about 3 % of the
# patch tokens get a long vector along one direction
teacher = dict(
    backbone=dict(
        type='mmsinger.PlantedArtifacts',
        backbone=dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(embed_dims=96, num_layers=6, num_heads=4,
                      feedforward_channels=384),
            img_size=32,
            patch_size=4,
            patch_cfg=dict(conv_type='mmsinger.ConvStem'),
            out_type='raw'),
        after=1,
        share=0.03,
        norm=(7., 10.),
        dims=1,
        direction='random'),
    checkpoint='mmsinger://digits_teacher.pth',
    prefix='backbone.',
    ignore_keys=[],
    mean=[127.5, 127.5, 127.5],
    std=[64., 64., 64.],
    feature_cache=4000,
    layers=(2, 5))
