from mmsinger.converters.timm import timm_to_mmpretrain

__all__ = ['timm_to_mmpretrain']
