# Linear classification of 1,010 species (iNaturalist-2019): CLS token
_base_ = [
    '../_base_/linear_eval/cls.py',
    '../_base_/datasets/linear_eval/inat2019.py',
    '../_base_/schedules/linear_eval_150e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(num_classes=_base_.num_classes))
