"""Numbers read from labels, predictions and probabilities; all in [0, 1], NaN where undefined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from respiro.metrics._counts import rates_for

__all__ = ["calibration", "calibration_error", "class_scores", "confusion", "group_scores", "overall_scores"]

Counts = npt.NDArray[np.int64]


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


def group_scores(
    predictions: pd.DataFrame, columns: Sequence[str], scoring: str, classes: Sequence[str]
) -> pd.DataFrame:
    """Return cycles, patients, sensitivity, specificity and score of each value of each column."""
    rows = []
    for column in columns:
        for value, part in predictions.groupby(predictions[column].astype(object).fillna("unknown")):
            scores = overall_scores(confusion(part, len(classes)), scoring, classes)
            row = {"group": column, "value": value, "cycles": len(part), "patients": part["patient"].nunique()}
            rows.append(row | {name: scores[name] for name in ("sensitivity", "specificity", "score")})
    names = ["group", "value", "cycles", "patients", "sensitivity", "specificity", "score"]
    return pd.DataFrame(rows, columns=names)


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
