"""What can be measured where data sets meet: cycles, classes, bandwidth, and who is on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from respiro.datasets import RespiratoryDataset
from respiro.datasets._tables import listing
from respiro.splits.audit import shared_patients

__all__ = ["FEWEST", "CrossAudit", "SideAudit", "audit_sides", "unmeasured"]

#: Cycles of a class below which its recall is not worth a number: one cycle more or less moves it by 10 points.
FEWEST = 10


@dataclass(frozen=True)
class SideAudit:
    """One side of a :class:`CrossAudit`.

    Attributes:
        cycles: Number of cycles that the label map keeps.
        patients: Number of known patients.
        classes: Cycles of each class.
        unmeasured: Classes with fewer than 10 cycles; empty for the train side.
        left_out: Cycles that the label map leaves out, by their original label.
        sample_rates: Recordings of each native sampling rate (Hz).
        highest: Frequency (Hz) up to which there can be sound: in the recording of the lowest rate, and in that of the
            highest. Half the native rate, or that of the waveforms, or the end of the band, whichever is lowest.
        shared_patients: Who also has cycles on the train side; empty for that side itself.
        floor: ICBHI Score of calling every cycle normal; NaN where it is not defined.
    """

    cycles: int
    patients: int
    classes: dict[str, int]
    unmeasured: tuple[str, ...]
    left_out: dict[str, int]
    sample_rates: dict[int, int]
    highest: tuple[float, float]
    shared_patients: tuple[str, ...]
    floor: float


@dataclass(frozen=True, eq=False)
class CrossAudit:
    """What :meth:`CrossDatasetDataModule.audit` found; ``print`` shows it as text.

    Attributes:
        label_map: Name of the label map.
        sample_rate: Of the waveforms, Hz.
        band: Frequencies (Hz) that are kept of every recording, or ``None`` for all.
        train: The train side, with validation.
        test: Each test set, by name.
    """

    label_map: str
    sample_rate: int
    band: tuple[float, float] | None
    train: SideAudit
    test: dict[str, SideAudit]

    def table(self) -> str:
        """Return the audit as text."""
        band = "no band" if self.band is None else f"band {self.band[0]:g} to {self.band[1]:g} Hz"
        sides = {"train": self.train} | self.test
        rows = [{"side": name} | _row(side) for name, side in sides.items()]
        lines = [f"labels {self.label_map}; waveforms of {self.sample_rate} Hz, {band}", ""]
        lines += [pd.DataFrame(rows).set_index("side").to_string(), ""]
        for name, side in sides.items():
            if side.left_out:
                counts = ", ".join(f"{label} ({count})" for label, count in side.left_out.items())
                lines.append(f"{name}: left out by the label map: {counts}")
            if side.unmeasured:
                classes = ", ".join(f"{label!r} ({side.classes[label]})" for label in side.unmeasured)
                lines.append(f"{name}: too few cycles to measure (fewer than {FEWEST}): {classes}")
            if side.shared_patients:
                lines.append(f"{name}: also in train: {listing(side.shared_patients, 5)}")
            if side.highest != self.train.highest:
                lines.append(
                    f"{name}: sound up to {_range(side.highest)} Hz, in train up to {_range(self.train.highest)} Hz; "
                    f"band=(low, {min(side.highest[0], self.train.highest[0]):g}) makes them alike"
                )
        return "\n".join(lines).rstrip()

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain data: what JSON can hold, an undefined floor as ``None``."""
        return {
            "label_map": self.label_map,
            "sample_rate": self.sample_rate,
            "band": None if self.band is None else list(self.band),
            "train": _plain(self.train),
            "test": {name: _plain(side) for name, side in self.test.items()},
        }


def audit_sides(data: RespiratoryDataset, label_map: str, test_sets: Sequence[str]) -> CrossAudit:
    """Look at the train side and at each test set of a joined data set."""
    train = data.cycles[data.cycles["split"] == "train"]
    few = unmeasured(data, test_sets)
    return CrossAudit(
        label_map=label_map,
        sample_rate=data.sample_rate,
        band=data.band,
        train=_audit(data, "train", (), ()),
        test={
            name: _audit(data, name, tuple(few.get(name, ())), shared_patients(train, _of(data.cycles, name)))
            for name in test_sets
        },
    )


def unmeasured(data: RespiratoryDataset, test_sets: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the cycles of each class that has fewer than 10, for each test set that has such a class."""
    counts = {name: _counts(data, name) for name in test_sets}
    few = {name: {label: n for label, n in found.items() if n < FEWEST} for name, found in counts.items()}
    return {name: labels for name, labels in few.items() if labels}


def _audit(data: RespiratoryDataset, name: str, few: tuple[str, ...], shared: Sequence[str]) -> SideAudit:
    cycles = _of(data.cycles, name)
    # Recordings of which cycles are used; a rate that only others have says nothing about this side.
    rates = cycles.drop_duplicates("recording")["sample_rate"].value_counts().sort_index()
    left_out = _of(data.left_out, name)
    by_label = left_out["event"].value_counts() if "event" in left_out else pd.Series(dtype="int64")
    limits = [data.sample_rate / 2, *(() if data.band is None else data.band[1:])]
    abnormal = cycles["label"] > 0
    return SideAudit(
        cycles=len(cycles),
        patients=int(cycles["patient"].nunique()),
        classes=_counts(data, name),
        unmeasured=few,
        left_out={str(label): int(count) for label, count in by_label.items()},
        sample_rates={int(rate): int(count) for rate, count in rates.items()},  # type: ignore[call-overload]
        highest=(min(rates.index[0] / 2, *limits), min(rates.index[-1] / 2, *limits)),
        shared_patients=tuple(shared),
        # Every normal cycle right and no abnormal one.
        floor=0.5 if abnormal.any() and not abnormal.all() else float("nan"),
    )


def _of(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table[table["split"] == name]


def _counts(data: RespiratoryDataset, name: str) -> dict[str, int]:
    labels = _of(data.cycles, name)["label"]
    return {label: int((labels == number).sum()) for number, label in enumerate(data.classes)}


def _row(side: SideAudit) -> dict[str, Any]:
    return {
        "cycles": side.cycles,
        "patients": side.patients,
        **side.classes,
        "left out": sum(side.left_out.values()),
        "also in train": len(side.shared_patients),
        "native rates (Hz)": ", ".join(map(str, side.sample_rates)),
        "sound up to (Hz)": _range(side.highest),
        "all normal": "-" if side.floor != side.floor else f"{side.floor:.2f}",
    }


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g}" if ends[0] == ends[1] else f"{ends[0]:g} to {ends[1]:g}"


def _plain(side: SideAudit) -> Mapping[str, Any]:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(side).items()}
    rates = {str(rate): count for rate, count in side.sample_rates.items()}
    return lists | {"sample_rates": rates, "floor": None if side.floor != side.floor else side.floor}
