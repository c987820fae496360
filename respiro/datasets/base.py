"""What every respiratory-sound data set offers: two tables, fixed-length waveforms, counts and a self-check."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from respiro import audio
from respiro.datasets._batch import CODED, Batch, check_label_name
from respiro.datasets._quality import Quality, cycle_quality
from respiro.datasets._reading import Fade, check_encoding, check_reading
from respiro.datasets.metadata import ADULT, MetadataLabels, metadata_labels
from respiro.errors import LabelError
from respiro.store import FeatureStore, WaveformStore

__all__ = ["CODED", "Batch", "Fade", "Quality", "RespiratoryDataset", "check_label_name", "check_reading"]

_FILE_COLUMNS = ("path", "frames", "channels", "encoding", "duration")


class RespiratoryDataset(Dataset[dict[str, Tensor]]):
    """Cycles of a respiratory-sound data set: tables, and one fixed-length waveform per row.

    Subclasses read their files into two tables and hand them over; everything else is shared. A *cycle* is the unit
    of classification: a breath cycle, an annotated event, or a whole recording.

    Args:
        recordings: One row a recording, all splits: ``recording`` (name), ``path``, ``patient``, ``device``,
            ``location``, ``take`` (equal for simultaneous recordings), ``sex``, ``age`` (years), ``age_group``,
            ``split``, ``sample_rate`` (Hz), ``frames``, ``channels``, ``encoding``, and whatever else is known.
        cycles: One row a cycle, all splits: ``recording``, ``cycle`` (position in its recording), ``start`` and
            ``end`` (s), ``label`` (-1 = left out by the label map), and more. Columns of *recordings* are joined.
        classes: Class names in the order of their labels.
        vocabularies: For each of ``patient``, ``device``, ``location``, ``sex``, ``age_group``, the known values in
            the order of their codes.
        splits: Values of the ``split`` column whose rows form this data set.
        sample_rate: Of the waveforms, Hz.
        duration: Of every waveform, seconds. Longer cycles keep their first *duration* seconds.
        pad: How a shorter cycle is filled: see :func:`respiro.audio.fit_length`.
        fade: Linear fades of 1/16 s: at both ends of the whole ``"recording"`` (Patch-Mix), of each ``"cycle"``
            (SCL), or ``"none"``.
        resample: ``"recording"`` resamples, then cuts (Patch-Mix); ``"cycle"`` cuts, then resamples (SCL).
        cache_dir: Where resampled cycles, and features, are kept; default as in :class:`respiro.store.WaveformStore`.
        any_encoding: Accept files that are not mono 16- or 24-bit PCM; stereo is then averaged.
        band: Lowest and highest frequency (Hz) that is kept, see :func:`respiro.audio.band_pass`: of the whole
            resampled recording before it is cut, or with ``resample="cycle"`` of each resampled cycle. Data sets whose
            recordings reach differently far up hold the same then. Default all.

    Attributes:
        metadata: Labels that :meth:`add_labels` made, by the batch key that carries them.
        feature_store: Features of every cycle of every split, or ``None`` before :meth:`cache_features`.

    Raises:
        ValueError: If an argument has no meaning.
        AudioError: If a file is not in the published form and *any_encoding* is false.
    """

    #: How seconds become sample positions: see :func:`respiro.audio.positions`.
    rounding: ClassVar[audio.Rounding] = "truncate"

    def __init__(
        self,
        recordings: pd.DataFrame,
        cycles: pd.DataFrame,
        *,
        classes: tuple[str, ...],
        vocabularies: dict[str, tuple[str, ...]],
        splits: tuple[str, ...],
        sample_rate: int = 16000,
        duration: float = 8.0,
        pad: audio.Pad = "repeat",
        fade: Fade = "recording",
        resample: Literal["recording", "cycle"] = "recording",
        cache_dir: str | Path | None = None,
        any_encoding: bool = False,
        band: tuple[float, float] | None = None,
    ) -> None:
        check_reading(sample_rate, duration, pad, fade, resample, band)
        if not any_encoding:
            check_encoding(recordings)
        self.classes = classes
        self.vocabularies = vocabularies
        self.sample_rate = sample_rate
        self.duration = duration
        self.pad: audio.Pad = pad
        self.fade: Fade = fade
        self.resample: Literal["recording", "cycle"] = resample
        self.cache_dir = cache_dir
        self.any_encoding = any_encoding
        self.band = audio.check_band(band, sample_rate)
        self.metadata: dict[str, MetadataLabels] = {}
        self.feature_store: FeatureStore | None = None
        self.all_recordings = recordings
        shared = [
            column for column in recordings.columns if column not in cycles.columns and column not in _FILE_COLUMNS
        ]
        self.all_cycles = cycles.merge(recordings[["recording", *shared]], on="recording", how="left", validate="m:1")
        self.all_cycles["quality"] = np.float32("nan")
        names = np.array([*classes, None], dtype=object)  # -1 takes the last
        self.all_cycles["class"] = names[self.all_cycles["label"].to_numpy("int64")]
        chosen = self.all_cycles["split"].isin(splits) & (self.all_cycles["label"] >= 0)
        self._rows = np.flatnonzero(chosen)

    @cached_property
    def cycles(self) -> pd.DataFrame:
        """One row a cycle of this data set; the row labels are those of the whole table (batch key ``index``)."""
        return self.all_cycles.iloc[self._rows]

    @cached_property
    def recordings(self) -> pd.DataFrame:
        """One row for each recording that has a cycle here."""
        return self.all_recordings[self.all_recordings["recording"].isin(self.cycles["recording"].unique())]

    @property
    def left_out(self) -> pd.DataFrame:
        """Cycles that the label map leaves out, of every split."""
        return self.all_cycles[self.all_cycles["label"] < 0]

    @property
    def reading(self) -> dict[str, Any]:
        """How recordings become waveforms, as plain data."""
        names = ("sample_rate", "duration", "pad", "fade", "resample", "rounding")
        return {name: getattr(self, name) for name in names} | {"band": self.band and list(self.band)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all recordings (name, rate, length, split) and all cycles (times, label): which data this is."""
        recordings = self.all_recordings[["recording", "sample_rate", "frames", "split"]]
        parts = recordings, self.all_cycles[["recording", "start", "end", "label"]]
        return hashlib.sha256("".join(part.to_csv(index=False) for part in parts).encode()).hexdigest()

    @property
    def origin(self) -> dict[str, Any]:
        """What else tells which data this is, as plain data for the protocol record."""
        return {}

    @property
    def class_counts(self) -> list[int]:
        """Number of cycles of each class."""
        return [int(count) for count in np.bincount(self.cycles["label"], minlength=len(self.classes))]

    def subset(self, index: np.ndarray | pd.Index) -> Self:
        """Return this data set with only the cycles of these row labels, in this order."""
        other = copy.copy(self)
        for cached in ("cycles", "recordings", "_columns"):  # what depends on the rows
            other.__dict__.pop(cached, None)
        positions = self.cycles.index.get_indexer(pd.Index(index))
        if (positions < 0).any():
            row = np.asarray(index)[positions < 0][0]
            raise LabelError(f"row {row} is not a cycle of this data set; take row labels from its cycles table")
        other._rows = self._rows[positions]
        return other

    def add_labels(
        self,
        name: str,
        columns: str | Sequence[str],
        age_threshold: float = ADULT,
        merge_below: int = 0,
        reference: np.ndarray | pd.Index | None = None,
        strict: bool = True,
    ) -> MetadataLabels:
        """Label the cycles of every split by their metadata, under *name* in each sample and batch from here on.

        Subsets made from here on have them too. A name given before gets the new labels.

        Args:
            name: The key; none of :class:`Batch`.
            columns: Of :attr:`all_cycles`, which are the table of :func:`metadata_labels`: see there for the rest.
            age_threshold: Years.
            merge_below: Number of reference rows.
            reference: Row labels, such as those of the train side; default every split.
            strict: Refuse labels that are of no use.

        Raises:
            LabelError: If the columns give no labels to contrast.
            ValueError: If an argument has no meaning.
        """
        check_label_name(name)
        labels = metadata_labels(self.all_cycles, columns, age_threshold, merge_below, reference, strict)
        self.metadata = self.metadata | {name: labels}  # another mapping: subsets made before keep theirs
        self.__dict__.pop("_columns", None)
        return labels

    @cached_property
    def store(self) -> WaveformStore:
        """Every cycle of every split, resampled, on disk; built at the first use."""
        paths = self.all_recordings.set_index("recording")["path"]
        segments = self.all_cycles[["start", "end"]].assign(path=self.all_cycles["recording"].map(paths))
        how: Any = {"resample": self.resample, "rounding": self.rounding, "band": self.band}
        return WaveformStore.open(segments, self.sample_rate, **how, cache_dir=self.cache_dir)

    def prepare(self) -> None:
        """Build the store now if it is not there yet."""
        _ = self.store

    def cache_features(self, features: Callable[[Tensor], Tensor], spec: Mapping[str, Any]) -> None:
        """Keep the features of every cycle of every split on disk, as ``features`` in each sample from here on.

        Computed now if they are not there yet. Subsets made from here on have them too. Another call replaces them.

        Args:
            features: Front end: waveforms ``(B, S)`` to features ``(B, T, F)``.
            spec: What tells it from others, plain data as :func:`respiro.component.describe` returns it.

        Raises:
            StoreError: If the cache cannot be written, is damaged, or cannot hold the features.
            ValueError: If *spec* does not tell how the front end was built, or the front end has parameters.
        """
        self.feature_store = FeatureStore.open(
            lambda position: self._fitted(self._faded(position)),
            self.cycle_names,
            {"store": self.store.folder.name, "duration": float(self.duration), "pad": self.pad, "fade": self.fade},
            features,
            spec,
            cache_dir=self.cache_dir,
        )

    def add_quality(self, quality: Quality, reference: np.ndarray | pd.Index | None = None) -> None:
        """Score how good the recording of each cycle is, as ``quality`` in the tables and samples from here on.

        Scored are the cycles of every split as they were cut, neither faded nor padded. The measures are kept on disk,
        and made now if they are not there yet. Subsets made from here on have the scores too; those made before keep
        what they had. Another call replaces them.

        Args:
            quality: Such as :class:`respiro.transforms.AudioQuality`. It is fitted to the reference rows, in place.
            reference: Row labels, such as those of the train side without validation; default all cycles of the split
                ``"train"``, or every cycle where there is none.

        Raises:
            StoreError: If the cache cannot be written, is damaged, or a cycle has samples that are not finite.
            ValueError: If *quality* is for another sampling rate, or *reference* holds no row labels of the table.
        """
        self.replace_cycles(self.all_cycles.assign(quality=cycle_quality(self, quality, reference)))

    def replace_cycles(self, table: pd.DataFrame) -> None:
        """Take another table of the same cycles as :attr:`all_cycles`, such as that of a data set this is part of."""
        self.all_cycles = table  # not changed in place: subsets share it
        for cached in ("cycles", "_columns"):
            self.__dict__.pop(cached, None)

    @property
    def cycle_names(self) -> list[str]:
        """What messages call the cycles of every split."""
        spans = self.all_cycles[["recording", "start", "end"]].itertuples(index=False)
        return [f"recording {recording!r}, {start:g} s to {end:g} s" for recording, start, end in spans]

    def waveform(self, row: int) -> np.ndarray:
        """Return cycle *row* (0 to len - 1) faded but neither cut nor padded: ``(samples,)`` float32."""
        return self._faded(int(self._rows[row]))

    def _faded(self, position: int) -> np.ndarray:
        cycle = self.store[position]
        if self.fade == "none":
            return np.array(cycle.samples)
        begin, total = (cycle.begin, cycle.total) if self.fade == "recording" else (0, len(cycle.samples))
        return audio.fade(cycle.samples, self._fade_samples, begin=begin, total=total)

    def _fitted(self, samples: np.ndarray) -> np.ndarray:
        return audio.fit_length(samples, self._size, self.pad, 0 if self.fade == "none" else self._fade_samples)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Return one sample: the keys of :class:`Batch`, without the batch dimension."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"cycle {row} of {len(self)}")
        samples = self.waveform(row)
        sample = {"waveform": torch.from_numpy(self._fitted(samples))}
        sample |= {name: column[row] for name, column in self._columns.items()}
        if self.feature_store is not None:
            sample["features"] = torch.from_numpy(np.array(self.feature_store[int(self._rows[row])]))
        return sample | {"length": torch.tensor(min(len(samples), self._size))}

    @property
    def _size(self) -> int:
        return round(self.duration * self.sample_rate)

    @property
    def _fade_samples(self) -> int:
        return self.sample_rate // 16

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        cycles = self.cycles
        columns = {name: torch.from_numpy(self.codes(name)) for name in CODED}
        columns["label"] = torch.tensor(cycles["label"].to_numpy("int64"))
        columns["index"] = torch.tensor(cycles.index.to_numpy("int64"))
        for name, labels in self.metadata.items():
            columns[name] = torch.tensor(labels.ids.to_numpy()[self._rows])
        columns["quality"] = torch.tensor(cycles["quality"].to_numpy("float32"))
        return columns

    def codes(self, column: str) -> np.ndarray:
        """Return a metadata column as int64 codes, -1 where unknown: ``(len(self),)``."""
        return pd.Categorical(self.cycles[column], list(self.vocabularies[column])).codes.astype("int64")

    def counts(self) -> pd.DataFrame:
        """Return recordings, patients and cycles, in all and by class, for each split and each device in it."""
        table = self.all_cycles[self.all_cycles["label"] >= 0]
        blocks = [("all", "all", table)]
        for split, side in table.groupby("split", sort=False):
            blocks.append((str(split), "all", side))
            if len(self.vocabularies["device"]) > 1:
                blocks += [(str(split), str(device), part) for device, part in side.groupby("device")]
        rows = []
        for split, device, part in blocks:
            by_class = np.bincount(part["label"], minlength=len(self.classes))
            row: dict[str, Any] = {"split": split, "device": device}
            row |= {"recordings": part["recording"].nunique(), "patients": part["patient"].nunique()}
            row |= {"cycles": len(part)} | dict(zip(self.classes, by_class.tolist(), strict=True))
            rows.append(row)
        return pd.DataFrame(rows).set_index(["split", "device"])

    def summary(self) -> None:
        """Print the counts per split, class and device."""
        print(f"{type(self).__name__}: {len(self.all_recordings)} recordings, {len(self.all_cycles)} cycles")
        print(self.counts().to_string())
        if len(self.left_out):
            print(f"left out by the label map: {len(self.left_out)} cycles")
