"""The caches on disk: every cycle of a data set, resampled once, and its features, computed once."""

from respiro.store.features import FeatureStore
from respiro.store.waveforms import Cycle, WaveformStore

__all__ = ["Cycle", "FeatureStore", "WaveformStore"]
