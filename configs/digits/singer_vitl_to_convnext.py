# SiNGER, ViT-L in miniature -> a small ConvNeXt on the digit scenes
_base_ = [
    '../_base_/teachers/digits_planted.py',
    '../_base_/students/digits_convnext.py',
    '../_base_/distillers/singer.py',
    '../_base_/datasets/digit_scenes_unlabelled.py',
    '../_base_/schedules/adamw_digits_distil.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    teacher=_base_.teacher,
    student=_base_.student,
    target_norm='standardise',
    task_loss_weight=0,
    **_base_.distiller)
