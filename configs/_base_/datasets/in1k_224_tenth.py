# A random tenth of ImageNet-1K at 224 px, the same for every run
_base_ = ['./in1k_224.py']
train_dataloader = dict(dataset=dict(
    _delete_=True,
    type='mmpretrain.KFoldDataset',
    dataset=_base_.train_dataloader.dataset,
    fold=0,
    num_splits=10,
    test_mode=True,  # the fold itself, not the other nine
    seed=0))
