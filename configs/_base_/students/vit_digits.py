# The demo's student: a small plain mmpretrain ViT with a linear head
student = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[64., 64., 64.],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(32, 32)),
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4,
                  feedforward_channels=256),
        img_size=32,
        patch_size=4,
        out_type='featmap'),
    decode_head=dict(
        type='FCNHead', in_channels=64, channels=64, num_convs=0,
        concat_input=False, dropout_ratio=0., num_classes=11,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
