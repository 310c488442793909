# A small ViT without a head for photographs of 84 px
student = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=192, num_layers=4, num_heads=3,
                  feedforward_channels=768),
        img_size=84,
        patch_size=14),
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True))
