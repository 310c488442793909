from mmsinger.analysis.analyse import Analysis, analyse
from mmsinger.analysis.report import render
from mmsinger.analysis.verdict import Evidence, Suggestion, Verdict
from mmsinger.engine.loading import Subject, load_subject, natural_size
from mmsinger.images import ImageFolder

__all__ = [
    'Analysis', 'Evidence', 'ImageFolder', 'Subject', 'Suggestion', 'Verdict',
    'analyse', 'load_subject', 'natural_size', 'render'
]
