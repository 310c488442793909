# ViT-S/16 with UPerNet, 150 classes, as in mmseg's vit recipes. To start from
# a distilled backbone, set student.backbone.init_cfg.
norm_cfg = dict(type='SyncBN', requires_grad=True)
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
        type='VisionTransformer', img_size=(512, 512), patch_size=16,
        patch_bias=True, embed_dims=384, num_layers=12, num_heads=6,
        out_indices=(2, 5, 8, 11), drop_path_rate=0.1, final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6)),
    neck=dict(
        type='MultiLevelNeck', in_channels=[384] * 4, out_channels=384,
        scales=[4, 2, 1, 0.5]),
    decode_head=dict(
        type='UPerHead', in_channels=[384] * 4, in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6), channels=512, dropout_ratio=0.1,
        num_classes=150, norm_cfg=norm_cfg, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead', in_channels=384, in_index=3, channels=256,
        num_convs=1, concat_input=False, dropout_ratio=0.1, num_classes=150,
        norm_cfg=norm_cfg, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
