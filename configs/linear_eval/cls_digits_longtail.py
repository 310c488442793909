# The same, trained on long-tailed data: of digit c the share 0.6^c
_base_ = ['./cls_digits.py']
train_dataloader = dict(dataset=dict(ann_file='meta/train_longtail.txt'))
