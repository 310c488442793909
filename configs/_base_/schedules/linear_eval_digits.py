# 300 steps on the digit scenes: seconds on one core, on stored features. Adam,
# whose steps do not depend on the scale of the features.
max_iters = 300
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=1e-6))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min=1e-8, by_epoch=False,
         end=max_iters)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters,
                 val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # The head at the end, without optimizer states: nothing to resume
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=-1,
                    save_last=True, save_optimizer=False,
                    save_param_scheduler=False),
    sampler_seed=dict(type='DistSamplerSeedHook'))
