"""The waveform cache: every cycle of a data set, resampled once, in one memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from respiro import audio
from respiro.download import cache_folder
from respiro.errors import AnnotationError, AudioError, check_choice
from respiro.store._folder import FolderStore, synced, thread_pool

__all__ = ["Cycle", "WaveformStore"]

Resample = Literal["recording", "cycle"]

_SAMPLE_BYTES = 4


class Cycle(NamedTuple):
    """One stored cycle, and where it stood in its recording."""

    samples: np.ndarray  #: (n,) float32, a read-only view of the file, neither faded nor padded
    begin: int  #: position in the resampled recording; 0 if cycles were resampled one by one
    total: int  #: samples of the resampled recording; ``len(samples)`` if cycles were resampled one by one


class WaveformStore(FolderStore):
    """Cycles on disk, read through a memory map.

    Get one with :meth:`open`. Indexing gives a :class:`Cycle`. A pickled store carries its folder only and is opened
    anew where it is unpickled, so all workers share the pages of one file.

    Args:
        folder: A finished store.

    Raises:
        StoreError: If the folder is not a whole store of this version.
    """

    what = "waveform cache"
    format = 1
    array = ("samples.f32", "<f4")
    #: The cycles lie in the file one after the other.
    columns = np.dtype([("length", "<i8"), ("begin", "<i8"), ("total", "<i8"), ("crc32", "<u4")])

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._check_size(int(self._index["length"].sum()))
        self._stops = np.cumsum(self._index["length"])

    @classmethod
    def open(
        cls,
        segments: pd.DataFrame,
        sample_rate: int,
        *,
        resample: Resample = "recording",
        rounding: audio.Rounding = "truncate",
        band: Sequence[float] | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> WaveformStore:
        """Open the store of these segments, and build it first if it is not there.

        The build uses all cores. One process builds; others that want the same store wait for it. A build that fails
        or is killed leaves nothing that could be taken for a store.

        Args:
            segments: One row a cycle, with ``path`` (sound file), ``start`` and ``end`` (s). Row *i* becomes cycle
                *i*; the end is clipped to the recording.
            sample_rate: Of the stored cycles, Hz.
            resample: ``"recording"`` resamples the whole recording, then cuts (Bae et al., 2023); ``"cycle"`` cuts at
                the rate of the file, then resamples (Moummad & Farrugia, 2023).
            rounding: How seconds become samples, see :func:`respiro.audio.positions`.
            band: Lowest and highest frequency (Hz) that is kept, see :func:`respiro.audio.band_pass`: of the whole
                recording before it is cut, or with ``resample="cycle"`` of each resampled cycle; default all.
            cache_dir: Folder of all caches; by default the environment variable ``RESPIRO_CACHE``, else the user's
                cache folder.
            progress: Show a progress bar while building.

        Raises:
            AudioError: If a sound file cannot be used.
            AnnotationError: If a segment makes no sense or holds no samples.
            StoreError: If the cache cannot be written, or is damaged.
            ValueError: If an argument has no meaning.
        """
        _check_arguments(segments, sample_rate, resample, rounding)
        request = _Request.of(segments, int(sample_rate), resample, rounding, band)
        folder = cache_folder(cache_dir) / "waveforms" / request.key()
        cls._ensure(folder, partial(cls._build, request, folder, progress))
        return cls(folder)

    def __getitem__(self, row: int) -> Cycle:
        length, begin, total, _ = self._index[row].item()
        stop = int(self._stops[row])
        return Cycle(self._values[stop - length : stop], begin, total)

    def __iter__(self) -> Iterator[Cycle]:
        return (self[row] for row in range(len(self)))

    def _stored(self, row: int) -> np.ndarray:
        return self[row].samples

    @classmethod
    def _build(cls, request: _Request, folder: Path, progress: bool) -> None:
        plan = _Plan.of(request)
        with cls._writing(folder, plan.size) as unfinished:
            _write_samples(plan, unfinished / cls.array[0], progress)
            settings = {name: getattr(request, name) for name in ("sample_rate", "resample", "rounding", "band")}
            cls._save_index(unfinished, plan.index, settings)


@dataclass(frozen=True)
class _Request:
    """What a store is to hold: everything that shapes its content."""

    paths: list[str]  #: recordings in order of appearance
    recording: np.ndarray  #: (n,) position in *paths*
    start: np.ndarray  #: (n,) seconds
    end: np.ndarray  #: (n,) seconds
    sample_rate: int
    resample: Resample
    rounding: audio.Rounding
    band: tuple[float, float] | None

    @classmethod
    def of(
        cls,
        segments: pd.DataFrame,
        sample_rate: int,
        resample: Resample,
        rounding: audio.Rounding,
        band: Sequence[float] | None,
    ) -> _Request:
        recording, paths = pd.factorize(segments["path"].astype(str))
        start, end = (segments[column].to_numpy("float64") for column in ("start", "end"))
        band = audio.check_band(band, sample_rate)
        request = cls(list(paths), recording, start, end, sample_rate, resample, rounding, band)
        request.check((start >= 0) & (end > start) & np.isfinite(end), "is not a span of time")
        return request

    def key(self) -> str:
        """Return the name of the store. The folder of the recordings does not matter; which files they are does."""
        stats = [audio.file_stat(path) for path in self.paths]
        files = [(Path(path).name, s.st_size, s.st_mtime_ns) for path, s in zip(self.paths, stats, strict=True)]
        settings: list[Any] = [WaveformStore.format, self.sample_rate, self.resample, self.rounding, files]
        settings += [] if self.band is None else [self.band]  # stores without one keep their name
        digest = hashlib.sha256(json.dumps(settings).encode())
        for column in (self.recording.astype("<i8"), self.start.astype("<f8"), self.end.astype("<f8")):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def positions(self, rates: np.ndarray) -> np.ndarray:
        """Return the samples where each cycle begins and ends: ``(n, 2)``."""
        return audio.positions(np.stack([self.start, self.end], axis=1), rates[:, None], self.rounding)

    def prepared(self, waveform: np.ndarray, rate: int) -> np.ndarray:
        """Return a recording, or a cycle of one, as it is stored: resampled, and with its band alone."""
        waveform = audio.resample(waveform, rate, self.sample_rate)
        return waveform if self.band is None else audio.band_pass(waveform, self.sample_rate, self.band)

    def check(self, good: np.ndarray, problem: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            where = f"{self.paths[self.recording[row]]}: segment {row} ({self.start[row]} s to {self.end[row]} s)"
            raise AnnotationError(f"{where} {problem}. Correct the annotation, or leave the segment out.")


@dataclass(frozen=True)
class _Plan:
    """Where each cycle is cut and how long it becomes: known from the headers, before a sample is read."""

    request: _Request
    cuts: np.ndarray  #: (n, 2) samples of the recording, resampled or not, where each cycle begins and ends
    index: np.ndarray  #: (n,) as stored; the checksums are filled in while the cycles are written
    offsets: np.ndarray  #: (n,) bytes before each cycle in the file
    size: int  #: bytes of the file

    @classmethod
    def of(cls, request: _Request) -> _Plan:
        headers = [audio.read_header(path) for path in request.paths]
        for path, header in zip(request.paths, headers, strict=True):
            audio.check_rates(header.sample_rate, request.sample_rate, f"{path}: ")
        several = [path for path, header in zip(request.paths, headers, strict=True) if header.channels > 1]
        if several:
            message = f"{len(several)} of {len(headers)} recordings have several channels, which are averaged"
            warnings.warn(f"{message} (first: {several[0]})", UserWarning, stacklevel=5)  # seen from open's caller
        whole = request.resample == "recording"
        rates = np.array([header.sample_rate for header in headers])[request.recording]
        frames = np.array([header.frames for header in headers])[request.recording]
        new_rates = np.full_like(rates, request.sample_rate)
        if whole:
            frames, rates = audio.resampled_length(frames, rates, new_rates), new_rates
        cuts = np.minimum(request.positions(rates), frames[:, None])
        length = cuts[:, 1] - cuts[:, 0]
        request.check(length > 0, "holds no samples of its recording")
        index = np.zeros(len(cuts), dtype=WaveformStore.columns)
        index["length"] = audio.resampled_length(length, rates, new_rates)
        index["begin"] = cuts[:, 0] if whole else 0
        index["total"] = frames if whole else index["length"]
        stops = _SAMPLE_BYTES * np.cumsum(index["length"])
        return cls(request, cuts, index, stops - _SAMPLE_BYTES * index["length"], int(stops[-1]))

    def write_recording(self, recording: int, rows: np.ndarray, file: Path) -> None:
        """Write the cycles of one recording to their places; several threads do so at once."""
        path = self.request.paths[recording]
        whole = self.request.resample == "recording"
        waveform, header = audio.decode(path)
        rate = header.sample_rate
        if whole:
            waveform = self.request.prepared(waveform, rate)
        # Written, not mapped: on a full disk that is an error, where a memory map would kill the process.
        with file.open("r+b") as stream:
            for row in rows:
                cycle = waveform[slice(*self.cuts[row])]
                cycle = cycle if whole else self.request.prepared(cycle, rate)
                if len(cycle) != self.index["length"][row]:
                    raise AudioError(f"{path}: changed while it was read. Start again when the file is complete.")
                self.index["crc32"][row] = zlib.crc32(cycle.data)
                stream.seek(self.offsets[row])
                stream.write(cycle.data)


def _write_samples(plan: _Plan, file: Path, progress: bool) -> None:
    recording = plan.request.recording
    rows = np.split(np.argsort(recording, kind="stable"), np.cumsum(np.bincount(recording))[:-1])
    bar = tqdm(total=len(recording), desc=f"preparing {len(recording)} cycles", unit="cycle", disable=not progress)
    with synced(file) as stream, bar, thread_pool() as pool:
        stream.truncate(plan.size)
        writing = pool.map(plan.write_recording, range(len(rows)), rows, [file] * len(rows))
        for written, _ in zip(rows, writing, strict=True):
            bar.update(len(written))


def _check_arguments(segments: pd.DataFrame, sample_rate: int, resample: str, rounding: str) -> None:
    if missing := {"path", "start", "end"} - set(segments.columns):
        raise ValueError(f"segments must have the columns path, start and end, {', '.join(sorted(missing))} is missing")
    if segments.empty:
        raise ValueError("segments must have at least one row")
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be positive, got {sample_rate!r}")
    check_choice("resample", resample, ("recording", "cycle"))
    check_choice("rounding", rounding, get_args(audio.Rounding))
