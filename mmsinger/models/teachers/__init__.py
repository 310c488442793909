"""Frozen teachers."""
from mmsinger.models.teachers.frozen import FrozenClassifier, FrozenTeacher

__all__ = ['FrozenClassifier', 'FrozenTeacher']
