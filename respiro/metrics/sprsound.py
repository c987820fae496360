"""Scores of the SPRSound challenges (Zhang et al., BioCAS 2022 grand challenge; the same in 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from respiro.errors import LabelError
from respiro.metrics._confusion import ConfusionMetric, pooled_rates

__all__ = [
    "SPRSoundAverageScore",
    "SPRSoundHarmonicScore",
    "SPRSoundScore",
    "class_ids",
    "sprsound_metrics",
    "sprsound_rates",
    "sprsound_total",
]

#: Number of classes and first adventitious id of each official task.
_TASKS = {"1-1": (2, 1), "1-2": (7, 1), "2-1": (3, 2), "2-2": (5, 2)}
#: Weight of each official task in the challenge total.
_WEIGHTS = {"1-1": 0.2, "1-2": 0.3, "2-1": 0.2, "2-2": 0.3}


def class_ids(task: str | Sequence[str]) -> tuple[int, int]:
    """Return the number of classes and the first adventitious id of a task, given by name or by its classes.

    Raises:
        ValueError: If no task has this name.
        LabelError: If poor quality is among the classes, but not as the second.

    Example:
        >>> class_ids("2-2"), class_ids(["normal", "wheeze", "crackle"])
        ((5, 2), (3, 1))
    """
    if isinstance(task, str):
        if task not in _TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, _TASKS))}, or class names, got {task!r}")
        return _TASKS[task]
    names = [name.casefold() for name in task]
    if "poor quality" not in names:
        return len(names), 1
    if names.index("poor quality") != 1:
        raise LabelError(f"'poor quality' must be the second class, after normal, got {list(task)!r}")
    return len(names), 2


def sprsound_rates(confmat: Tensor, first_adventitious: int = 1) -> dict[str, Tensor]:
    """Return the two rates and the three scores of a confusion matrix ``(..., C, C)``, class 0 normal."""
    sensitivity, specificity = pooled_rates(confmat, first_adventitious)
    total = sensitivity + specificity
    average = total / 2
    harmonic = 2 * sensitivity * specificity / (total + (total == 0))  # 0 where both rates are 0
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "average_score": average,
        "harmonic_score": harmonic,
        "score": (average + harmonic) / 2,
    }


class _SPRSoundMetric(ConfusionMetric):
    _name: str

    def __init__(self, task: str | Sequence[str] = "1-1") -> None:
        num_classes, self.first_adventitious = class_ids(task)
        super().__init__(num_classes)

    def compute(self) -> Tensor:
        """Return the value, in [0, 1]."""
        return sprsound_rates(self.confmat, self.first_adventitious)[self._name]


class _SPRSoundSensitivity(_SPRSoundMetric):
    _name = "sensitivity"


class _SPRSoundSpecificity(_SPRSoundMetric):
    _name = "specificity"


class SPRSoundAverageScore(_SPRSoundMetric):
    """Arithmetic mean (AS) of sensitivity and specificity; NaN where either rate is.

    Sensitivity is the share of adventitious samples given their exact class, pooled; specificity the share of normal
    samples called normal. Poor Quality (record tasks 2-x) enters neither. Source: Zhang et al., BioCAS 2022 grand
    challenge.

    Args:
        task: ``"1-1"``, ``"1-2"`` (events), ``"2-1"``, ``"2-2"`` (records), or the class names in order of their ids.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; targets of -1 are ignored. Returns a scalar.

    Raises:
        ValueError: If no task has this name; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: If poor quality is among the class names, but not as the second; on update, if a label or a
            predicted label is none of the classes.
    """

    _name = "average_score"


class SPRSoundHarmonicScore(_SPRSoundMetric):
    """Harmonic mean (HS) of sensitivity and specificity, 0 if both are 0; NaN where either rate is.

    Source: Zhang et al., BioCAS 2022 grand challenge.

    Args:
        task: As in :class:`SPRSoundAverageScore`.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; targets of -1 are ignored. Returns a scalar.

    Raises:
        ValueError: If no task has this name; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: If poor quality is among the class names, but not as the second; on update, if a label or a
            predicted label is none of the classes.
    """

    _name = "harmonic_score"


class SPRSoundScore(_SPRSoundMetric):
    """Official Score of the challenge: the mean of AS and HS. Calling everything normal gives 0.25.

    Source: Zhang et al., BioCAS 2022 grand challenge.

    Args:
        task: As in :class:`SPRSoundAverageScore`.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; targets of -1 are ignored. Returns a scalar.

    Raises:
        ValueError: If no task has this name; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: If poor quality is among the class names, but not as the second; on update, if a label or a
            predicted label is none of the classes.

    Example:
        >>> import torch
        >>> SPRSoundScore("1-1")(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7083)
    """

    _name = "score"


def sprsound_metrics(task: str | Sequence[str] = "1-1") -> MetricCollection:
    """Return score, AS, HS, sensitivity and specificity (Zhang et al., 2022) over one shared confusion matrix.

    Args:
        task: As in :class:`SPRSoundAverageScore`.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; each value is a scalar.

    Raises:
        ValueError: If no task has this name; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: If poor quality is among the class names, but not as the second; on update, if a label or a
            predicted label is none of the classes.

    Example:
        >>> sorted(sprsound_metrics("2-1"))
        ['average_score', 'harmonic_score', 'score', 'sensitivity', 'specificity']
    """
    kinds: tuple[type[_SPRSoundMetric], ...] = (
        SPRSoundScore,
        SPRSoundAverageScore,
        SPRSoundHarmonicScore,
        _SPRSoundSensitivity,
        _SPRSoundSpecificity,
    )
    metrics: dict[str, Metric | MetricCollection] = {kind._name: kind(task) for kind in kinds}
    return MetricCollection(metrics, compute_groups=[list(metrics)])


def sprsound_total(scores: Mapping[str, float]) -> float:
    """Return the total of the challenge over its four tasks: 0.2 S11 + 0.3 S12 + 0.2 S21 + 0.3 S22.

    The ranking of the challenge added a bonus for running time, which is no part of this: it compares a run with those
    of the other teams (2022: on a logarithmic scale for the first six; 2023: 0.1 times the scaled difference of the
    logarithms of the times) and is no property of a model. A published total may contain it.
    Calling everything normal gives 0.25. Source: Zhang et al., BioCAS 2022 and 2023 grand challenges.

    Args:
        scores: :class:`SPRSoundScore` of each task, in [0, 1], by ``"1-1"``, ``"1-2"``, ``"2-1"`` and ``"2-2"``.

    Raises:
        ValueError: If a task is missing or there is none of this name, or a score is not in [0, 1].

    Example:
        >>> round(sprsound_total({"1-1": 0.769, "1-2": 0.632, "2-1": 0.662, "2-2": 0.512}), 4)
        0.6294
    """
    tasks = ", ".join(map(repr, _WEIGHTS))
    if scores.keys() != _WEIGHTS.keys():
        raise ValueError(f"scores must be of the tasks {tasks}, all of them and no other, got {list(scores)!r}")
    for task, score in scores.items():
        if not 0 <= score <= 1:
            raise ValueError(f"the score of task {task!r} must lie in [0, 1] (not percent), got {score!r}")
    return math.fsum(weight * float(scores[task]) for task, weight in _WEIGHTS.items())
