from mmsinger.analysis.analyse import Analysis, analyse
from mmsinger.images import ImageFolder
from mmsinger.analysis.report import render
from mmsinger.analysis.subject import (Subject, check_size, load_subject,
                                       natural_size)
from mmsinger.analysis.verdict import Evidence, Suggestion, Verdict

__all__ = [
    'Analysis', 'Evidence', 'ImageFolder', 'Subject', 'Suggestion', 'Verdict',
    'analyse', 'check_size', 'load_subject', 'natural_size', 'render'
]
