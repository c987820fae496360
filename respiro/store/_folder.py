"""What the stores share: a folder that is whole or absent, built by one process while the others wait for it."""

from __future__ import annotations

import json
import shutil
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock
from typing_extensions import Self

from respiro.errors import StoreError

__all__ = ["FolderStore"]

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
