"""What two sides of a split have in common that they should not, and how their metadata differ."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd

from respiro import audio
from respiro.datasets._tables import listing

_SHIFT_COLUMNS = ("device", "location", "sex", "age_group")


@dataclass(frozen=True, eq=False)
class LeakageReport:
    """What :func:`audit_leakage` found; ``print`` shows it as text.

    Attributes:
        shared_patients: Cycles in train and in test of each patient who is on both sides.
        shared_takes: Takes (simultaneous recordings, or visits) with recordings on both sides.
        shared_recordings: Recordings with cycles on both sides.
        same_times: For each patient, test cycles that have the same take, start and end as a train cycle: one breath,
            heard at another place.
        identical_audio: Recordings (train, test) that hold the same samples under two names; ``None`` if not checked.
        shift: One row for each value of ``device``, ``location``, ``sex``, ``age_group``: cycles, their share of the
            side, and the share of them that is abnormal (label above 0), in train and in test. A shift is no leak.
    """

    shared_patients: dict[str, tuple[int, int]]
    shared_takes: tuple[str, ...]
    shared_recordings: tuple[str, ...]
    same_times: dict[str, int]
    identical_audio: tuple[tuple[str, str], ...] | None
    shift: pd.DataFrame

    @property
    def leaks(self) -> bool:
        """Whether anything but the shift was found."""
        found = (self.shared_patients, self.shared_takes, self.shared_recordings, self.same_times, self.identical_audio)
        return any(found)

    def table(self) -> str:
        """Return the report as text."""
        lines = ["train and test share data" if self.leaks else "train and test share nothing that was checked"]
        lines.append(f"patients on both sides: {len(self.shared_patients)}")
        lines += [
            f"  {name}: {train} train, {test} test cycles" for name, (train, test) in self.shared_patients.items()
        ]
        lines.append(f"takes on both sides: {_listed(self.shared_takes)}")
        lines.append(f"recordings on both sides: {_listed(self.shared_recordings)}")
        lines.append(f"test cycles with the times of a train cycle of their take: {sum(self.same_times.values())}")
        lines += [f"  {name}: {count}" for name, count in self.same_times.items()]
        if self.identical_audio is None:
            lines.append("identical audio: not checked, no recordings table was given")
        else:
            lines.append(f"identical audio: {_listed(tuple(' = '.join(pair) for pair in self.identical_audio))}")
        if len(self.shift):
            lines += ["", self.shift.to_string(float_format="{:.1%}".format, na_rep="-")]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data: what JSON can hold, unknown shares as ``None``."""
        shift = self.shift.reset_index().astype(object)
        pairs = self.identical_audio
        return {
            "leaks": self.leaks,
            "shared_patients": {name: list(counts) for name, counts in self.shared_patients.items()},
            "shared_takes": list(self.shared_takes),
            "shared_recordings": list(self.shared_recordings),
            "same_times": dict(self.same_times),
            "identical_audio": None if pairs is None else [list(pair) for pair in pairs],
            "shift": shift.where(shift.notna(), None).to_dict(orient="records"),
        }


def audit_leakage(train: pd.DataFrame, test: pd.DataFrame, recordings: pd.DataFrame | None = None) -> LeakageReport:
    """Compare two sides: shared patients, takes, breaths and sound, and the shift of their metadata.

    Args:
        train: One row a cycle, with ``recording``, ``patient``, ``take``, ``start``, ``end``, ``label``, and any of
            ``device``, ``location``, ``sex``, ``age_group``.
        test: The same of the other side.
        recordings: One row a recording of either side, with ``recording``, ``path``, ``sample_rate``, ``frames``. If
            given, recordings of equal rate and length are read and compared sample by sample (by digest); copies that
            were resampled, cut or scaled are not found.

    Raises:
        ValueError: If a table lacks a column, or *recordings* lacks a recording or names one twice.

    Example:
        >>> cycle = {"recording": ["a"], "patient": ["101"], "take": ["101_1"], "start": 0.5, "end": 2.0, "label": 1}
        >>> report = audit_leakage(pd.DataFrame(cycle), pd.DataFrame(cycle | {"recording": ["b"]}))
        >>> report.leaks, report.shared_patients, report.same_times
        (True, {'101': (1, 1)}, {'101': 1})
    """
    needed = ("recording", "patient", "take", "start", "end", "label")
    require_columns(train, needed, "train")
    require_columns(test, needed, "test")
    in_train, in_test = train["patient"].value_counts(), test["patient"].value_counts()
    return LeakageReport(
        shared_patients={name: (int(in_train[name]), int(in_test[name])) for name in shared_patients(train, test)},
        shared_takes=_shared(train["take"], test["take"]),
        shared_recordings=_shared(train["recording"], test["recording"]),
        same_times=_same_times(train, test),
        identical_audio=None if recordings is None else _identical_audio(train, test, recordings),
        shift=_shift(train, test),
    )


