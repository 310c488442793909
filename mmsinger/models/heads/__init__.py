from mmsinger.models.heads.linear_depth_head import LinearDepthHead

__all__ = ['LinearDepthHead']
