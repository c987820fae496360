"""How sure a score is: bootstrap over patients, and the paired comparison of two models.

Cycles of one patient resemble each other, so patients are resampled, not cycles. All draws are made at once: each
patient has a confusion matrix of their own, and a draw is a weighted sum of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pandas as pd

from respiro.errors import LabelError

__all__ = [
    "Interval",
    "PairedComparison",
    "bootstrap_by_patient",
    "compare_paired",
    "icbhi_score",
    "patient_or_recording",
]

Counts = npt.NDArray[np.int64]
Values = Mapping[str, float]


class Interval(NamedTuple):
    """A value on all cycles, and its percentile interval; NaN bounds where none can be given."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """Difference of two models on the same cycles, first minus second.

    Attributes:
        difference: Mean over the seeds.
        low: Lower end of the interval of *difference* over patients; NaN where none can be given.
        high: Upper end.
        by_seed: Difference of each seed.
        t: Paired t statistic over the seeds; NaN with one seed, or where all differences are equal.
        p_value: Two-sided, of *t* with ``len(by_seed) - 1`` degrees of freedom.
    """

    difference: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    t: float
    p_value: float


def icbhi_score(confmat: Counts) -> float:
    """Return the ICBHI Score of counts ``(C, C)`` by true and predicted class, class 0 normal; NaN where undefined."""
    normal, abnormal = confmat[0].sum(), confmat[1:].sum()
    if normal == 0 or abnormal == 0:
        return math.nan
    return float(confmat[0, 0] / normal + confmat.diagonal()[1:].sum() / abnormal) / 2


@overload
def bootstrap_by_patient(
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    patients: Any,
    statistic: Callable[[Counts], float] = ...,
    *,
    num_classes: int | None = ...,
    num_draws: int = ...,
    level: float = ...,
    seed: int = ...,
) -> Interval: ...


@overload
def bootstrap_by_patient(
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    patients: Any,
    statistic: Callable[[Counts], Values],
    *,
    num_classes: int | None = ...,
    num_draws: int = ...,
    level: float = ...,
    seed: int = ...,
) -> dict[str, Interval]: ...


def bootstrap_by_patient(
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    patients: Any,
    statistic: Callable[[Counts], float] | Callable[[Counts], Values] = icbhi_score,
    *,
    num_classes: int | None = None,
    num_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | dict[str, Interval]:
    """Return a percentile interval for any value of the confusion matrix, resampling patients with replacement.

    The percentile interval is that of Efron and Tibshirani (An Introduction to the Bootstrap, 1993), with patients as
    the units that are drawn.
    Rates are pooled anew in each draw. Draws in which the value is undefined (no abnormal cycle, say) are left out.
    A single patient says nothing about others: the bounds are then NaN.

    Args:
        labels: True labels.
        predictions: Predicted labels.
        patients: Patient of each cycle. Cycles whose patient is missing (``None``, NaN, or a negative code) each
            count as a patient of their own; where the recording is known, give that instead, as cycles of one
            recording are alike: ``table["patient"].fillna(table["recording"])``.
        statistic: From counts ``(C, C)`` by true and predicted class to a number, or to several by name.
        num_classes: C; by default the largest label or prediction + 1.
        num_draws: Number of resamplings.
        level: Of the interval, in (0, 1).
        seed: Of the draws.

    Shape:
        labels, predictions, patients ``(N,)``.

    Returns:
        An :class:`Interval`, or one for each name that *statistic* gives.

    Raises:
        ValueError: If the lengths differ, or an argument has no meaning.
        LabelError: If a label or prediction is negative, or not below *num_classes*.

    Example:
        >>> bootstrap_by_patient([0, 1, 0, 1], [0, 1, 0, 0], ["a", "a", "b", "b"])
        Interval(value=0.75, low=0.5, high=1.0)
    """
    _check(num_draws, level)
    table = _confusion_by_patient(labels, predictions, patients, num_classes)
    whole = statistic(table.sum(0))
    drawn = [statistic(confmat) for confmat in _draws(table, num_draws, seed)]
    if not isinstance(whole, Mapping):
        return Interval(float(whole), *_percentiles(drawn, len(table), level))
    return {
        name: Interval(float(value), *_percentiles([draw[name] for draw in drawn], len(table), level))  # type: ignore[index]
        for name, value in whole.items()
    }


def compare_paired(
    a: pd.DataFrame | Sequence[pd.DataFrame],
    b: pd.DataFrame | Sequence[pd.DataFrame],
    statistic: Callable[[Counts], float] = icbhi_score,
    *,
    num_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedComparison:
    """Compare two models on the same cycles: paired bootstrap over patients, and a paired t test over seeds.

    The interval is that of :func:`bootstrap_by_patient` (Efron and Tibshirani, 1993), the test Student's.
    Every draw takes the same patients for both models and all seeds. The t test asks whether another seed would give
    the same sign, the interval whether other patients would.

    Args:
        a: Predictions of the first model (``Evaluation.predictions``, or ``predictions.csv`` read back), or one table
            for each seed. Columns ``recording``, ``cycle``, ``label``, ``prediction``, ``patient`` (where it is
            missing, the recording stands for it).
        b: Predictions of the second model; as many tables, the same seeds in the same order.
        statistic: From counts ``(C, C)`` by true and predicted class to a number; the ICBHI Score by default.
        num_draws: Number of resamplings.
        level: Of the interval, in (0, 1).
        seed: Of the draws.

    Raises:
        ValueError: If the tables are not of the same cycles, or *a* and *b* have different numbers of seeds.
        LabelError: If the tables disagree about a true label.
    """
    _check(num_draws, level)
    first = [a] if isinstance(a, pd.DataFrame) else list(a)
    second = [b] if isinstance(b, pd.DataFrame) else list(b)
    if len(first) != len(second) or not first:
        raise ValueError(f"a and b must have the same seeds, at least one; got {len(first)} and {len(second)} tables")
    tables = _aligned(first + second)
    size = 1 + max(int(table[["label", "prediction"]].to_numpy().max()) for table in tables)
    patients = patient_or_recording(first[0])
    counts = [_confusion_by_patient(table["label"], table["prediction"], patients, size) for table in tables]

    def by_seed(confmats: Sequence[Counts]) -> list[float]:
        values = [float(statistic(confmat)) for confmat in confmats]
        return [x - y for x, y in zip(values[: len(first)], values[len(first) :], strict=True)]

    differences = by_seed([table.sum(0) for table in counts])
    # The same seed draws the same patients for every table.
    draws = zip(*(_draws(table, num_draws, seed) for table in counts), strict=True)
    drawn = [float(np.mean(by_seed(confmats))) for confmats in draws]
    low, high = _percentiles(drawn, len(counts[0]), level)
    t = _paired_t(differences)
    p_value = _two_sided_p(t, len(differences) - 1)
    return PairedComparison(float(np.mean(differences)), low, high, tuple(differences), t, p_value)


def patient_or_recording(predictions: pd.DataFrame) -> pd.Series[Any]:
    """Return the patient of each cycle; where it is missing, the recording, if the table has that column."""
    patient = predictions["patient"].astype(object)
    return patient.fillna(predictions["recording"]) if "recording" in predictions else patient


def _check(num_draws: int, level: float) -> None:
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")


def _confusion_by_patient(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, patients: Any, num_classes: int | None
) -> Counts:
    """Return the confusion matrix of each patient: ``(P, C, C)``."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    codes = _patient_codes(patients)
    if not labels.shape == predictions.shape == codes.shape or labels.ndim != 1 or not len(labels):
        shapes = f"{labels.shape}, {predictions.shape} and {codes.shape}"
        raise ValueError(f"labels, predictions and patients must be of one length, at least 1; got {shapes}")
    size = num_classes or 1 + int(max(labels.max(), predictions.max()))
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= size:
            raise LabelError(f"{name} must lie in 0 to {size - 1}, got {values.min()} to {values.max()}")
    num_patients = int(codes.max()) + 1
    cells = (codes * size + labels) * size + predictions
    return np.bincount(cells, minlength=num_patients * size * size).reshape(num_patients, size, size)


