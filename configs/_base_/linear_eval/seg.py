# A 1x1 convolution on the patch tokens of the frozen backbone, its logits
# upsampled to the labels. A recipe adds model.decode_head.num_classes,
# tools/linear_eval.py the backbone, its normalisation and in_channels.
model = dict(
    type='mmseg.EncoderDecoder',
    data_preprocessor=dict(
        type='mmseg.SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512)),
    backbone=dict(
        type='mmsinger.FrozenBackbone', backbone=None, output='featmap'),
    decode_head=dict(
        type='mmseg.FCNHead', in_channels=384, channels=384, num_convs=0,
        concat_input=False, dropout_ratio=0., num_classes=150,
        align_corners=False, loss_decode=dict(
            type='mmseg.CrossEntropyLoss', avg_non_ignore=True)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
