"""The scoring rules by name, as data modules carry it: which metrics, and which rates, are read from the counts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import MetricCollection

from respiro.metrics.icbhi import icbhi_metrics, icbhi_rates
from respiro.metrics.sprsound import class_ids, sprsound_metrics, sprsound_rates

__all__ = ["metrics_for", "rates_for"]


def metrics_for(scoring: str, classes: Sequence[str]) -> MetricCollection:
    """Return the metrics of a scoring rule for these classes.

    Args:
        scoring: ``"icbhi"`` or ``"sprsound"``.
        classes: Class names in the order of their labels.

    Raises:
        ValueError: If no rule has this name.

    Example:
        >>> sorted(metrics_for("icbhi", ["normal", "abnormal"]))
        ['score', 'sensitivity', 'specificity']
    """
    _check(scoring)
    return icbhi_metrics(len(classes)) if scoring == "icbhi" else sprsound_metrics(tuple(classes))


def rates_for(confmat: Tensor, scoring: str, classes: Sequence[str]) -> dict[str, Tensor]:
    """Return every rate and score that a scoring rule reads from a confusion matrix ``(..., C, C)``.

    With more than two classes, ICBHI adds the two-class rates of the same predictions.

    Raises:
        ValueError: If no rule has this name.
    """
    _check(scoring)
    if scoring == "sprsound":
        return sprsound_rates(confmat, class_ids(tuple(classes))[1])
    rates = icbhi_rates(confmat)
    if len(classes) > 2:
        collapsed = icbhi_rates(confmat, two_class=True)
        rates |= {f"two_class_{name}": collapsed[name] for name in ("sensitivity", "score")}
    return rates


def _check(scoring: str) -> None:
    if scoring not in ("icbhi", "sprsound"):
        raise ValueError(f"scoring must be 'icbhi' or 'sprsound', got {scoring!r}")
