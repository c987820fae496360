"""How good each cycle of a data set is, by a measure of the signal that the caller brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from respiro.datasets.metadata import _reference_rows
from respiro.store import QualityStore

if TYPE_CHECKING:
    from respiro.datasets.base import RespiratoryDataset

__all__ = ["Quality", "cycle_quality"]


class Quality(Protocol):
    """What a quality score must do; :class:`respiro.transforms.AudioQuality` does it."""

    sample_rate: int  #: Of the waveforms that it measures, Hz.
    rms_range: Tensor  #: What :meth:`fit` found.

    def measure(self, waveform: Tensor) -> Tensor:
        """Return entropy and RMS ``(B, 2)`` of clips ``(B, S)``; several threads call it."""

    def fit(self, rms: Tensor) -> None:
        """Take the range of the RMS from that of the train cycles ``(N,)``."""

    def score(self, measures: Tensor) -> Tensor:
        """Return the score ``(B,)`` of measures ``(B, 2)``."""

    def measure_spec(self) -> dict[str, Any]:
        """Return what shapes the measures, as plain data."""

    def spec(self) -> dict[str, Any]:
        """Return how it was built, as plain data."""


def cycle_quality(
    data: RespiratoryDataset, quality: Quality, reference: np.ndarray | pd.Index | None = None
) -> np.ndarray:
    """Fit *quality* to the reference rows, and return the score of every cycle of every split ``(N,)`` float32.

    See :meth:`respiro.datasets.RespiratoryDataset.add_quality`.
    """
    if quality.sample_rate != data.sample_rate:
        raise ValueError(
            f"the quality measure is for {quality.sample_rate} Hz, but the data set reads at {data.sample_rate} Hz; "
            f"build the measure with sample_rate={data.sample_rate}"
        )
    table = data.all_cycles
    if reference is None:
        train = table.index[table["split"] == "train"]
        reference = train if len(train) else table.index
    counted = _reference_rows(table, reference)
    waveforms = data.store
    store = QualityStore.open(
        lambda position: waveforms[position].samples,
        data.cycle_names,
        {"store": waveforms.folder.name},
        quality.measure,
        quality.measure_spec(),
        cache_dir=data.cache_dir,
    )
    measures = torch.from_numpy(store.values)
    quality.fit(measures[torch.from_numpy(counted), 1])
    scores: np.ndarray = quality.score(measures).cpu().numpy().astype("float32")
    return scores
