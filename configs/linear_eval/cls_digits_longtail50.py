# The same, where the rarest digit is a fiftieth of the commonest
_base_ = ['./cls_digits_longtail.py']
train_dataloader = dict(dataset=dict(ann_file='meta/train_longtail50.txt'))
