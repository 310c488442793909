from mmsinger.models.losses.feature_loss import (FeatureCosineLoss,
                                                 FeatureLoss, FeatureMSELoss,
                                                 FeatureSmoothL1Loss,
                                                 weighted_mean)
from mmsinger.models.losses.information_loss import (GramInformationLoss,
                                                     gram_difference,
                                                     loss_behind_block)
from mmsinger.models.losses.logit_loss import LogitKLLoss
from mmsinger.models.losses.outlier_loss import OutlierSuppressionLoss

__all__ = [
    'FeatureCosineLoss', 'FeatureLoss', 'FeatureMSELoss',
    'FeatureSmoothL1Loss', 'GramInformationLoss', 'LogitKLLoss',
    'OutlierSuppressionLoss', 'gram_difference', 'loss_behind_block',
    'weighted_mean'
]
