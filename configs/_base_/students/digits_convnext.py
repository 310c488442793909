# A small ConvNeXt on the digit scenes, without a head: strides 2, 4 and 8
# where the teacher's patches have 4
student = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ConvNeXt',
        arch=dict(depths=[2, 2, 2], channels=[24, 48, 96]),
        stem_patch_size=2,
        layer_scale_init_value=0.1),
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5],
        std=[64., 64., 64.],
        to_rgb=True))
