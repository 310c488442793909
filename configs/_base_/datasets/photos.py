# Crops of photographs made by tools/cut_photos.py (84 px); labels are not
# used. Without random augmentation, so that the teacher's features can be
# cached.
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset',
        data_root='data/photos',
        data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmpretrain.PackInputs'),
        ]))
