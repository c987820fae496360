"""Backbones, heads, and the pretrained weights that fill them."""

from respiro.models.ast import AST
from respiro.models.fusion import SpectrogramFusion
from respiro.models.heads import CosineHead, LinearHead, Projector
from respiro.models.inception import InceptionResidual
from respiro.models.panns import CNN6, CNN10, CNN14
from respiro.models.timm import TimmBackbone
from respiro.models.weights import LoadReport, Weights, load_weights

__all__ = [
    "AST",
    "CNN6",
    "CNN10",
    "CNN14",
    "CosineHead",
    "InceptionResidual",
    "LinearHead",
    "LoadReport",
    "Projector",
    "SpectrogramFusion",
    "TimmBackbone",
    "Weights",
    "load_weights",
]
