"""What tokens, norms and subspaces are like: functions on tensors."""
from mmsinger.metrics.accumulators import Moments, Sample
from mmsinger.metrics.deviation import (Deviation, output_deviation,
                                        perturb_along)
from mmsinger.metrics.geometry import (cosine_gram, gram_distance, linear_cka,
                                       relative_l2, token_cosine)
from mmsinger.metrics.jacobian import (differentiable, gramian_product,
                                       random_signs, smallest_directions)
from mmsinger.metrics.norms import (MAD_TO_STD, NormStatistics, lower_median,
                                    norm_statistics, outlier_threshold,
                                    quantile_outliers, robust_outliers,
                                    robust_threshold, token_norms)
from mmsinger.metrics.subspaces import (orthonormal_rows, random_rows,
                                        subspace_energy, subspace_overlap)

__all__ = [
    'Deviation', 'MAD_TO_STD', 'Moments', 'NormStatistics', 'Sample',
    'cosine_gram', 'differentiable', 'gram_distance', 'gramian_product',
    'linear_cka', 'lower_median', 'norm_statistics', 'orthonormal_rows',
    'outlier_threshold', 'output_deviation', 'perturb_along',
    'quantile_outliers', 'random_rows', 'random_signs', 'relative_l2',
    'robust_outliers', 'robust_threshold', 'smallest_directions',
    'subspace_energy', 'subspace_overlap', 'token_cosine', 'token_norms'
]
