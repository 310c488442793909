# The official linear evaluation: SGD without momentum, 150 epochs, 64 images
# a step in all, no warm-up
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.5, momentum=0., weight_decay=1e-6))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-8, by_epoch=True, end=150,
         convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=150, val_interval=10)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'))