def shared_patients(train: pd.DataFrame, test: pd.DataFrame) -> list[str]:
    """Return the known patients of both tables, sorted."""
    return list(_shared(train["patient"], test["patient"]))


def require_columns(table: pd.DataFrame, columns: Sequence[str], argument: str) -> None:
    """Raise a ValueError that names the columns which *table* lacks."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{argument} must have the columns {', '.join(map(repr, columns))}; it lacks {missing}")


def _shared(train: pd.Series[str], test: pd.Series[str]) -> tuple[str, ...]:
    return tuple(sorted(set(train.dropna()) & set(test.dropna())))


def _same_times(train: pd.DataFrame, test: pd.DataFrame) -> dict[str, int]:
    key = ["take", "start", "end"]
    heard = pd.MultiIndex.from_frame(train[key].dropna())
    known = test.dropna(subset=["take"])
    same = known[pd.MultiIndex.from_frame(known[key]).isin(heard)]
    counts = same["patient"].astype(object).fillna("unknown").value_counts().sort_index()
    return {str(name): int(count) for name, count in counts.items()}


def _identical_audio(train: pd.DataFrame, test: pd.DataFrame, recordings: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    require_columns(recordings, ("recording", "path", "sample_rate", "frames"), "recordings")
    files = recordings.set_index("recording")
    if not files.index.is_unique:
        raise ValueError(f"recordings names {files.index[files.index.duplicated()][0]!r} twice")
    names = [sorted(side["recording"].unique()) for side in (train, test)]
    unknown = [name for side in names for name in side if name not in files.index]
    if unknown:
        raise ValueError(f"recordings lacks {len(unknown)} recordings of the two sides (first: {unknown[0]!r})")
    # Only files of one rate and length can hold the same samples; the others need not be read.
    form = pd.MultiIndex.from_frame(files[["sample_rate", "frames"]])
    forms = [form[files.index.isin(side)] for side in names]
    candidates = files.index[form.isin(forms[0].intersection(forms[1])) & files.index.isin(names[0] + names[1])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pd.DataFrame({"recording": candidates, "digest": [*pool.map(_digest, files.loc[candidates, "path"])]})
    first, second = (digests[digests["recording"].isin(side)] for side in names)
    pairs = first.merge(second, on="digest", suffixes=("_train", "_test"))
    pairs = pairs[pairs["recording_train"] != pairs["recording_test"]]
    return tuple(sorted(zip(pairs["recording_train"], pairs["recording_test"], strict=True)))


def _digest(path: str) -> str:
    samples, sample_rate = audio.read(path)
    return f"{sample_rate} {hashlib.sha256(samples.tobytes()).hexdigest()}"


def _shift(train: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    columns = [column for column in _SHIFT_COLUMNS if column in train.columns and column in test.columns]
    blocks = []
    for column in columns:
        sides = {"train": _side_shares(train, column), "test": _side_shares(test, column)}
        blocks.append(pd.concat(sides, axis=1).sort_index())
    if not blocks:
        return pd.DataFrame()
    shift = pd.concat(blocks, keys=columns, names=["column", "value"])
    shift.columns = shift.columns.map("_".join)
    counted = [column for column in shift.columns if not column.endswith("_abnormal")]
    shift[counted] = shift[counted].fillna(0)
    return shift.astype({"train_cycles": int, "test_cycles": int})


def _side_shares(side: pd.DataFrame, column: str) -> pd.DataFrame:
    values = side[column].astype(object).where(side[column].notna(), "unknown")
    abnormal = (side["label"] > 0).groupby(values.to_numpy())
    cycles = abnormal.size()
    return pd.DataFrame({"cycles": cycles, "share": cycles / len(side), "abnormal": abnormal.mean()})


def _listed(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({listing(names, 5)})" if names else "none"
