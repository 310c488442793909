"""Everything that a config's ``model`` can name in the scope mmsinger, and
the classes to derive your own from."""
from mmsinger.models.adapters import SiNGERAdapter
from mmsinger.models.backbones import (ConvStem, PlantedArtifacts,
                                       VisionTransformerWithRegisters)
from mmsinger.models.distillers import (BaseDistiller, FeatureDistiller,
                                        FitNetDistiller, LogitKDDistiller,
                                        SiNGERDistiller, ViTKDDistiller)
from mmsinger.models.distillers.projectors import (LinearProjector,
                                                   MLPProjector)
from mmsinger.models.losses import (FeatureCosineLoss, FeatureLoss,
                                    FeatureMSELoss, FeatureSmoothL1Loss,
                                    GramInformationLoss, LogitKLLoss,
                                    OutlierSuppressionLoss)
from mmsinger.models.probes import (FrozenBackbone, KNNClassifier,
                                    LinearDepthHead)
from mmsinger.models.targets import (ClipNorms, MaskTokens, Refine,
                                     RemoveOutlierSubspace, TargetStep,
                                     WeighByEntropy)
from mmsinger.models.teachers import FrozenClassifier, FrozenTeacher

__all__ = [
    'BaseDistiller', 'ClipNorms', 'ConvStem', 'FeatureCosineLoss',
    'FeatureDistiller', 'FeatureLoss', 'FeatureMSELoss', 'FeatureSmoothL1Loss',
    'FitNetDistiller', 'FrozenBackbone', 'FrozenClassifier', 'FrozenTeacher',
    'GramInformationLoss', 'KNNClassifier', 'LinearDepthHead',
    'LinearProjector', 'LogitKDDistiller', 'LogitKLLoss', 'MLPProjector',
    'MaskTokens', 'OutlierSuppressionLoss', 'PlantedArtifacts', 'Refine',
    'RemoveOutlierSubspace', 'SiNGERAdapter', 'SiNGERDistiller', 'TargetStep',
    'ViTKDDistiller', 'VisionTransformerWithRegisters', 'WeighByEntropy'
]
