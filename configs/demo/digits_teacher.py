# The teacher of the demo, trained on the built-in digit scenes. `make teacher`
# repeats it.
_base_ = ['../_base_/default_runtime.py',
          '../_base_/datasets/digit_scenes.py']

model = dict(
    type='EncoderDecoder',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=96, num_layers=6, num_heads=4,
                  feedforward_channels=384),
        img_size=32,
        patch_size=4,
        patch_cfg=dict(conv_type='mmsinger.ConvStem'),
        out_type='featmap',
        with_cls_token=True),
    decode_head=dict(
        type='FCNHead',
        in_channels=96,
        channels=96,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.,
        num_classes=11,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

# float32: without AMX or AVX512-BF16, a CPU emulates bfloat16, many times slower.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.,
                       custom_keys=dict(pos_embed=dict(decay_mult=0.),
                                        cls_token=dict(decay_mult=0.))),
    clip_grad=dict(max_norm=1.0))
max_iters = 2500
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0,
         end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100,
         end=max_iters)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters,
                 val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500,
                    max_keep_ckpts=1),
    visualization=dict(type='SegVisualizationHook'))
