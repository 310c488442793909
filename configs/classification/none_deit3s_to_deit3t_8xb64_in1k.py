# DeiT-III-T/16 alone, from the labels of ImageNet-1K, 8 x 64 images: what the
# students of DeiT-III-S/16 compare with
_base_ = [
    '../_base_/students/deit3_t16_cls.py',
    '../_base_/datasets/in1k_224_val.py',
    '../_base_/schedules/adamw_100e_in1k.py',
    '../_base_/default_runtime_cls.py',
]
model = _base_.student
