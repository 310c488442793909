# Weighted k nearest neighbours on the frozen backbone's CLS token: nothing is
# trained. A recipe adds model.num_classes and the training set, with the test
# pipeline, as dataloader of KNNBankHook.
model = dict(
    type='mmsinger.KNNClassifier',
    data_preprocessor=dict(
        type='mmpretrain.ClsDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(
        type='mmsinger.FrozenBackbone', backbone=None, output='cls_token'),
    k=20,
    temperature=0.07)
val_cfg = dict()
test_cfg = dict()
