"""Training objectives; each works in anybody's own loop."""

from respiro.losses.classification import CrossEntropy, cross_entropy

__all__ = [
    "CrossEntropy",
    "cross_entropy",
]
