# ViT-S/16 with a pyramid neck and mmseg's own depth head, 0 to 10 m
student = dict(
    type='DepthEstimator',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=0,
        size=(480, 480)),
    backbone=dict(
        type='VisionTransformer', img_size=(480, 480), patch_size=16,
        patch_bias=True, embed_dims=384, num_layers=12, num_heads=6,
        out_indices=(2, 5, 8, 11), drop_path_rate=0.1, final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6)),
    neck=dict(
        type='MultiLevelNeck', in_channels=[384] * 4, out_channels=384,
        scales=[4, 2, 1, 0.5]),
    decode_head=dict(
        type='VPDDepthHead', in_channels=[384] * 4, max_depth=10,
        embed_dim=96, feature_dim=768),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
