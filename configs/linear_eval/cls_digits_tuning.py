# What learning rates are chosen by: 2000 training scenes that neither distil
# (the first 4000) nor train the probe (the first 3000)
_base_ = ['./cls_digits.py']
val_dataloader = dict(dataset=dict(
    ann_file='meta/train.txt', data_prefix='images/training', indices=-2000))
test_dataloader = val_dataloader
