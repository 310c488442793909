"""Everything that a config's ``model`` can name in the scope mmsinger."""
from mmsinger.models.adapters import SiNGERAdapter
from mmsinger.models.conv_stem import ConvStem
from mmsinger.models.distillers import (BaseDistiller, FitNetDistiller,
                                        SiNGERDistiller)
from mmsinger.models.frozen_backbone import FrozenBackbone
from mmsinger.models.heads import LinearDepthHead
from mmsinger.models.losses import (FeatureMSELoss, GramInformationLoss,
                                    OutlierSuppressionLoss)
from mmsinger.models.teacher import FrozenTeacher

__all__ = [
    'BaseDistiller', 'ConvStem', 'FeatureMSELoss', 'FitNetDistiller',
    'FrozenBackbone', 'FrozenTeacher', 'GramInformationLoss',
    'LinearDepthHead', 'OutlierSuppressionLoss', 'SiNGERAdapter',
    'SiNGERDistiller'
]
