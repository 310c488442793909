"""What the student is compared with: a teacher's tokens, step by step."""
from mmsinger.models.targets.entropy import WeighByEntropy
from mmsinger.models.targets.filter import ClipNorms, FilterStep, MaskTokens
from mmsinger.models.targets.normalise import TargetNorm
from mmsinger.models.targets.outlier_subspace import RemoveOutlierSubspace
from mmsinger.models.targets.refine import Refine
from mmsinger.models.targets.step import TargetStep, TeacherOutputs

__all__ = [
    'ClipNorms', 'FilterStep', 'MaskTokens', 'Refine',
    'RemoveOutlierSubspace', 'TargetNorm', 'TargetStep', 'TeacherOutputs',
    'WeighByEntropy'
]
