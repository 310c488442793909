# Linear classification of 101 dishes (Food-101): CLS token
_base_ = [
    '../_base_/linear_eval/cls.py',
    '../_base_/datasets/linear_eval/food101.py',
    '../_base_/schedules/linear_eval_150e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(num_classes=_base_.num_classes))
