"""Exact ICBHI and SPRSound scores as torchmetrics."""

from respiro.metrics.icbhi import ICBHIScore, ICBHISensitivity, ICBHISpecificity, icbhi_metrics
from respiro.metrics.sprsound import (
    SPRSoundAverageScore,
    SPRSoundHarmonicScore,
    SPRSoundScore,
    sprsound_metrics,
    sprsound_total,
)

__all__ = [
    "ICBHIScore",
    "ICBHISensitivity",
    "ICBHISpecificity",
    "SPRSoundAverageScore",
    "SPRSoundHarmonicScore",
    "SPRSoundScore",
    "icbhi_metrics",
    "sprsound_metrics",
    "sprsound_total",
]
