# DINOv2-L/14 -> SegFormer-B0, ADE20K, 16 images a step in all
_base_ = [
    '../_base_/teachers/dinov2_l14.py',
    '../_base_/students/segformer_b0.py',
    '../_base_/distillers/singer.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_80k.py',
    '../_base_/default_runtime.py',
]
model = dict(
    teacher=_base_.teacher,
    student=_base_.student,
    **_base_.distiller)
