from mmsinger.models.losses.feature_loss import FeatureMSELoss
from mmsinger.models.losses.information_loss import (GramInformationLoss,
                                                     cosine_gram,
                                                     gram_difference)
from mmsinger.models.losses.logit_loss import LogitKLLoss
from mmsinger.models.losses.outlier_loss import (OutlierSuppressionLoss,
                                                 outlier_threshold)

__all__ = [
    'FeatureMSELoss', 'GramInformationLoss', 'LogitKLLoss',
    'OutlierSuppressionLoss', 'cosine_gram', 'gram_difference',
    'outlier_threshold'
]
