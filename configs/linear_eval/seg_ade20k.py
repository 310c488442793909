# Linear segmentation on ADE20K
_base_ = [
    '../_base_/linear_eval/seg.py',
    '../_base_/datasets/linear_eval/ade20k.py',
    '../_base_/schedules/linear_eval_200e.py',
    '../_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(224, 224)),
    decode_head=dict(num_classes=_base_.num_classes))
log_processor = dict(by_epoch=True)
