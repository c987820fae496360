"""One tolerant reader for the small text tables of data sets, and what several data sets do with their tables."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import pandas as pd

from respiro.errors import MetadataError

Value = TypeVar("Value")
_UNKNOWN = frozenset({"", "NA", "N/A", "nan", "NaN"})
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
#: How to go on after an error in a file of a data set.
WAY_OUT = "Correct the file, or fetch the original again."


class Row(NamedTuple):
    """One line of a table, and where it stands."""

    path: Path
    line: int
    fields: list[str]
    text: str

    def fail(self, problem: str) -> NoReturn:
        """Raise :class:`MetadataError` with file, line and text."""
        raise MetadataError(f"{self.path}, line {self.line}: {problem}, in {self.text[:200]!r}. {WAY_OUT}")

    def number(self, position: int) -> float | None:
        """Return a field as a finite number, ``None`` where it is unknown."""
        field = self.fields[position]
        if field in _UNKNOWN:
            return None
        try:
            value = float(field)
        except ValueError:
            self.fail(f"{field!r} is not a number")
        if not abs(value) < float("inf"):
            self.fail(f"{field!r} is not a finite number")
        return value

    def choice(self, position: int, allowed: Collection[str], what: str) -> str:
        """Return a field that has to be one of *allowed*."""
        field = self.fields[position]
        if field not in allowed:
            self.fail(f"unknown {what} {field!r} (known: {', '.join(allowed)})")
        return field

    def unknown(self, position: int) -> bool:
        """Whether a field says that its value is unknown."""
        return self.fields[position] in _UNKNOWN


def read_rows(path: Path, key: re.Pattern[str], widths: Collection[int], values: Collection[str] = ()) -> list[Row]:
    """Read a table separated by commas, tabs or blanks, as side files circulate.

    UTF-8 with or without byte-order mark, any line ends, quoted fields, blank lines and one header line are fine.

    Args:
        path: The file.
        key: What the first field of every line must match.
        widths: Allowed numbers of fields.
        values: Words that occur in lines of data only. With them, numbers and ``NA`` a first line whose key is damaged
            is told from a header, which would be passed over.

    Raises:
        MetadataError: If a line is anything else; names file, line and text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MetadataError(f"{path} is not UTF-8 text ({error}); fetch the file again") from None
    rows: list[Row] = []
    header_seen = False
    for line, content in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if not content.strip():
            continue
        row = Row(path, line, _fields(content), content)
        if key.fullmatch(row.fields[0]):
            if len(row.fields) not in widths:
                row.fail(f"expected {' or '.join(map(str, widths))} fields, found {len(row.fields)}")
            rows.append(row)
        # A header starts with a letter, which a damaged number or a conflict marker does not, and has only names.
        elif rows or header_seen or not row.fields[0][:1].isalpha() or _has_value(row.fields[1:], values):
            row.fail(f"cannot make sense of the first field {row.fields[0][:60]!r}")
        else:
            header_seen = True
    if not rows:
        raise MetadataError(f"{path} has no line to read; fetch the file again")
    return rows


def _has_value(fields: list[str], values: Collection[str]) -> bool:
    return any(field in values or field in _UNKNOWN - {""} or _NUMBER.fullmatch(field) for field in fields)


def _fields(line: str) -> list[str]:
    """Split at commas, else at tabs, else at blanks: empty fields survive only between commas or tabs."""
    separator = next((mark for mark in ",\t" if mark in line), None)
    return [field.strip().strip("'\"") for field in line.strip(" ").split(separator)]


def unique(entries: Iterable[tuple[str, Value, Row]]) -> dict[str, Value]:
    """Return key to value; a key may stand twice with one value (one warning a file), but not with two.

    Raises:
        MetadataError: If a key stands twice with different values; names both places.
    """
    values: dict[str, tuple[Value, Row]] = {}
    repeated: dict[Path, list[Row]] = {}
    for key, value, row in entries:
        known, first = values.setdefault(key, (value, row))
        if known != value:
            row.fail(f"{key} stands already in {first.path}, line {first.line}, with another value ({first.text!r})")
        if first is not row and first.path == row.path:
            repeated.setdefault(row.path, []).append(row)
    for path, rows in repeated.items():
        warnings.warn(
            f"{path}: {len(rows)} entries stand twice with the same value and count once "
            f"(first: line {rows[0].line}, {rows[0].text!r})",
            UserWarning,
            stacklevel=2,
        )
    return {key: value for key, (value, _) in values.items()}


def listing(names: Sequence[object], limit: int = 20) -> str:
    """Return the names in one line, cut after *limit* of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def mark_clean(recordings: pd.DataFrame, test_splits: Collection[str] = ("test",)) -> pd.DataFrame:
    """Return a copy whose train rows of patients that also stand in test have split ``"left-out"``.

    Test stays untouched, so that a score on it stands beside published ones.

    Args:
        recordings: Table with columns ``patient`` and ``split``; a table of cycles works as well.
        test_splits: Values of ``split`` that count as test.

    Example:
        >>> table = pd.DataFrame({"patient": ["101", "101", "102"], "split": ["train", "test", "train"]})
        >>> mark_clean(table)["split"].tolist()
        ['left-out', 'test', 'train']
    """
    tested = recordings.loc[recordings["split"].isin(list(test_splits)), "patient"].dropna()
    leaky = (recordings["split"] == "train") & recordings["patient"].isin(tested)
    return recordings.assign(split=recordings["split"].mask(leaky, "left-out"))
