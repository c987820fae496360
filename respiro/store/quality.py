"""The quality cache: entropy and root mean square of every cycle of a data set, measured once."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from respiro.download import cache_folder
from respiro.errors import StoreError
from respiro.store._folder import FolderStore

__all__ = ["QualityStore"]

_MEASURES = 2


class QualityStore(FolderStore):
    """Entropy and RMS of every cycle on disk, float32, read through a memory map.

    Get one with :meth:`open`. Indexing gives the measures of a cycle, ``(2,)``, a read-only view of the file.

    Args:
        folder: A finished store.

    Raises:
        StoreError: If the folder is not a whole store of this version.
    """

    what = "quality cache"
    format = 1  # to be raised, too, when a measure of the library computes something else than before
    array = ("measures.f32", "<f4")
    columns = np.dtype([("crc32", "<u4")])

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._check_size(_MEASURES * len(self._index))
        self._values = self._values.reshape(len(self._index), _MEASURES)

    @classmethod
    def open(
        cls,
        samples: Callable[[int], np.ndarray],
        names: Sequence[str],
        reading: Mapping[str, Any],
        measure: Callable[[Tensor], Tensor],
        spec: Mapping[str, Any],
        *,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> QualityStore:
        """Open the store of these measures, and measure first if it is not there.

        Every cycle is measured by itself, on the CPU, in threads on all cores. One process builds; others that want
        the same store wait for it. A build that fails or is killed leaves nothing that could be taken for a store. Of
        a store that is there already, the first and the last cycle are measured again: what the arguments do not tell,
        such as the code of a measure of one's own, may have changed.

        Args:
            samples: Gives the samples of cycle 0, 1, ...: ``(n,)`` float32. Called from several threads.
            names: What messages call each cycle; there are as many cycles.
            reading: Everything that shapes the samples, as plain data.
            measure: Clips ``(1, n)`` to entropy and RMS ``(1, 2)``. Called from several threads.
            spec: Everything that shapes the measures, as plain data.
            cache_dir: Folder of all caches, as in :meth:`respiro.store.WaveformStore.open`.
            progress: Show a progress bar while measuring.

        Raises:
            StoreError: If the cache cannot be written, is damaged, holds other measures than are made now, or a cycle
                has samples or measures that are not finite.
            ValueError: If *measure* gives another shape, or there are no cycles.
        """
        if not len(names):
            raise ValueError("there are no cycles to measure")
        request = _Request(samples, names, reading, measure, spec)
        folder = cache_folder(cache_dir) / "quality" / request.key()
        found = folder.exists()
        cls._ensure(folder, partial(cls._build, request, folder, progress))
        store = cls(folder)
        if found:
            store._check_made_by(request)
        return store

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[row]  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._values)

    @property
    def values(self) -> np.ndarray:
        """Entropy and RMS of all cycles: ``(N, 2)`` float32, a copy."""
        return np.array(self._values)

    def _check_made_by(self, request: _Request) -> None:
        """Raise a :class:`StoreError` if other measures are made now than what is kept."""
        for row in sorted({0, len(self) - 1}):
            made = request.compute(row)
            if not np.allclose(made, self[row], rtol=1e-3, atol=1e-6):  # machines round differently, by far less
                raise self._damaged(
                    f"cycle {row} has {self[row].tolist()}, but {made.tolist()} is measured now, though the arguments "
                    f"are the same"
                )

    def _stored(self, row: int) -> np.ndarray:
        return self[row]

    @classmethod
    def _build(cls, request: _Request, folder: Path, progress: bool) -> None:
        count = len(request.names)
        size = count * _MEASURES * np.dtype(cls.array[1]).itemsize
        with cls._writing(folder, size) as unfinished:
            values = _in_threads(request.compute, count, progress)
            with (unfinished / cls.array[0]).open("wb") as stream:
                stream.write(values.data)
                stream.flush()
                os.fsync(stream.fileno())  # a power cut must not leave a store of the right size full of zeros
            index = np.zeros(count, dtype=cls.columns)
            index["crc32"] = [zlib.crc32(row.data) for row in values]
            cls._save_index(unfinished, index, {**request.reading, "spec": dict(request.spec)})


@dataclass(frozen=True)
class _Request:
    """What a store is to hold, and how it is made."""

    samples: Callable[[int], np.ndarray]
    names: Sequence[str]
    reading: Mapping[str, Any]
    measure: Callable[[Tensor], Tensor]
    spec: Mapping[str, Any]

    def key(self) -> str:
        """Return the name of the store."""
        try:
            text = json.dumps([QualityStore.format, dict(self.reading), dict(self.spec)], sort_keys=True)
        except TypeError as error:
            raise ValueError(f"reading and spec must be plain data, to tell stores apart: {error}") from error
        return hashlib.sha256(text.encode()).hexdigest()

    @torch.inference_mode()
    def compute(self, row: int) -> np.ndarray:
        """Return the measures of a cycle as they are stored: ``(2,)``."""
        samples = np.array(self.samples(row))  # a copy, as torch warns of arrays that cannot be written to
        self._check_finite(row, samples, "it holds samples that are not finite")
        measures = self.measure(torch.from_numpy(samples)[None])
        if measures.shape != (1, _MEASURES):
            raise ValueError(f"one clip must have measures of shape (1, {_MEASURES}), got {tuple(measures.shape)}")
        values: np.ndarray = measures[0].float().cpu().numpy().astype(QualityStore.array[1])
        self._check_finite(row, values, "the quality measure made of it values that are not finite")
        return values

    def _check_finite(self, row: int, values: np.ndarray, problem: str) -> None:
        if not np.isfinite(values).all():
            raise StoreError(f"{self.names[row]}: {problem}. Look at the recording, or leave it out.")


def _in_threads(compute: Callable[[int], np.ndarray], count: int, progress: bool) -> np.ndarray:
    """Return ``compute(0)``, ``compute(1)``, ... as rows, by as many threads as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))  # each would start as many again
    try:
        rows = pool.map(compute, range(count))
        bar = tqdm(rows, f"measuring {count} cycles", count, unit="cycle", disable=not progress)
        return np.stack(list(bar))
    finally:
        pool.shutdown(cancel_futures=True)  # nothing is left to do, unless one has failed
        torch.set_num_threads(torch_threads)  # the caller kept its number; this is for threads still to be started