def _patient_codes(patients: Any) -> Counts:
    values = pd.Series(np.asarray(patients))
    if pd.api.types.is_numeric_dtype(values):
        values = values.mask(values < 0)
    codes, known = pd.factorize(values, sort=True)  # sorted: the draws must not depend on the order of the rows
    missing = codes < 0
    codes[missing] = len(known) + np.arange(missing.sum())
    return codes


def _draws(table: Counts, num_draws: int, seed: int) -> Iterator[Counts]:
    """Return the confusion matrices of *num_draws* resamplings of the patients."""
    num_patients, size, _ = table.shape
    times = np.random.default_rng(seed).multinomial(num_patients, np.full(num_patients, 1 / num_patients), num_draws)
    return iter((times @ table.reshape(num_patients, -1)).reshape(num_draws, size, size))


def _percentiles(values: Sequence[Any], num_patients: int, level: float) -> tuple[float, float]:
    defined = np.asarray(values, dtype=float)
    defined = defined[~np.isnan(defined)]
    if num_patients < 2 or not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _aligned(tables: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Bring prediction tables into the order of the first."""
    keyed = [table.set_index(["recording", "cycle"]) for table in tables]
    for number, table in enumerate(keyed):
        if not table.index.is_unique or len(table) != len(keyed[0]) or not table.index.isin(keyed[0].index).all():
            raise ValueError(f"table {number} is not of the same cycles as table 0 (columns recording, cycle)")
    aligned = [table.loc[keyed[0].index] for table in keyed]
    for number, table in enumerate(aligned):
        if (table["label"] != aligned[0]["label"]).any():
            raise LabelError(f"tables 0 and {number} disagree about true labels; were they made with one label map?")
    return aligned


def _paired_t(differences: Sequence[float]) -> float:
    if len(differences) < 2:
        return math.nan
    spread = float(np.std(differences, ddof=1))
    return float(np.mean(differences)) / (spread / math.sqrt(len(differences))) if spread > 0 else math.nan


def _two_sided_p(t: float, degrees: int) -> float:
    """Student's t for whole degrees of freedom, in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if math.isnan(t):
        return math.nan
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(odd, degrees - 1, 2):  # powers of the cosine: 1, 3, 5 ... or 0, 2, 4 ...
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)
