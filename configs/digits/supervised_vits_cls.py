# The ViT-S in miniature on labels alone: the digit in front, 3000 scenes, as
# many steps as distillation takes
_base_ = [
    '../_base_/students/digits_vits.py',
    '../_base_/datasets/digit_scenes_cls.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    **_base_.student,
    head=dict(type='LinearClsHead', num_classes=10, in_channels=48,
              loss=dict(type='CrossEntropyLoss')))
train_dataloader = dict(
    batch_size=32, num_workers=0, persistent_workers=False,
    dataset=dict(indices=3000))
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=False, begin=50,
         end=1000)
]
train_cfg = dict(max_iters=1000, val_interval=1000)
default_hooks = dict(
    logger=dict(interval=100),
    visualization=dict(_delete_=True, type='VisualizationHook'))
