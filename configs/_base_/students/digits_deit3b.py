# Stands in for DeiT-III-B on the digit scenes, without a head
student = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4,
                  feedforward_channels=256),
        layer_scale_init_value=0.1,
        img_size=32,
        patch_size=4),
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5],
        std=[64., 64., 64.],
        to_rgb=True))
