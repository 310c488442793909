# Linear depth on NYUd-v2 in mmseg's folder layout
_base_ = [
    '../_base_/linear_eval/depth.py',
    '../_base_/datasets/linear_eval/nyu_folder.py',
    '../_base_/schedules/linear_eval_200e.py',
    '../_base_/default_runtime.py',
]
model = dict(data_preprocessor=dict(size=(224, 224)))
log_processor = dict(by_epoch=True)
