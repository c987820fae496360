"""What the stores share: a folder that is whole or absent, built by one process while the others wait for it.

The feature and the quality cache share more: their values are computed from each cycle, by a function of the caller.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from typing_extensions import Self

from respiro.download import cache_folder
from respiro.errors import StoreError

__all__ = ["ComputedStore", "FolderStore", "Request", "synced", "thread_pool"]

_WAY_OUT = "Set the environment variable RESPIRO_CACHE, or pass cache_dir, to name another folder."


class FolderStore:
    """One array on disk, read through a memory map, beside ``index.npy`` (one row a cycle) and ``meta.json``.

    A pickled store carries its folder only and is opened anew where it is unpickled, so all workers share the pages of
    one file.

    Args:
        folder: A finished store.

    Raises:
        StoreError: If the folder is not a whole store of this version.
    """

    #: What messages call it.
    what: ClassVar[str]
    #: To be raised when the content or the form of the files changes.
    format: ClassVar[int]
    #: Name and type of the array.
    array: ClassVar[tuple[str, str]]
    #: Columns of the index, one of them the checksum ``crc32``.
    columns: ClassVar[np.dtype[Any]]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._meta, self._index, self._values = self._load()

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.folder,)

    @abstractmethod
    def _stored(self, row: int) -> np.ndarray:
        """Return what the checksum of a cycle is taken over."""

    def verify(self) -> None:
        """Compare every cycle with its checksum.

        Raises:
            StoreError: If a cycle differs.
        """
        for row, expected in enumerate(self._index["crc32"]):
            if zlib.crc32(self._stored(row).data) != expected:
                raise self._damaged(f"cycle {row} does not match its checksum")

    @classmethod
    def _ensure(cls, folder: Path, build: Callable[[], None]) -> None:
        """Call *build* if *folder* is not there, and no other process builds it while this one waits."""
        try:
            if folder.exists():
                return
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    build()
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"the {cls.what} cannot be written to {folder.parent}: {error}. {_WAY_OUT}") from error

    @classmethod
    @contextmanager
    def _writing(cls, folder: Path, size: int) -> Iterator[Path]:
        """Give a folder beside *folder* to write *size* bytes to, and the name *folder* to it when it is whole."""
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a builder that was killed: a living one holds the lock
        free = shutil.disk_usage(folder.parent).free
        room = f"the {cls.what} in {folder.parent} needs {size:,} bytes, {free:,} are free"
        if free < size:
            raise StoreError(f"{room}. Make room, or go elsewhere. {_WAY_OUT}")
        try:
            partial.mkdir()
            yield partial
            partial.rename(folder)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{room}, and writing failed: {error}. {_WAY_OUT}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # nothing is there any more if all went well

    @classmethod
    def _save_index(cls, partial: Path, index: np.ndarray, settings: Mapping[str, Any]) -> None:
        np.save(partial / "index.npy", index)
        meta = {"format": cls.format, **settings, "index_crc32": zlib.crc32(index.tobytes())}
        (partial / "meta.json").write_text(json.dumps(meta))

    def _load(self) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Return description, index and array of a finished store."""
        name, dtype = self.array
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            index = np.load(self.folder / "index.npy")
            values = np.asarray(np.memmap(self.folder / name, dtype=dtype, mode="r"))
        except FileNotFoundError as error:
            raise self._damaged(f"{Path(error.filename).name} is missing") from error
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(f"{error}") from error
        version = meta.get("format") if isinstance(meta, dict) else None
        if version != self.format:
            raise self._damaged(f"it has format {version!r}, this version of respiro reads {self.format}")
        if index.dtype != self.columns or zlib.crc32(index.tobytes()) != meta.get("index_crc32"):
            raise self._damaged("index.npy does not match its checksum")
        return meta, index, values

    def _check_size(self, expected: int) -> None:
        name = self.array[0]
        if len(self._values) != expected:
            raise self._damaged(f"{name} has {len(self._values)} {Path(name).stem} instead of {expected}")

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"the {self.what} {self.folder} cannot be used: {why}. Delete that folder; it is rebuilt at the next start."
        )


@dataclass(frozen=True)
class Request:
    """What a store is to hold, and how it is made."""

    samples: Callable[[int], np.ndarray]  #: of cycle 0, 1, ...: (n,) float32
    names: Sequence[str]  #: what messages call each cycle
    reading: Mapping[str, Any]  #: everything that shapes the samples, as plain data
    compute: Callable[[Tensor], Tensor]  #: (B, n) to the values of each cycle
    spec: Mapping[str, Any]  #: everything that shapes the values, as plain data


class ComputedStore(FolderStore):
    """One array of values a cycle, all of one shape, computed once from the samples of the cycle."""

    columns = np.dtype([("crc32", "<u4")])
    #: Where it lies in the folder of all caches.
    place: ClassVar[str]

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[row]  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._values)

    def _stored(self, row: int) -> np.ndarray:
        return self[row]

    @classmethod
    @abstractmethod
    def _build(cls, request: Request, folder: Path, progress: bool) -> None:
        """Compute all values and write the store."""

    @abstractmethod
    def _check_made_by(self, request: Request) -> None:
        """Raise a :class:`StoreError` if the first or last cycle has other values now than what is kept."""

    @classmethod
    def _open(cls, request: Request, cache_dir: str | Path | None, progress: bool) -> Self:
        """Build the store if it is not there, else check it against *request*, and return it."""
        folder = cache_folder(cache_dir) / cls.place / cls._key(request)
        found = folder.exists()
        cls._ensure(folder, partial(cls._build, request, folder, progress))
        store = cls(folder)
        if found:
            store._check_made_by(request)
        return store

    @classmethod
    def _key(cls, request: Request) -> str:
        """Return the name of the store."""
        try:
            text = json.dumps([cls.format, dict(request.reading), dict(request.spec)], sort_keys=True)
        except TypeError as error:
            raise ValueError(f"reading and spec must be plain data, to tell stores apart: {error}") from error
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def _write(cls, unfinished: Path, request: Request, batches: Iterable[np.ndarray], **settings: Any) -> None:
        """Write the values of all cycles, ``(B, ...)`` at a time, their checksums and the description."""
        checksums: list[int] = []
        with synced(unfinished / cls.array[0]) as stream:
            for values in batches:
                checksums += [zlib.crc32(row.data) for row in values]
                stream.write(values.data)
        index = np.array(checksums, dtype="<u4").view(cls.columns)
        cls._save_index(unfinished, index, {**settings, **request.reading, "spec": dict(request.spec)})


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, and see to it that what was written is on the disk."""
    with path.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())  # a power cut must not leave a store of the right size full of zeros


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as there are cores, each of which uses torch with one thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))  # each would start as many again
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # nothing is left to do, unless one has failed
        torch.set_num_threads(torch_threads)  # the caller kept its number; this is for threads still to be started
