# What both NYUd-v2 layouts share; depths are in metres. As in the official
# code: the central square, of which training takes a random 80 % in height
# and width, at 224x224; flips and mild colour jitter. Evaluated at 224x224.
meta_keys = ('img_path', 'depth_map_path', 'ori_shape', 'img_shape',
             'pad_shape', 'scale_factor', 'flip', 'flip_direction',
             'category_id')
central_square = dict(  # mmcv's CenterCrop knows label maps only
    type='KeyMapper', mapping=dict(img='img', gt_seg_map='gt_depth_map'),
    auto_remap=True,
    transforms=[dict(type='CenterCrop', crop_size=(480, 480))])
augment = [
    central_square,
    dict(type='mmsinger.RandomResizedSegCrop', scale=224,
         crop_ratio_range=(0.64, 0.64), aspect_ratio_range=(1.0, 1.0),
         interpolation='area'),
    dict(type='mmseg.RandomFlip', prob=0.5),
    dict(type='RandomApply', prob=0.7, transforms=[
        dict(type='mmpretrain.ColorJitter', brightness=0.2, contrast=0.2,
             saturation=0.1, hue=0.05)]),
    dict(type='mmseg.PackSegInputs', meta_keys=meta_keys),
]
fit = [
    central_square,
    dict(type='mmseg.Resize', scale=(224, 224), interpolation='area'),
    # mmseg scales predictions to ori_shape; the depths are 224x224 here
    dict(type='KeyMapper', mapping=dict(ori_shape='img_shape'),
         auto_remap=False),
    dict(type='mmseg.PackSegInputs', meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='mmseg.DepthMetric', min_depth_eval=0.001, max_depth_eval=10.0)
test_evaluator = val_evaluator
