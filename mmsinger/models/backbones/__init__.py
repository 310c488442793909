"""Backbones and stems that mmpretrain has no class for."""
from mmsinger.models.backbones.conv_stem import ConvStem
from mmsinger.models.backbones.planted_artifacts import PlantedArtifacts
from mmsinger.models.backbones.registers import VisionTransformerWithRegisters

__all__ = ['ConvStem', 'PlantedArtifacts', 'VisionTransformerWithRegisters']
