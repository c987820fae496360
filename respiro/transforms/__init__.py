"""Batched feature extraction, on any device, differentiable."""

from respiro.transforms.features import KaldiFbank, LogMelSpectrogram

__all__ = [
    "KaldiFbank",
    "LogMelSpectrogram",
]
