# ViT-L/16 -> ViT-S/16, ImageNet-1K without labels, 8 x 64 images
_base_ = [
    '../_base_/teachers/vit_l16_in1k_cls.py',
    '../_base_/students/vit_s16_cls.py',
    '../_base_/distillers/logit_kd.py',
    '../_base_/datasets/in1k_224_val.py',
    '../_base_/schedules/adamw_100e_in1k.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    teacher=_base_.teacher,
    student=_base_.student,
    task_loss_weight=0,
    **_base_.distiller)
