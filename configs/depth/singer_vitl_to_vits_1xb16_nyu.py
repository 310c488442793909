# ViT-L/16 -> ViT-S/16 with a depth head, NYUd-v2, 16 images a step in all
_base_ = [
    '../_base_/teachers/vit_l16_in21k.py',
    '../_base_/students/vit_s16_depth.py',
    '../_base_/distillers/singer.py',
    '../_base_/datasets/nyu_480.py',
    '../_base_/schedules/adamw_80k.py',
    '../_base_/default_runtime.py',
]
model = dict(
    teacher=_base_.teacher,
    student=_base_.student,
    **_base_.distiller)
default_hooks = dict(checkpoint=dict(save_best='rmse', rule='less'))
