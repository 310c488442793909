from mmsinger.models.distillers.base import BaseDistiller
from mmsinger.models.distillers.fitnet import FitNetDistiller
from mmsinger.models.distillers.singer import SiNGERDistiller

__all__ = ['BaseDistiller', 'FitNetDistiller', 'SiNGERDistiller']
