"""One LightningModule for each method."""

from respiro.methods.classifier import SoundClassifier
from respiro.methods.patchmix import PatchMixCE, PatchMixCL

__all__ = [
    "PatchMixCE",
    "PatchMixCL",
    "SoundClassifier",
]
