# Distribution shift: the head of cls_digits.py on blurred scenes
# (tools/linear_eval.py --head)
_base_ = ['./cls_digits.py']
val_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='mmpretrain.GaussianBlur', radius=1., prob=1.),
    dict(type='mmpretrain.PackInputs'),
]))
test_dataloader = val_dataloader
# The transform draws a number even where it is certain, so features are not
# cached
custom_hooks = []
