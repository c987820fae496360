"""The caches on disk: every cycle of a data set, resampled once, its features, computed once, and its quality."""

from respiro.store.features import FeatureStore
from respiro.store.quality import QualityStore
from respiro.store.waveforms import Cycle, WaveformStore

__all__ = ["Cycle", "FeatureStore", "QualityStore", "WaveformStore"]
