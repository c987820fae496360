"""Backbones and heads."""

from respiro.models.heads import LinearHead
from respiro.models.panns import CNN6, CNN10, CNN14
from respiro.models.timm import TimmBackbone

__all__ = [
    "CNN6",
    "CNN10",
    "CNN14",
    "LinearHead",
    "TimmBackbone",
]
