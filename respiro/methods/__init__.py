"""One LightningModule for each method."""

from respiro.methods.classifier import SoundClassifier
from respiro.methods.contrastive import SCL, SimCLR
from respiro.methods.hybrid import HybridSCL
from respiro.methods.inception import InceptionFusion
from respiro.methods.mscl import MSCL
from respiro.methods.patchmix import PatchMixCE, PatchMixCL
from respiro.methods.probe import LinearProbe
from respiro.methods.qlung import QLung

__all__ = [
    "MSCL",
    "SCL",
    "HybridSCL",
    "InceptionFusion",
    "LinearProbe",
    "PatchMixCE",
    "PatchMixCL",
    "QLung",
    "SimCLR",
    "SoundClassifier",
]
