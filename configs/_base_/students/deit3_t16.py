# DeiT-III-T/16 without a head, for feature pre-training: DeiT-T's width and
# heads, with LayerScale. Not mmpretrain's DeiT3, see docs/converters.md.
student = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer', arch='deit-tiny', img_size=224,
        patch_size=16, layer_scale_init_value=1e-4),
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True))
