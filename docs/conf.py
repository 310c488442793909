"""Sphinx: ``sphinx-build docs build/docs`` (extra ``docs``)."""
project = 'mmsinger'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
source_suffix = {'.md': 'markdown'}
myst_heading_anchors = 3
suppress_warnings = ['toc.not_included']  # tables that pages link to
html_theme = 'alabaster'
