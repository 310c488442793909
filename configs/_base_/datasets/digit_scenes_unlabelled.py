# 4000 images of the scenes alone, for feature distillation. Without random
# augmentation, so that the teacher's features can be cached.
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root='data/digit_scenes',
        ann_file='meta/train.txt',
        data_prefix='images/training',
        indices=4000,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmpretrain.PackInputs'),
        ]))
