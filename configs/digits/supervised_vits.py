# Stands in for a published ViT-S: trained on the segmentation of the scenes
_base_ = [
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime.py',
]
model = dict(
    type='EncoderDecoder',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=48, num_layers=3, num_heads=4,
                  feedforward_channels=192),
        img_size=32,
        patch_size=4,
        out_type='featmap'),
    decode_head=dict(
        type='FCNHead', in_channels=48, channels=48, num_convs=0,
        concat_input=False, dropout_ratio=0., num_classes=11,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=_base_.test_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
