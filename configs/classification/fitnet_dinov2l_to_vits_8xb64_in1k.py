# DINOv2-L/14 -> ViT-S/16, ImageNet-1K without labels, 8 x 64 images
_base_ = [
    '../_base_/teachers/dinov2_l14.py',
    '../_base_/students/vit_s16.py',
    '../_base_/distillers/fitnet.py',
    '../_base_/datasets/in1k_224.py',
    '../_base_/schedules/adamw_100e_in1k.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    teacher=_base_.teacher,
    student=_base_.student,
    task_loss_weight=0,
    **_base_.distiller)
