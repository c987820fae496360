"""Several data sets behind one table: train on one, test on another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from respiro.datasets._batch import CODED
from respiro.datasets._tables import listing
from respiro.datasets.base import RespiratoryDataset
from respiro.errors import LabelError
from respiro.store import Cycle, WaveformStore

__all__ = ["JoinedDataset", "Side"]

#: Names that mean something within one data set only.
_NAMES = ("patient", "recording", "take")


class Side(NamedTuple):
    """Cycles of one data set that become rows of a joined one."""

    data: RespiratoryDataset
    name: str  #: of the database; two sides with one name share its patients
    cycles: pd.DataFrame  #: rows of ``data.all_cycles``, their ``split`` renamed to the side of the joined data set


@dataclass(frozen=True)
class JoinedStore:
    """Reads each cycle from the store of its own data set; what a data set asks of a ``WaveformStore``.

    Args:
        stores: One for each part.
        part: Number of the store of each cycle: ``(N,)``.
        position: Of each cycle in that store: ``(N,)``.
    """

    stores: tuple[WaveformStore, ...]
    part: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> Cycle:
        return self.stores[int(self.part[row])][int(self.position[row])]

    @property
    def folder(self) -> Path:
        """A path that is on no disk; its name tells this selection of cycles from others, for the caches on it."""
        digest = hashlib.sha256("".join(store.folder.name for store in self.stores).encode())
        digest.update(self.part.astype("<i8").tobytes() + self.position.astype("<i8").tobytes())
        return Path(f"joined-{digest.hexdigest()}")


class JoinedDataset(RespiratoryDataset):
    """Sides of several data sets, which share classes and reading, as one data set.

    Patients, recordings and takes have the name of their database before them (``"ICBHI 156"``), so two databases never
    share one, and one database on two sides does. Waveforms come from the stores of the parts, each with its own
    rounding of times; the rounding of the first side is the one in :attr:`reading`, as it is the side that trains.

    Args:
        sides: The first of them trains. The tables get a column ``dataset``, the name of the database.
        cache_dir: Where features are kept; the parts say where their waveforms are.

    Attributes:
        partial: Whether recordings of a part are missing.

    Raises:
        LabelError: If the parts have other classes than the first, or two of them hold one recording.

    Example:
        >>> import tempfile
        >>> from respiro.datasets import ICBHI, write_synthetic_icbhi
        >>> data = ICBHI(write_synthetic_icbhi(tempfile.mkdtemp() + "/icbhi", num_patients=8), split="all")
        >>> joined = JoinedDataset([Side(data, "ICBHI", data.all_cycles)])
        >>> len(joined) == len(data), joined.cycles["patient"].iloc[0]
        (True, 'ICBHI 101')
    """

    def __init__(self, sides: Sequence[Side], cache_dir: str | Path | None = None) -> None:
        first = sides[0].data
        for side in sides:
            if side.data.classes != first.classes:
                raise LabelError(
                    f"{side.name} has the classes {list(side.data.classes)}, {sides[0].name} has "
                    f"{list(first.classes)}; only data sets with the same classes can be joined"
                )
        self.parts = list(dict.fromkeys(side.data for side in sides))  # one that trains and tests stands once
        self._part = np.concatenate([np.full(len(side.cycles), self.parts.index(side.data)) for side in sides])
        self._position = np.concatenate(
            [side.data.all_cycles.index.get_indexer(side.cycles.index) for side in sides]
        ).astype("int64")
        cycles = pd.concat([_named(side.cycles, side.name) for side in sides], ignore_index=True)
        super().__init__(
            _recordings(sides),
            cycles,
            classes=first.classes,
            vocabularies={column: _vocabulary(sides, column) for column in CODED},
            splits=tuple(cycles["split"].unique()),
            **{name: value for name, value in first.reading.items() if name != "rounding"},
            cache_dir=cache_dir,
            any_encoding=True,  # each part has looked at its own
        )
        self.any_encoding = any(part.any_encoding for part in self.parts)
        self.partial = any(map(_is_partial, self.parts))
        names = {id(side.data): side.name for side in sides}
        self._names = [names[id(part)] for part in self.parts]

    @property
    def reading(self) -> dict[str, Any]:
        """How recordings become waveforms, as plain data; the rounding of times is that of the first side."""
        return super().reading | {"rounding": self.parts[0].rounding}

    @property
    def origin(self) -> dict[str, Any]:
        """Origin and digest of each part, as plain data."""
        parts = [
            {"dataset": name, "partial": _is_partial(part), **part.origin, "data_digest": part.digest}
            for name, part in zip(self._names, self.parts, strict=True)
        ]
        return {"parts": parts}

    @cached_property
    def store(self) -> Any:
        """The cycles in the stores of the parts, which are built at the first use."""
        return JoinedStore(tuple(part.store for part in self.parts), self._part, self._position)


def _is_partial(data: RespiratoryDataset) -> bool:
    return bool(getattr(data, "partial", False))


def _named(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a table with *name* before the names in it, and as its data set."""
    columns = {
        column: table[column].astype(object).map(f"{name} {{}}".format, na_action="ignore")
        for column in _NAMES
        if column in table
    }
    return table.assign(**columns, dataset=name)


def _recordings(sides: Sequence[Side]) -> pd.DataFrame:
    """Return the recordings that have cycles, with the split of these."""
    tables = []
    for side in sides:
        split = side.cycles.drop_duplicates("recording").set_index("recording")["split"]
        table = side.data.all_recordings
        table = table[table["recording"].isin(split.index)]
        tables.append(_named(table.assign(split=table["recording"].map(split)), side.name))
    recordings = pd.concat(tables, ignore_index=True)
    twice = recordings.loc[recordings["recording"].duplicated(), "recording"]
    if len(twice):
        raise LabelError(
            f"{len(twice)} recordings stand on two sides: {listing(twice.tolist(), 5)}; give each database one root, "
            f"and no side twice"
        )
    return recordings


def _vocabulary(sides: Sequence[Side], column: str) -> tuple[str, ...]:
    """Return the values of a column in all parts, in their order."""
    values = [
        f"{side.name} {value}" if column in _NAMES else value
        for side in sides
        for value in side.data.vocabularies[column]
    ]
    return tuple(dict.fromkeys(values))
