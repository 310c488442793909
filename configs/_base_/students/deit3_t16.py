# DeiT-III-T/16 without a head, for feature pre-training. mmpretrain has no
# such size: DeiT-T's width and heads.
student = dict(
    type='ImageClassifier',
    backbone=dict(
        type='DeiT3',
        arch=dict(embed_dims=192, num_layers=12, num_heads=3,
                  feedforward_channels=768),
        img_size=224,
        patch_size=16),
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True))
