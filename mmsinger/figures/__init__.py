"""Maps of tokens and training curves; matplotlib is imported when one is
drawn."""
from mmsinger.figures.curves import draw_curves, read_curves
from mmsinger.figures.features import Features, extract_features, pictures_of
from mmsinger.figures.maps import Column, draw_columns, draw_maps
from mmsinger.figures.style import save_figure, to_array
from mmsinger.figures.token_maps import (norm_map, patch_at, pca_map,
                                         principal_components, similarity_map)

__all__ = [
    'Column', 'Features', 'draw_columns', 'draw_curves', 'draw_maps',
    'extract_features', 'norm_map', 'patch_at', 'pca_map', 'pictures_of',
    'principal_components', 'read_curves', 'save_figure', 'similarity_map',
    'to_array'
]
