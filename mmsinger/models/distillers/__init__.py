from mmsinger.models.distillers.base import BaseDistiller, is_distiller
from mmsinger.models.distillers.feature import FeatureDistiller
from mmsinger.models.distillers.fitnet import FitNetDistiller
from mmsinger.models.distillers.logit_kd import LogitKDDistiller
from mmsinger.models.distillers.singer import SiNGERDistiller
from mmsinger.models.distillers.vitkd import ViTKDDistiller

__all__ = [
    'BaseDistiller', 'FeatureDistiller', 'FitNetDistiller',
    'LogitKDDistiller', 'SiNGERDistiller', 'ViTKDDistiller', 'is_distiller'
]
