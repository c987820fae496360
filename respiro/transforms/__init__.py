"""Batched feature extraction, augmentation and mixing, on any device, differentiable."""

from respiro.transforms.augment import SpecAugment
from respiro.transforms.features import KaldiFbank, LogMelSpectrogram
from respiro.transforms.mixing import CutMix, Mixup, PatchMix
from respiro.transforms.waveform_augment import WaveformAugment

__all__ = [
    "CutMix",
    "KaldiFbank",
    "LogMelSpectrogram",
    "Mixup",
    "PatchMix",
    "SpecAugment",
    "WaveformAugment",
]
