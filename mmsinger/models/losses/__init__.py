from mmsinger.models.losses.feature_loss import FeatureMSELoss
from mmsinger.models.losses.information_loss import (GramInformationLoss,
                                                     gram_difference)
from mmsinger.models.losses.logit_loss import LogitKLLoss
from mmsinger.models.losses.outlier_loss import OutlierSuppressionLoss

__all__ = [
    'FeatureMSELoss', 'GramInformationLoss', 'LogitKLLoss',
    'OutlierSuppressionLoss', 'gram_difference'
]
