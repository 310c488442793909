# Stands in for a published ViT-T
_base_ = ['./supervised_vits.py']
model = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=32, num_layers=3, num_heads=4,
                  feedforward_channels=128)),
    decode_head=dict(in_channels=32, channels=32))
