"""The feature cache: what a front end makes of every cycle of a data set, computed once, in one memory-mapped file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from respiro.errors import StoreError
from respiro.store._folder import ComputedStore, Request

__all__ = ["FeatureStore"]

_BATCH = 32  # waveforms at a time, which bounds the memory of the build


class FeatureStore(ComputedStore):
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
    place = "features"

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
        if not len(names):
            raise ValueError("there are no cycles to keep features of")
        _check_told(features, spec)
        return cls._open(Request(waveform, names, reading, features, spec), cache_dir, progress)

    @property
    def shape(self) -> tuple[int, ...]:
        """Cycles, frames and features of a frame: ``(N, T, F)``."""
        return self._values.shape

    def _check_made_by(self, request: Request) -> None:
        rows = sorted({0, len(self) - 1})
        kept = np.stack([self[row] for row in rows]).astype("float32")
        with _evaluating(request.compute):
            made = _computed(request, rows).astype("float32")
        # Devices round differently, by far less than this.
        if made.shape != kept.shape or np.abs(made - kept).mean() > 0.01 * np.abs(kept).mean() + 1e-6:
            raise self._damaged(
                "it holds other features than the front end makes now, though its arguments are the same"
            )

    @classmethod
    def _build(cls, request: Request, folder: Path, progress: bool) -> None:
        count = len(request.names)
        bar = tqdm(total=count, desc=f"computing features of {count} cycles", unit="cycle", disable=not progress)
        with bar, _evaluating(request.compute):
            batches = _batches(request, bar)
            first = next(batches)  # tells how large the file will be
            shape = (count, *first.shape[1:])
            with cls._writing(folder, first.itemsize * math.prod(shape)) as unfinished:
                cls._write(unfinished, request, chain([first], batches), shape=shape)


def _batches(request: Request, bar: tqdm[Any]) -> Iterator[np.ndarray]:
    """Compute the features of all cycles, ``(B, T, F)`` at a time, each batch when its turn comes."""
    count = len(request.names)
    shape = None
    for start in range(0, count, _BATCH):
        values = _computed(request, range(start, min(start + _BATCH, count)))
        shape = shape or values.shape[1:]
        if values.shape[1:] != shape:
            raise ValueError(f"the front end gave {shape} features, then {values.shape[1:]}")
        yield values
        bar.update(len(values))


@torch.inference_mode()
def _computed(request: Request, rows: Sequence[int]) -> np.ndarray:
    """Return the features of some cycles as they are stored: ``(B, T, F)``."""
    front_end = request.compute
    buffers = front_end.buffers() if isinstance(front_end, nn.Module) else iter(())
    device = next(buffers, torch.empty(0)).device
    waveforms = torch.from_numpy(np.stack([request.samples(row) for row in rows])).to(device)
    with torch.autocast(device.type, enabled=False):
        values = front_end(waveforms)
    if values.ndim != 3 or len(values) != len(rows):
        shapes = f"{tuple(values.shape)} of waveforms {tuple(waveforms.shape)}"
        raise ValueError(f"the front end must make features (B, T, F) of waveforms (B, S), it made {shapes}")
    half = values.half().contiguous().cpu()
    fits = half.isfinite().flatten(1).all(1)
    if not fits.all():
        bad = int(fits.int().argmin())
        raise StoreError(f"{request.names[rows[bad]]}: {_unfit(values[bad])}. Or leave the feature cache off.")
    return half.numpy()


def _check_told(features: Callable[[Tensor], Tensor], spec: Mapping[str, Any]) -> None:
    """Raise a :class:`ValueError` if *spec* does not tell all that shapes the features."""
    if (name := _untold(spec)) is not None:
        raise ValueError(
            f"features of {name!r} cannot be told from others, as its arguments are not known; make it a "
            f"respiro.component.Transform, or leave the feature cache off"
        )
    if isinstance(features, nn.Module) and features.state_dict():
        raise ValueError(
            f"{type(features).__name__} has parameters or another state, which its arguments do not tell and "
            f"training may change, so its features cannot be kept; leave the feature cache off"
        )


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
