# The same, where the rarest digit is a tenth of the commonest
_base_ = ['./cls_digits_longtail.py']
train_dataloader = dict(dataset=dict(ann_file='meta/train_longtail10.txt'))
