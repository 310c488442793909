from mmsinger.metrics.block_norms import BlockNorms, Inflation
from mmsinger.metrics.deviation import (Deviation, output_deviation,
                                        perturb_along)
from mmsinger.metrics.geometry import (gram_distance, linear_cka, relative_l2,
                                       token_cosine)
from mmsinger.metrics.jacobian import (differentiable, gramian_product,
                                       random_signs, smallest_directions)
from mmsinger.metrics.norms import (NormStatistics, norm_gain, norm_growth,
                                    norm_statistics, outlier_positions,
                                    quantile_outliers, robust_outliers,
                                    token_norms)

__all__ = [
    'BlockNorms', 'Deviation', 'Inflation', 'NormStatistics',
    'differentiable', 'gram_distance', 'gramian_product', 'linear_cka',
    'norm_gain', 'norm_growth', 'norm_statistics', 'outlier_positions',
    'output_deviation', 'perturb_along', 'quantile_outliers', 'random_signs',
    'relative_l2', 'robust_outliers', 'smallest_directions', 'token_cosine',
    'token_norms'
]
