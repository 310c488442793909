# ADE20K as in the official linear evaluation. Training: crops of 70 to 100 %
# of the area, flips, mild colour jitter. Evaluation: image and labels
# squeezed to 224x224, and compared at that size.
num_classes = 150
data_root = 'data/ade/ADEChallengeData2016'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='mmseg.LoadAnnotations'),
    dict(type='mmsinger.RandomResizedSegCrop', scale=224,
         crop_ratio_range=(0.7, 1.0)),
    dict(type='mmseg.RandomFlip', prob=0.5),
    dict(type='RandomApply', prob=0.7, transforms=[
        dict(type='mmpretrain.ColorJitter', brightness=0.2, contrast=0.2,
             saturation=0.1, hue=0.05)]),
    dict(type='mmseg.PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='mmseg.LoadAnnotations'),
    dict(type='mmseg.Resize', scale=(224, 224), keep_ratio=False),
    # mmseg scales predictions to ori_shape; the labels are 224x224 here
    dict(type='KeyMapper', mapping=dict(ori_shape='img_shape'),
         auto_remap=False),
    dict(type='mmseg.PackSegInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmseg.ADE20KDataset',
        data_root=data_root,
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmseg.ADE20KDataset',
        data_root=data_root,
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
