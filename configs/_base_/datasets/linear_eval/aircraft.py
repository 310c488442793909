# FGVC-Aircraft's 100 variants; tested on 'val', as the official code does
_base_ = ['./classification_224.py']
num_classes = 100
data_root = 'data/fgvc-aircraft-2013b'
train_dataloader = dict(dataset=dict(
    type='mmpretrain.FGVCAircraft', data_root=data_root, split='train'))
val_dataloader = dict(dataset=dict(
    type='mmpretrain.FGVCAircraft', data_root=data_root, split='val'))
test_dataloader = val_dataloader
