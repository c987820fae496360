"""Backbones and heads."""

from respiro.models.heads import LinearHead
from respiro.models.panns import CNN10, CNN14, CNN6
from respiro.models.timm import TimmBackbone

__all__ = [
    "CNN10",
    "CNN14",
    "CNN6",
    "LinearHead",
    "TimmBackbone",
]
