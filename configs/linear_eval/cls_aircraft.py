# Linear classification of 100 aircraft variants (FGVC-Aircraft): CLS token
_base_ = [
    '../_base_/linear_eval/cls.py',
    '../_base_/datasets/linear_eval/aircraft.py',
    '../_base_/schedules/linear_eval_150e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(num_classes=_base_.num_classes))
