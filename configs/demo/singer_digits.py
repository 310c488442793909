# Segmentation of the digit scenes beside distillation: the student of
# digits_student.py with SiNGER
_base_ = [
    './digits_student.py',
    '../_base_/teachers/digits.py',
    '../_base_/distillers/singer.py',
]
model = dict(
    _delete_=True,
    student=_base_.model,
    teacher=_base_.teacher,
    target_norm='standardise',
    **_base_.distiller)
