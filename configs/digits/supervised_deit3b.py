# Stands in for a published DeiT-III-B
_base_ = ['./supervised_vits.py']
model = dict(
    backbone=dict(
        type='mmpretrain.DeiT3',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4,
                  feedforward_channels=256)),
    decode_head=dict(in_channels=64, channels=64))
