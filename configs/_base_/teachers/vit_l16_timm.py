# ViT-L/16, augreg, straight from timm's file (.safetensors, .bin or .pth)
teacher = dict(
    backbone=dict(
        type='mmpretrain.TIMMBackbone',
        model_name='vit_large_patch16_224', dynamic_img_size=True),
    checkpoint='checkpoints/vit_large_patch16_224.augreg_in21k.safetensors',
    ignore_keys=['head.'],
    layers=(17, 23),
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5])
