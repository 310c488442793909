from mmsinger.figures.curves import draw_curves, read_curves
from mmsinger.figures.features import Features, extract_features
from mmsinger.figures.maps import (draw_norm_maps, draw_pca_maps,
                                   draw_similarity_maps)
from mmsinger.figures.norm_maps import norm_map, refined_norm_maps
from mmsinger.figures.pca import pca_map, principal_components
from mmsinger.figures.similarity import patch_at, similarity_map
from mmsinger.figures.style import save_figure, to_array
from mmsinger.figures.tables import draw_radar, draw_sweep, read_table

__all__ = [
    'Features', 'draw_curves', 'draw_norm_maps', 'draw_pca_maps',
    'draw_radar', 'draw_similarity_maps', 'draw_sweep', 'extract_features',
    'norm_map', 'patch_at', 'pca_map', 'principal_components',
    'read_curves', 'read_table', 'refined_norm_maps', 'save_figure',
    'similarity_map', 'to_array'
]
