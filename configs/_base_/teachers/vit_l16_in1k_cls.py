# ViT-L/16 with its head, ImageNet-21k, fine-tuned on ImageNet-1k at 384 px, in
# mmpretrain's key layout. It sees the student's images at its own size.
teacher = dict(
    model=dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(
            type='mmpretrain.VisionTransformer', arch='l', img_size=384,
            patch_size=16),
        head=dict(
            type='mmpretrain.VisionTransformerClsHead', num_classes=1000,
            in_channels=1024)),
    checkpoint='checkpoints/vit_l16_in1k.pth',
    input_size=384,
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5])
