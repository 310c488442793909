# A linear classifier on the CLS token of the frozen backbone. A recipe adds
# model.head.num_classes, tools/linear_eval.py the backbone, its normalisation
# and head.in_channels.
model = dict(
    type='mmpretrain.ImageClassifier',
    data_preprocessor=dict(
        type='mmpretrain.ClsDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(
        type='mmsinger.FrozenBackbone', backbone=None, output='cls_token'),
    head=dict(
        type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=384))
