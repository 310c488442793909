from mmsinger.visualization.norm_maps import refined_norm_maps

__all__ = ['refined_norm_maps']
