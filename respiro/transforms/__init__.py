"""Batched feature extraction, augmentation and mixing, on any device, differentiable."""

from respiro.transforms.augment import SpecAugment
from respiro.transforms.features import KaldiFbank, LogMelSpectrogram
from respiro.transforms.gammatone import GammatoneSpectrogram
from respiro.transforms.mixing import CutMix, Mixup, PatchMix
from respiro.transforms.quality import AudioQuality
from respiro.transforms.stacked import StackedFeatures
from respiro.transforms.waveform_augment import WaveformAugment
from respiro.transforms.wavelet import MorletScalogram

__all__ = [
    "AudioQuality",
    "CutMix",
    "GammatoneSpectrogram",
    "KaldiFbank",
    "LogMelSpectrogram",
    "Mixup",
    "MorletScalogram",
    "PatchMix",
    "SpecAugment",
    "StackedFeatures",
    "WaveformAugment",
]
