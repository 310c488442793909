# SegFormer-B0, 150 classes, as in mmseg. To start from pretrained weights, set
# student.backbone.init_cfg.
student = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512)),
    backbone=dict(
        type='MixVisionTransformer', embed_dims=32, num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 5, 8], mlp_ratio=4, qkv_bias=True,
        drop_path_rate=0.1),
    decode_head=dict(
        type='SegformerHead', in_channels=[32, 64, 160, 256],
        in_index=[0, 1, 2, 3], channels=256, dropout_ratio=0.1,
        num_classes=150, norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
