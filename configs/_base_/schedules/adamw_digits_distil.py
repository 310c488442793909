# 1000 iterations of 32 scenes: two to three minutes on one core. Rates by
# docs/evidence.md: where FitNet is near its best on every teacher; adapters at
# the student's speed shrink ordinary tokens of a clean teacher.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(adapters=dict(lr_mult=0.03))),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, begin=50,
         end=1000)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=10000)
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500,
                    max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'))
log_processor = dict(by_epoch=False)
