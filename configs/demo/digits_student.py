# A small student without distillation: few steps, so no augmentation
_base_ = [
    '../_base_/students/vit_digits.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/adamw_digits.py',
    '../_base_/default_runtime.py',
]
model = _base_.student
train_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
