"""What tells how good frozen features are."""
from mmsinger.models.probes.frozen_backbone import FrozenBackbone
from mmsinger.models.probes.knn_classifier import KNNClassifier
from mmsinger.models.probes.linear_depth_head import LinearDepthHead

__all__ = ['FrozenBackbone', 'KNNClassifier', 'LinearDepthHead']
