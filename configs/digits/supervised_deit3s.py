# Stands in for a published DeiT-III-S
_base_ = ['./supervised_vits.py']
model = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4,
                  feedforward_channels=256),
        layer_scale_init_value=0.1,
        patch_cfg=dict(kernel_size=8, stride=4, padding=2)),
    decode_head=dict(in_channels=64, channels=64))
