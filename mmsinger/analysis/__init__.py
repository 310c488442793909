from mmsinger.analysis.analyse import Analysis, analyse
from mmsinger.analysis.images import ImageFolder
from mmsinger.analysis.report import render
from mmsinger.analysis.separation import (TailGroup, far_outliers,
                                          patch_contrast, ratio_histogram,
                                          ratio_spread, spanned_dimensions,
                                          subspace_overlap, tail_group,
                                          within_image_rank)
from mmsinger.analysis.subject import (Subject, check_size, load_subject,
                                       natural_size)
from mmsinger.analysis.verdict import (Evidence, Suggestion, Verdict, judge,
                                       snippet, suggest)

__all__ = [
    'Analysis', 'Evidence', 'ImageFolder', 'Subject', 'Suggestion',
    'TailGroup', 'Verdict', 'analyse', 'check_size', 'far_outliers', 'judge',
    'load_subject', 'natural_size', 'patch_contrast', 'ratio_histogram',
    'ratio_spread', 'render', 'snippet', 'spanned_dimensions',
    'subspace_overlap', 'suggest', 'tail_group', 'within_image_rank'
]
