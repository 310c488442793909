# A 1x1 convolution on the patch tokens of the frozen backbone, the CLS token
# beside each, to 256 depth bins over 0 to 10 m. tools/linear_eval.py adds the
# backbone, its normalisation and in_channels. The temperature is of the
# official test command (0.03 while the official code trains).
model = dict(
    type='mmseg.DepthEstimator',
    data_preprocessor=dict(
        type='mmseg.SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=0,
        size=(480, 480)),
    backbone=dict(
        type='mmsinger.FrozenBackbone', backbone=None, output='featmap_cls'),
    decode_head=dict(
        type='mmsinger.LinearDepthHead', in_channels=768, num_bins=256,
        max_depth=10., temperature=0.6),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
