# ViT-S/16 with a linear head, 1000 classes
_base_ = ['./vit_s16.py']
student = dict(
    head=dict(
        type='VisionTransformerClsHead', num_classes=1000, in_channels=384,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1)))
