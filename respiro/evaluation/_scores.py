"""Numbers read from labels, predictions and probabilities; all in [0, 1], NaN where undefined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from respiro.evaluation.statistics import Interval, bootstrap_by_patient, patient_or_recording
from respiro.metrics._counts import rates_for

__all__ = [
    "calibration",
    "calibration_error",
    "class_scores",
    "confusion",
    "floor_scores",
    "group_scores",
    "intervals",
    "overall_scores",
    "set_scores",
]

Counts = npt.NDArray[np.int64]

#: What is shown of a part of the data, by scoring rule.
_SHOWN = {
    "icbhi": ("sensitivity", "specificity", "score"),
    "sprsound": ("sensitivity", "specificity", "average_score", "harmonic_score", "score"),
}


def confusion(predictions: pd.DataFrame, num_classes: int) -> Counts:
    """Return counts by true (rows) and predicted class of a table with ``label`` and ``prediction``."""
    cells = predictions["label"].to_numpy("int64") * num_classes + predictions["prediction"].to_numpy("int64")
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confmat: Counts, classes: Sequence[str]) -> pd.DataFrame:
    """Return recall, precision, F1 and support (cycles) of each class."""
    hits, support, predicted = confmat.diagonal(), confmat.sum(1), confmat.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN we want
        return pd.DataFrame(
            {
                "class": list(classes),
                "recall": hits / support,
                "precision": hits / predicted,
                "f1": 2 * hits / (support + predicted),
                "support": support,
            }
        )


def overall_scores(confmat: Counts, scoring: str, classes: Sequence[str]) -> dict[str, float]:
    """Return the rates and scores of the scoring rule, macro-F1, balanced accuracy and accuracy.

    The macro means are over the classes that have cycles; predictions of others count as misses.
    """
    rates = rates_for(torch.from_numpy(confmat).double(), scoring, classes)
    hits, support, predicted = confmat.diagonal(), confmat.sum(1), confmat.sum(0)
    present = support > 0
    if not present.any():
        return {name: float("nan") for name in (*rates, "macro_f1", "balanced_accuracy", "accuracy")}
    return {name: float(value) for name, value in rates.items()} | {
        "macro_f1": float((2 * hits[present] / (support + predicted)[present]).mean()),
        "balanced_accuracy": float((hits[present] / support[present]).mean()),
        "accuracy": float(hits.sum() / support.sum()),
    }


def floor_scores(predictions: pd.DataFrame, scoring: str, classes: Sequence[str]) -> dict[str, float]:
    """Return the scores of calling every cycle normal."""
    return overall_scores(confusion(predictions.assign(prediction=0), len(classes)), scoring, classes)


def intervals(predictions: pd.DataFrame, scoring: str, classes: Sequence[str]) -> dict[str, Interval]:
    """Return the 95 % interval over patients of each of :func:`overall_scores`."""
    return bootstrap_by_patient(
        predictions["label"],
        predictions["prediction"],
        patient_or_recording(predictions),
        lambda confmat: overall_scores(confmat, scoring, classes),
        num_classes=len(classes),
    )


def group_scores(
    predictions: pd.DataFrame, columns: Sequence[str], scoring: str, classes: Sequence[str]
) -> pd.DataFrame:
    """Return cycles, patients, rates and scores of each value of each column."""
    rows = []
    for column in columns:
        for value, part in _parts(predictions, column):
            scores = overall_scores(confusion(part, len(classes)), scoring, classes)
            rows.append(
                {"group": column, "value": value} | _size(part) | {name: scores[name] for name in _SHOWN[scoring]}
            )
    return pd.DataFrame(rows, columns=["group", "value", "cycles", "patients", *_SHOWN[scoring]])


def set_scores(
    predictions: pd.DataFrame,
    scoring: str,
    classes: Sequence[str],
    whole: Mapping[str, Interval],
    unmeasured: Mapping[str, Sequence[str]],
    shared: Sequence[str] = (),
) -> pd.DataFrame:
    """Return size, rates, scores, interval and floors of each test set if there are several, and of all together.

    Args:
        predictions: With a column ``split`` if there may be several test sets.
        scoring: Name of the scoring rule.
        classes: Class names in the order of their labels.
        whole: The :func:`intervals` of all predictions.
        unmeasured: Classes of a set that its ``macro_f1`` leaves out. What a single set leaves out, all leave out.
        shared: Patients without whom there is a ``score_disjoint``, if any are given.
    """
    sets = list(_parts(predictions, "split")) if "split" in predictions else []
    found = [(name, part, intervals(part, scoring, classes)) for name, part in sets if len(sets) > 1]
    left_out = dict(unmeasured) | {"all": unmeasured.get(sets[0][0], ()) if len(sets) == 1 else ()}
    rows = []
    for name, part, values in [*found, ("all", predictions, whole)]:
        row = {"set": name} | _size(part) | {rate: values[rate].value for rate in _SHOWN[scoring]}
        row |= {"score_low": values["score"].low, "score_high": values["score"].high}
        if shared:
            rest = part[~part["patient"].astype(str).isin(list(shared))]
            row |= {"score_disjoint": overall_scores(confusion(rest, len(classes)), scoring, classes)["score"]}
        row |= {"floor": floor_scores(part, scoring, classes)["score"]}
        row |= {rate: values[rate].value for rate in ("two_class_score",) if rate in values}
        few = left_out.get(name, ())
        row |= {"macro_f1": _macro_f1(part, classes, few)}
        rows.append(row | {"macro_f1_floor": _macro_f1(part.assign(prediction=0), classes, few)})
    return pd.DataFrame(rows)


def _macro_f1(predictions: pd.DataFrame, classes: Sequence[str], left_out: Sequence[str]) -> float:
    """Return the mean F1 of the classes that have cycles and are not left out; the confusions with those count."""
    table = class_scores(confusion(predictions, len(classes)), classes)
    return float(table.loc[(table["support"] > 0) & ~table["class"].isin(list(left_out)), "f1"].mean())


def _parts(predictions: pd.DataFrame, column: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    return iter(predictions.groupby(predictions[column].astype(object).fillna("unknown")))


def _size(part: pd.DataFrame) -> dict[str, int]:
    return {"cycles": len(part), "patients": part["patient"].nunique()}


def calibration(confidence: npt.ArrayLike, correct: npt.ArrayLike, num_bins: int = 15) -> pd.DataFrame:
    """Return cycles, mean confidence and accuracy in bins of equal width, each open at its lower end.

    Args:
        confidence: Largest probability of each cycle.
        correct: Whether that class is the true one.
        num_bins: Number of bins of [0, 1].
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    bins = (np.ceil(confidence * num_bins).astype(int) - 1).clip(0, num_bins - 1)
    cycles = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "low": np.arange(num_bins) / num_bins,
                "high": np.arange(1, num_bins + 1) / num_bins,
                "cycles": cycles,
                "confidence": np.bincount(bins, confidence, num_bins) / cycles,
                "accuracy": np.bincount(bins, correct, num_bins) / cycles,
            }
        )


def calibration_error(bins: pd.DataFrame) -> float:
    """Return the expected calibration error: the mean gap of accuracy and confidence, weighted by cycles."""
    gaps = (bins["accuracy"] - bins["confidence"]).abs()  # NaN in empty bins, which sum() leaves out
    return float((bins["cycles"] * gaps).sum() / bins["cycles"].sum())
