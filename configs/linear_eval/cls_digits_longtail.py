# The same, trained on long-tailed data: of digit c the share 0.6^c, a hundredth
# of the last. Recall of each digit too
_base_ = ['./cls_digits.py']
train_dataloader = dict(dataset=dict(ann_file='meta/train_longtail.txt'))
val_evaluator = [
    _base_.val_evaluator,
    dict(type='mmpretrain.SingleLabelMetric', items=('recall', ),
         average=None)
]
test_evaluator = val_evaluator
