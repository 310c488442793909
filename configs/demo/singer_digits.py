# The demo: the student of digits_student.py, distilled with SiNGER
_base_ = [
    './digits_student.py',
    '../_base_/teachers/digits.py',
    '../_base_/distillers/singer.py',
]
singer = {**_base_.singer, 'layers': (2, 5), 'target_norm': 'standardise'}
model = dict(
    _delete_=True,
    type='mmsinger.SiNGERDistiller',
    student=_base_.model,
    teacher=_base_.teacher,
    **singer)
