"""The quality cache: entropy and root mean square of every cycle of a data set, measured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from respiro.errors import StoreError
from respiro.store._folder import ComputedStore, Request, thread_pool

__all__ = ["QualityStore"]

_MEASURES = 2


class QualityStore(ComputedStore):
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
    place = "quality"

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
        a store that is there already, all checksums are compared, and the first and the last cycle are measured again:
        what the arguments do not tell, such as the code of a measure of one's own, may have changed.

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
        store = cls._open(Request(samples, names, reading, measure, spec), cache_dir, progress)
        store.verify()  # a few bytes a cycle, where the other stores have too many to look at every time
        return store

    @property
    def values(self) -> np.ndarray:
        """Entropy and RMS of all cycles: ``(N, 2)`` float32, a copy."""
        return np.array(self._values)

    def _check_made_by(self, request: Request) -> None:
        for row in sorted({0, len(self) - 1}):
            made = _measured(request, row)
            if not np.allclose(made, self[row], rtol=1e-3, atol=1e-6):  # machines round differently, by far less
                raise self._damaged(
                    f"cycle {row} has {self[row].tolist()}, but {made.tolist()} is measured now, though the arguments "
                    f"are the same"
                )

    @classmethod
    def _build(cls, request: Request, folder: Path, progress: bool) -> None:
        count = len(request.names)
        with cls._writing(folder, count * _MEASURES * np.dtype(cls.array[1]).itemsize) as unfinished:
            with thread_pool() as pool:
                rows = pool.map(partial(_measured, request), range(count))
                bar = tqdm(rows, f"measuring {count} cycles", count, unit="cycle", disable=not progress)
                values = np.stack(list(bar))
            cls._write(unfinished, request, [values])


@torch.inference_mode()
def _measured(request: Request, row: int) -> np.ndarray:
    """Return the measures of a cycle as they are stored: ``(2,)``."""
    name = request.names[row]
    samples = np.array(request.samples(row))  # a copy, as torch warns of arrays that cannot be written to
    _check_finite(name, samples, "it holds samples that are not finite")
    measures = request.compute(torch.from_numpy(samples)[None])
    if measures.shape != (1, _MEASURES):
        raise ValueError(f"one clip must have measures of shape (1, {_MEASURES}), got {tuple(measures.shape)}")
    values: np.ndarray = measures[0].float().cpu().numpy().astype(QualityStore.array[1])
    _check_finite(name, values, "the quality measure made of it values that are not finite")
    return values


def _check_finite(name: str, values: np.ndarray, problem: str) -> None:
    if not np.isfinite(values).all():
        raise StoreError(f"{name}: {problem}. Look at the recording, or leave it out.")
