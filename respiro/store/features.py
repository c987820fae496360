"""The feature cache: what a front end makes of every cycle of a data set, computed once, in one memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from respiro.download import cache_folder
from respiro.errors import StoreError
from respiro.store._folder import FolderStore

__all__ = ["FeatureStore"]

_BATCH = 32  # waveforms at a time, which bounds the memory of the build


class FeatureStore(FolderStore):
    """Features of every cycle on disk, float16, read through a memory map.

    Get one with :meth:`open`. Indexing gives the features of a cycle, ``(T, F)``, a read-only view of the file. A
    pickled store carries its folder only, as :class:`respiro.store.WaveformStore` does.

    Args:
        folder: A finished store.

    Raises:
        StoreError: If the folder is not a whole store of this version.
    """

    what = "feature cache"
    format = 1  # to be raised, too, when a front end of the library computes something else than before
    array = ("features.f16", "<f2")
    columns = np.dtype([("crc32", "<u4")])

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        shape = (len(self._index), *self._meta.get("shape", ())[1:])
        self._check_size(math.prod(shape))
        self._values = self._values.reshape(shape)

    @classmethod
    def open(
        cls,
        waveform: Callable[[int], np.ndarray],
        names: Sequence[str],
        reading: Mapping[str, Any],
        features: Callable[[Tensor], Tensor],
        spec: Mapping[str, Any],
        *,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> FeatureStore:
        """Open the store of these features, and compute them first if it is not there.

        The features are computed on the device of the front end, in batches, in float32 and in eval mode. One process
        builds; others that want the same store wait for it. A build that fails or is killed leaves nothing that could
        be taken for a store. Of a store that is there already, the first and the last cycle are computed again: what
        the arguments do not tell, such as the code of a front end of one's own, may have changed.

        Args:
            waveform: Gives the waveform of cycle 0, 1, ...: ``(S,)`` float32, all of one length.
            names: What messages call each cycle; there are as many cycles.
            reading: Everything that shapes the waveforms, as plain data.
            features: Front end ``(B, S) -> (B, T, F)`` without parameters or another state.
            spec: Everything that shapes the front end: ``class_path`` and ``init_args``, plain data.
            cache_dir: Folder of all caches, as in :meth:`respiro.store.WaveformStore.open`.
            progress: Show a progress bar while computing.

        Raises:
            StoreError: If the cache cannot be written, is damaged, holds other features than the front end makes now,
                or cannot hold a feature: one that is not finite, or too large for float16.
            ValueError: If the front end has a state or gives another shape, if *spec* does not tell how it and its
                parts were built, or if there are no cycles.
        """
        request = _Request(waveform, names, reading, features, spec)
        request.check()
        folder = cache_folder(cache_dir) / "features" / request.key()
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
    def shape(self) -> tuple[int, ...]:
        """Cycles, frames and features of a frame: ``(N, T, F)``."""
        return self._values.shape

    def _check_made_by(self, request: _Request) -> None:
        """Raise a :class:`StoreError` if the front end makes something else now than what is kept."""
        rows = sorted({0, len(self) - 1})
        kept = np.stack([self[row] for row in rows]).astype("float32")
        with _evaluating(request.features):
            made = request.compute(rows).astype("float32")
        # Devices round differently, by far less than this.
        if made.shape != kept.shape or np.abs(made - kept).mean() > 0.01 * np.abs(kept).mean() + 1e-6:
            raise self._damaged(
                "it holds other features than the front end makes now, though its arguments are the same"
            )

    def _stored(self, row: int) -> np.ndarray:
        return self[row]

    @classmethod
    def _build(cls, request: _Request, folder: Path, progress: bool) -> None:
        count = len(request.names)
        batches = [range(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]
        index = np.zeros(count, dtype=cls.columns)
        bar = tqdm(total=count, desc=f"computing features of {count} cycles", unit="cycle", disable=not progress)
        with bar, _evaluating(request.features):
            computed = map(request.compute, batches)  # each when its turn comes
            first = next(computed)  # tells how large the file will be
            shape = (count, *first.shape[1:])
            with cls._writing(folder, first.itemsize * math.prod(shape)) as unfinished:
                with (unfinished / cls.array[0]).open("wb") as stream:
                    for rows, values in zip(batches, chain([first], computed), strict=True):
                        if values.shape[1:] != shape[1:]:
                            raise ValueError(f"the front end gave {shape[1:]} features, then {values.shape[1:]}")
                        index["crc32"][rows] = [zlib.crc32(row.data) for row in values]
                        stream.write(values.data)
                        bar.update(len(rows))
                    stream.flush()
                    os.fsync(stream.fileno())  # a power cut must not leave a store of the right size full of zeros
                cls._save_index(unfinished, index, {"shape": shape, **request.reading, "spec": dict(request.spec)})


@dataclass(frozen=True)
class _Request:
    """What a store is to hold, and how it is made."""

    waveform: Callable[[int], np.ndarray]
    names: Sequence[str]
    reading: Mapping[str, Any]
    features: Callable[[Tensor], Tensor]
    spec: Mapping[str, Any]

    def check(self) -> None:
        if not len(self.names):
            raise ValueError("there are no cycles to keep features of")
        if (name := _untold(self.spec)) is not None:
            raise ValueError(
                f"features of {name!r} cannot be told from others, as its arguments are not known; make it a "
                f"respiro.component.Transform, or leave the feature cache off"
            )
        if isinstance(self.features, nn.Module) and self.features.state_dict():
            raise ValueError(
                f"{type(self.features).__name__} has parameters or another state, which its arguments do not tell and "
                f"training may change, so its features cannot be kept; leave the feature cache off"
            )

    def key(self) -> str:
        """Return the name of the store."""
        try:
            text = json.dumps([FeatureStore.format, dict(self.reading), dict(self.spec)], sort_keys=True)
        except TypeError as error:
            raise ValueError(f"reading and spec must be plain data, to tell stores apart: {error}") from error
        return hashlib.sha256(text.encode()).hexdigest()

    @torch.inference_mode()
    def compute(self, rows: Sequence[int]) -> np.ndarray:
        """Return the features of some cycles as they are stored: ``(B, T, F)``."""
        buffers = self.features.buffers() if isinstance(self.features, nn.Module) else iter(())
        device = next(buffers, torch.empty(0)).device
        waveforms = torch.from_numpy(np.stack([self.waveform(row) for row in rows])).to(device)
        with torch.autocast(device.type, enabled=False):
            values = self.features(waveforms)
        if values.ndim != 3 or len(values) != len(rows):
            shapes = f"{tuple(values.shape)} of waveforms {tuple(waveforms.shape)}"
            raise ValueError(f"the front end must make features (B, T, F) of waveforms (B, S), it made {shapes}")
        half = values.half().contiguous().cpu()
        fits = half.isfinite().flatten(1).all(1)
        if not fits.all():
            bad = int(fits.int().argmin())
            raise StoreError(f"{self.names[rows[bad]]}: {_unfit(values[bad])}. Or leave the feature cache off.")
        return half.numpy()


def _untold(spec: Any) -> str | None:
    """Return the class of a part, at any depth, whose arguments a description does not hold."""
    if isinstance(spec, Mapping):
        if "class_path" in spec and "init_args" not in spec:
            return str(spec["class_path"])
        spec = list(spec.values())
    parts = spec if isinstance(spec, list | tuple) else []
    return next((name for part in parts if (name := _untold(part)) is not None), None)


def _unfit(values: Tensor) -> str:
    if values.isfinite().all():
        largest = float(values.abs().max())
        limit = torch.finfo(torch.float16).max
        return (
            f"a feature of size {largest:g} is beyond {limit:g}, the largest that the feature cache (float16) holds. "
            f"Scale or normalise the features"
        )
    return "the front end made features that are not finite. Look at the recording, and at the front end's arguments"


@contextmanager
def _evaluating(features: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Switch a module to eval mode; afterwards give every part its own mode back."""
    modes = [(part, part.training) for part in features.modules()] if isinstance(features, nn.Module) else []
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
