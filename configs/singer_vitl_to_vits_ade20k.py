# The README's recipe, under a short name: ViT-L/16 -> ViT-S/16 with UPerNet,
# ADE20K, 16 images a step in all
_base_ = ['./segmentation/singer_vitl_to_vits_1xb16_ade20k.py']
