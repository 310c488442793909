# The robust preset, DINOv2-S/14 with planted artifacts -> a ViT of 4 blocks,
# photographs
_base_ = [
    '../_base_/teachers/dinov2_s14_84px_planted.py',
    '../_base_/students/photos_vit.py',
    '../_base_/distillers/robust.py',
    '../_base_/datasets/photos.py',
    '../_base_/schedules/adamw_photos_distil.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    teacher=_base_.teacher,
    student=_base_.student,
    target_norm='standardise',
    task_loss_weight=0,
    **_base_.distiller)
