# Classification of the same photographs: the class is the picture that a crop
# was cut from. Tests are on the last 20 % of each picture.
_base_ = ['./photos.py']
data_preprocessor = dict(
    type='mmpretrain.ClsDataPreprocessor',
    num_classes=64,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root='data/photos',
        data_prefix='test',
        pipeline=_base_.train_dataloader.dataset.pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, ))
test_evaluator = val_evaluator
