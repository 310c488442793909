"""Everything that a config's ``model`` can name in the scope mmsinger."""
from mmsinger.models.adapters import SiNGERAdapter
from mmsinger.models.backbones import VisionTransformerWithRegisters
from mmsinger.models.conv_stem import ConvStem
from mmsinger.models.distillers import (BaseDistiller, FeatureDistiller,
                                        FitNetDistiller, GatedSiNGERDistiller,
                                        LogitKDDistiller, SiNGERDistiller,
                                        ViTKDDistiller)
from mmsinger.models.frozen_backbone import FrozenBackbone
from mmsinger.models.heads import LinearDepthHead
from mmsinger.models.knn_classifier import KNNClassifier
from mmsinger.models.losses import (FeatureMSELoss, GramInformationLoss,
                                    LogitKLLoss, OutlierSuppressionLoss)
from mmsinger.models.planted_artifacts import PlantedArtifacts
from mmsinger.models.teacher import FrozenClassifier, FrozenTeacher

__all__ = [
    'BaseDistiller', 'ConvStem', 'FeatureDistiller', 'FeatureMSELoss',
    'FitNetDistiller', 'FrozenBackbone', 'FrozenClassifier', 'FrozenTeacher',
    'GatedSiNGERDistiller', 'GramInformationLoss', 'KNNClassifier',
    'LinearDepthHead', 'LogitKDDistiller', 'LogitKLLoss',
    'OutlierSuppressionLoss', 'PlantedArtifacts', 'SiNGERAdapter',
    'SiNGERDistiller', 'ViTKDDistiller', 'VisionTransformerWithRegisters'
]
