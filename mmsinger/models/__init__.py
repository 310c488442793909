"""Everything that a config's ``model`` can name in the scope mmsinger."""
from mmsinger.models.adapters import SiNGERAdapter
from mmsinger.models.backbones import (ConvStem, PlantedArtifacts,
                                       VisionTransformerWithRegisters)
from mmsinger.models.distillers import (BaseDistiller, FeatureDistiller,
                                        FitNetDistiller, GatedSiNGERDistiller,
                                        LogitKDDistiller, SiNGERDistiller,
                                        ViTKDDistiller)
from mmsinger.models.losses import (FeatureMSELoss, GramInformationLoss,
                                    LogitKLLoss, OutlierSuppressionLoss)
from mmsinger.models.probes import (FrozenBackbone, KNNClassifier,
                                    LinearDepthHead)
from mmsinger.models.teachers import FrozenClassifier, FrozenTeacher

__all__ = [
    'BaseDistiller', 'ConvStem', 'FeatureDistiller', 'FeatureMSELoss',
    'FitNetDistiller', 'FrozenBackbone', 'FrozenClassifier', 'FrozenTeacher',
    'GatedSiNGERDistiller', 'GramInformationLoss', 'KNNClassifier',
    'LinearDepthHead', 'LogitKDDistiller', 'LogitKLLoss',
    'OutlierSuppressionLoss', 'PlantedArtifacts', 'SiNGERAdapter',
    'SiNGERDistiller', 'ViTKDDistiller', 'VisionTransformerWithRegisters'
]
