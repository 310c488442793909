# A small Swin transformer on the digit scenes, without a head: strides 2, 4
# and 8 where the teacher's patches have 4
student = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=24, depths=[2, 2, 2], num_heads=[2, 4, 8]),
        img_size=32,
        patch_size=2,
        window_size=4,
        drop_path_rate=0.,
        out_indices=(2, )),
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5],
        std=[64., 64., 64.],
        to_rgb=True))
