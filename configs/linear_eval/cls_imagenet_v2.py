# ImageNet-v2 with the head that cls_in1k.py trained: tools/linear_eval.py --head
_base_ = [
    '../_base_/linear_eval/cls.py',
    '../_base_/datasets/linear_eval/imagenet_v2.py',
    '../_base_/schedules/linear_eval_150e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(head=dict(num_classes=_base_.num_classes))
