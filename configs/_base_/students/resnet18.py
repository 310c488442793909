# ResNet-18 without a head, for feature pre-training
student = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18),
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True))
