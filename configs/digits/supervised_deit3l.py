# Stands in for a published DeiT-III-L
_base_ = ['./supervised_vits.py']
model = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=96, num_layers=6, num_heads=4,
                  feedforward_channels=384),
        layer_scale_init_value=0.1,
        patch_cfg=dict(kernel_size=8, stride=4, padding=2)),
    decode_head=dict(in_channels=96, channels=96))
