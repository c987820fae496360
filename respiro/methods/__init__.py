"""One LightningModule for each method."""

from respiro.methods.classifier import SoundClassifier

__all__ = [
    "SoundClassifier",
]
