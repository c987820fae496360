"""Training objectives; each works in anybody's own loop."""

from respiro.losses.classification import CrossEntropy, MixedCrossEntropy, cross_entropy, mixed_cross_entropy
from respiro.losses.contrastive import PatchMixContrastiveLoss, patch_mix_contrastive_loss

__all__ = [
    "CrossEntropy",
    "MixedCrossEntropy",
    "PatchMixContrastiveLoss",
    "cross_entropy",
    "mixed_cross_entropy",
    "patch_mix_contrastive_loss",
]
