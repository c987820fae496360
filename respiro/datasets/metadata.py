"""Metadata as labels: integer ids for the values of one table column, or for the combinations of several."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from respiro.datasets._tables import listing
from respiro.errors import LabelError

__all__ = ["ADULT", "MetadataLabels", "check_columns", "check_limits", "metadata_labels"]

#: Age in years from which a patient is no child; ``age_group`` columns of tables are made with it.
ADULT = 18.0
_MERGED = "other"


@dataclass(frozen=True, eq=False)
class MetadataLabels:
    """Labels that :func:`metadata_labels` made; ``print`` shows what they count.

    Attributes:
        ids: Label of each row of the table, int64, -1 where unknown, under the table's row labels.
        names: Name of each label, in the order of the ids: the values joined by commas, such as ``"F,<18"``.
        counts: Reference rows of each label, by name.
        unknown: Reference rows without a label.
        merged: Names of the combinations that ``"other"`` stands for.
        columns: The columns that were combined.
        problem: Why the labels are of no use, so that all rows are unknown; empty where they are.
    """

    ids: pd.Series[int]
    names: tuple[str, ...]
    counts: dict[str, int]
    unknown: int
    merged: tuple[str, ...]
    columns: tuple[str, ...]
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        counts = ", ".join(f"{name} ({count})" for name, count in self.counts.items())
        merged = f"; {_MERGED}: {', '.join(self.merged)}" if self.merged else ""
        return f"{len(self.names)} labels from {_joined(self.columns)}: {counts}; unknown ({self.unknown}){merged}"

    def to_dict(self) -> dict[str, Any]:
        """Return all but the ids as plain data, for a protocol record."""
        return {
            "columns": list(self.columns),
            "names": list(self.names),
            "counts": dict(self.counts),
            "unknown": self.unknown,
            "merged": list(self.merged),
            **({"problem": self.problem} if self.problem else {}),
        }


def metadata_labels(
    table: pd.DataFrame,
    columns: str | Sequence[str],
    age_threshold: float = ADULT,
    merge_below: int = 0,
    reference: np.ndarray | pd.Index | Sequence[Any] | None = None,
    strict: bool = True,
) -> MetadataLabels:
    """Give each row an integer label by the values of one column, or by their combination in several.

    A label belongs to a combination that occurs in the table. Ids follow the sorted combinations, so they depend on
    which values occur, not on the order of the rows. A row of which any value is unknown (NaN, ``None``) gets -1.

    Args:
        table: One row a cycle, such as ``dataset.all_cycles``, or any other table.
        columns: Such as ``["sex", "age_group"]``, ``["device"]`` or ``["sex", "class"]``. ``age_group`` is made of the
            column ``age`` (years) and *age_threshold*, with the values ``"<18"`` and ``">=18"``. Only where no age is
            known, a column ``age_group`` is taken as it is.
        age_threshold: Years, positive.
        merge_below: Combinations with fewer reference rows than this share one label, ``"other"``, the last one.
        reference: Row labels of the rows that are counted, such as those of the train side; default all.
        strict: Refuse labels that are of no use. Else all rows of such are unknown, and ``problem`` says why.

    Raises:
        LabelError: If a column is absent or continuous, no reference row is known, or all that are have one label.
        ValueError: If an argument has no meaning for this table.

    Warns:
        UserWarning: If more than half of the reference rows are unknown (and *strict*).

    Source:
        Moummad and Farrugia, "Learning audio features with metadata and contrastive learning", arXiv 2210.16192 (2022):
        sex, age group and class, alone and combined, as labels of contrastive losses.

    Example:
        >>> table = pd.DataFrame({"sex": ["M", "F", "M", None], "age": [70.0, 4.0, 2.5, 30.0]})
        >>> labels = metadata_labels(table, ["sex", "age_group"])
        >>> labels.ids.tolist()
        [2, 0, 1, -1]
        >>> print(labels)
        3 labels from sex and age_group: F,<18 (1), M,<18 (1), M,>=18 (1); unknown (1)
    """
    columns = check_columns(columns)
    check_limits(age_threshold, merge_below)
    counted = _reference_rows(table, reference)
    try:
        labels = _labels(table, columns, age_threshold, merge_below, counted)
    except LabelError as error:
        if strict:
            raise
        nobody = pd.Series(-1, index=table.index, dtype="int64")
        return MetadataLabels(nobody, (), {}, int(counted.sum()), (), columns, problem=str(error))
    if strict and labels.unknown > counted.sum() / 2:
        warnings.warn(
            f"labels from {_joined(columns)} are unknown in {labels.unknown} of {counted.sum()} rows; "
            f"only the other {counted.sum() - labels.unknown} count",
            UserWarning,
            stacklevel=2,
        )
    return labels


def check_columns(columns: str | Sequence[str]) -> tuple[str, ...]:
    """Return the columns as a tuple; raise a ``ValueError`` where there is none, or one stands twice."""
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"columns must name at least one column, and none twice, got {columns!r}")
    return names


def check_limits(age_threshold: float, merge_below: int) -> None:
    """Raise a ``ValueError`` for limits that have no meaning."""
    if not 0 < age_threshold < float("inf"):
        raise ValueError(f"age_threshold must be a positive number of years, got {age_threshold!r}")
    if merge_below < 0:
        raise ValueError(f"merge_below must not be negative, got {merge_below!r}")


def _reference_rows(table: pd.DataFrame, reference: np.ndarray | pd.Index | Sequence[Any] | None) -> np.ndarray:
    """Return which rows of the table are counted: ``(len(table),)`` bool."""
    rows = table.index if reference is None else pd.Index(reference)
    if not len(rows) or pd.api.types.is_bool_dtype(rows.dtype) or not rows.isin(table.index).all():
        raise ValueError(
            f"reference must hold row labels of the table, at least one, got {listing(list(rows), 5) or 'none'}"
        )
    return table.index.isin(rows)


def _labels(
    table: pd.DataFrame, columns: tuple[str, ...], age_threshold: float, merge_below: int, counted: np.ndarray
) -> MetadataLabels:
    ids, names = _combine([_values(table, column, age_threshold) for column in columns])
    ids, names, merged = _merge(ids, names, _count(ids[counted], names) < merge_below)
    counts = _count(ids[counted], names)
    if len(set(names)) < len(names):
        raise LabelError(
            f"two labels from {_joined(columns)} have one name among {listing(names)}; rename the values: no commas, "
            f"one type, none {_MERGED!r}"
        )
    if counts.sum() == 0:
        raise LabelError(f"labels from {_joined(columns)} are unknown in all {counted.sum()} rows; take other columns")
    if (counts > 0).sum() == 1:
        lower = " or a lower merge_below" if merged else ""
        raise LabelError(
            f"labels from {_joined(columns)} have nothing to contrast: all {counts.sum()} rows where they are known "
            f"have {names[counts.argmax()]!r}; take other columns{lower}"
        )
    return MetadataLabels(
        ids=pd.Series(ids, index=table.index),
        names=tuple(names),
        counts=dict(zip(names, counts.tolist(), strict=True)),
        unknown=int(counted.sum() - counts.sum()),
        merged=tuple(merged),
        columns=columns,
    )


def _values(table: pd.DataFrame, column: str, age_threshold: float) -> pd.Series[Any]:
    if column == "age_group" and "age" in table:
        ages = table["age"].astype("float64")
        if ages.notna().any() or "age_group" not in table:
            names = np.where(ages < age_threshold, f"<{age_threshold:g}", f">={age_threshold:g}")
            return pd.Series(names, index=table.index, dtype=object).where(ages.notna())
    if column not in table:
        raise LabelError(f"no column {column!r} to make labels of; the table has {listing(list(table.columns), 50)}")
    if column == "age_group" and age_threshold != ADULT:
        raise LabelError(f"age_threshold {age_threshold:g} needs ages, and the table has age groups only; leave it out")
    # Numbers that are all whole become integers, also where some are missing; a category loses an order of its own.
    values = table[column].astype(object).convert_dtypes()
    if pd.api.types.is_float_dtype(values.dtype):
        way_out = "name 'age_group'" if column == "age" else "bin it first (pandas.cut)"
        raise LabelError(f"column {column!r} is continuous ({values.nunique()} different values); {way_out}")
    return values


def _combine(parts: list[pd.Series[Any]]) -> tuple[np.ndarray, list[str]]:
    """Return the id of each row, -1 where a part is unknown, and the names by id."""
    factors = [pd.factorize(part, sort=True) for part in parts]
    codes = np.stack([code for code, _ in factors], axis=1)
    known = (codes >= 0).all(axis=1)
    found, place = np.unique(codes[known], axis=0, return_inverse=True)
    ids = np.full(len(codes), -1, dtype="int64")
    ids[known] = place.reshape(-1)
    return ids, [",".join(str(values[code]) for code, (_, values) in zip(row, factors, strict=True)) for row in found]


def _merge(ids: np.ndarray, names: list[str], small: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
    """Return ids and names with one common, last id for what is *small*, and the names that it stands for."""
    kept = [name for name, few in zip(names, small, strict=True) if not few]
    merged = [name for name, few in zip(names, small, strict=True) if few]
    renumbered = np.where(small, len(kept), np.cumsum(~small) - 1)
    return np.append(renumbered, -1)[ids], kept + [_MERGED] * bool(merged), merged  # -1 takes the last


def _count(ids: np.ndarray, names: list[str]) -> np.ndarray:
    return np.bincount(ids[ids >= 0], minlength=len(names))


def _joined(columns: tuple[str, ...]) -> str:
    return " and ".join(columns)
