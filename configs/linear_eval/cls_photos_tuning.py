# What learning rates are chosen by: crops that neither distil, nor train the
# probe, nor test
_base_ = ['./cls_photos.py']
val_dataloader = dict(dataset=dict(data_prefix='tune'))
test_dataloader = val_dataloader
