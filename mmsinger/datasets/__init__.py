"""Data sets of the linear evaluation, and transforms of images."""
