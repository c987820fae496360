"""From a trained model to its predictions, its scores with their uncertainty, and the protocol behind them."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import nn
from typing_extensions import Self

from respiro import __version__
from respiro.errors import LabelError
from respiro.evaluation import _inference, _protocol, _scores, plots, report
from respiro.evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evaluation", "evaluate"]

_STAGES = {"val": "validate", "test": "test"}
_READING = ("duration", "pad", "fade", "resample", "band")
_GROUPS = ("device", "location", "sex", "age_group")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What a model did on one side of a data set, under a recorded protocol. Printing it gives the report.

    All scores are in [0, 1], NaN where undefined (no cycle of a kind).

    Attributes:
        predictions: One row a cycle, row labels those of the cycles table: ``recording``, ``cycle``, ``start`` and
            ``end`` (s), ``class``, ``label``, ``prediction``, ``predicted_class``, ``p_<class>`` for each class,
            all metadata, and ``stamps``: what makes the result incomparable, joined by ``;``, empty if nothing does.
        classes: Class names in the order of their labels.
        scoring: ``"icbhi"`` or ``"sprsound"``.
        metrics: ``sensitivity``, ``specificity``, ``score``; for ICBHI with more than two classes
            ``two_class_sensitivity`` and ``two_class_score`` (any abnormal class is right for an abnormal cycle), for
            SPRSound ``average_score`` and ``harmonic_score``; ``macro_f1`` and ``balanced_accuracy`` over the classes
            that have cycles, ``accuracy``, and ``ece`` (expected calibration error, 15 bins of equal width).
        intervals: 95 % interval over patients of each metric but ``ece``. A recording without a patient is taken as a
            patient of its own, as the splits do.
        per_class: ``class``, ``recall``, ``precision``, ``f1``, ``support`` (cycles).
        by_group: ``group``, ``value``, ``cycles``, ``patients``, ``sensitivity``, ``specificity``, ``score``, with
            ``average_score`` and ``harmonic_score`` before it for SPRSound, for device, location, sex, age group, and
            for each test set where there are several.
        by_set: What a table of a paper shows, one row for each test set where there are several (``inter``, ``intra``)
            and a last one, ``all``, for all together: ``set``, ``cycles``, ``patients``, the rates and scores of
            *by_group*, ``score_low`` and ``score_high`` (95 % interval of the score over the patients of that set),
            ``score_disjoint`` where *disjoint* is given, ``floor``, its score if every cycle is called normal, for
            ICBHI with more than two classes ``two_class_score`` (whose floor is the same), ``macro_f1`` and
            ``macro_f1_floor``. The last two are means over the classes that have cycles and that
            ``protocol["unmeasured"]`` does not name for the set; cycles of the others count where they are called one
            of these. With several sets, ``all`` leaves no class out.
        floor: The metrics of calling every cycle normal.
        disjoint: The metrics without patients who are on the train side too, with ``recall_<class>``, ``cycles`` and
            ``patients``; ``None`` where there are no such patients, or the model was trained on other data sets only.
        confusion: Cycles by true class (rows) and predicted class.
        calibration: Cycles, mean ``confidence`` and ``accuracy`` of each bin of the largest probability.
        protocol: Record of data set, split, label map, selection rule and seed; the record of the model's latest
            training is at ``"training"``, those of all, oldest first, at ``"training_history"`` if there are several.
        versions: Of respiro, torch, lightning and Python.
    """

    predictions: pd.DataFrame
    classes: tuple[str, ...]
    scoring: str
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    per_class: pd.DataFrame
    by_group: pd.DataFrame
    by_set: pd.DataFrame
    floor: dict[str, float]
    disjoint: dict[str, float] | None
    confusion: pd.DataFrame
    calibration: pd.DataFrame
    protocol: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def from_predictions(
        cls, predictions: pd.DataFrame, classes: Sequence[str], scoring: str, protocol: Mapping[str, Any]
    ) -> Self:
        """Score a table of predictions, for example ``predictions.csv`` read back.

        Args:
            predictions: ``label``, ``prediction``, ``patient``, ``p_<class>`` for each class, and metadata. Where a
            patient is missing, ``recording`` stands for it, if the table has that. ``stamps`` are kept.
            classes: Class names in the order of their labels.
            scoring: ``"icbhi"`` or ``"sprsound"``.
            protocol: Record to keep beside the scores.
        """
        classes = tuple(classes)
        protocol, predictions = _stamped(protocol, predictions)
        confmat = _scores.confusion(predictions, len(classes))
        bins = _scores.calibration(
            predictions[[f"p_{name}" for name in classes]].max(axis=1),
            predictions["label"] == predictions["prediction"],
        )
        intervals = _scores.intervals(predictions, scoring, classes)
        shared = _shared(predictions, protocol)
        groups = [name for name in _GROUPS if name in predictions]
        if "split" in predictions and predictions["split"].nunique() > 1:
            groups.append("split")
        return cls(
            predictions=predictions,
            classes=classes,
            scoring=scoring,
            metrics=_scores.overall_scores(confmat, scoring, classes) | {"ece": _scores.calibration_error(bins)},
            intervals=intervals,
            per_class=_scores.class_scores(confmat, classes),
            by_group=_scores.group_scores(predictions, groups, scoring, classes),
            by_set=_scores.set_scores(predictions, scoring, classes, intervals, protocol.get("unmeasured", {}), shared),
            floor=_scores.floor_scores(predictions, scoring, classes),
            disjoint=_disjoint(predictions, classes, scoring, shared),
            confusion=pd.DataFrame(confmat, pd.Index(classes, name="true"), pd.Index(classes, name="predicted")),
            calibration=bins,
            protocol=protocol,
            versions=_versions(),
        )

    def table(self) -> str:
        """Return the report as text: protocol first, then scores in percent beside those of calling all normal."""
        return report.text(self)

    __repr__ = table

    def save(self, folder: str | Path) -> Path:
        """Write ``predictions.csv``, ``result.json`` (last: it marks a complete result) and the figures as PNG.

        Every file is written under another name and then renamed, so none is ever half there.

        Returns:
            The folder.
        """
        return report.save(self, Path(folder))

    def plot_confusion(self) -> Figure:
        """Draw the confusion matrix: share of each true class, and counts."""
        return plots.confusion(self)

    def plot_reliability(self) -> Figure:
        """Draw accuracy against confidence, and how often each confidence occurs."""
        return plots.reliability(self)

    def plot_groups(self) -> Figure:
        """Draw sensitivity, specificity and score of each device, location, sex and age group."""
        return plots.groups(self)


def evaluate(
    model: nn.Module,
    datamodule: Any,
    split: Literal["test", "val"] = "test",
    output_dir: str | Path | None = None,
) -> Evaluation:
    """Run a model over one side of a data set and score it; needs no trainer.

    The model runs in eval mode on the device it is on, and gets its train mode back. Nothing is shared between
    processes: where there are several, each that calls this evaluates the whole side, so let one do it.

    Args:
        model: Maps waveforms to logits. Its ``classes``, ``audio`` (how it reads sound: ``sample_rate`` and more),
            ``protocol`` and ``history`` (of its trainings), if it has them, are checked and recorded.
        datamodule: Any with ``prepare_data``, ``setup``, ``<split>_set`` (samples with ``waveform`` and ``index``, and
            their table ``cycles``), ``classes``, ``scoring`` and ``protocol``, such as
            :class:`respiro.datamodules.ICBHIDataModule`. Its ``batch_size`` and ``num_workers`` are used if it has
            them (else 32 and 0), its loaders are not.
        split: The side to evaluate on.
        output_dir: Where to save the result; by default it is not saved.

    Shape:
        model: ``(B, S)`` to ``(B, C)``.

    Raises:
        LabelError: If the model's classes are not those of the data set.
        ValueError: If there is no such split, the data set has another sampling rate than the model, a logit is not
            finite, or a cycle came twice or not at all.

    Warns:
        UserWarning: If the data set is otherwise read, labelled or scored than the model's training data.
    """
    if split not in _STAGES:
        raise ValueError(f"split must be one of {', '.join(map(repr, _STAGES))}, got {split!r}")
    datamodule.prepare_data()
    datamodule.setup(_STAGES[split])
    classes = tuple(datamodule.classes)
    protocol = _protocol.make_record(model, datamodule, split)
    _check_classes(getattr(model, "classes", None), classes)
    _check_audio(getattr(model, "audio", None) or {}, protocol.get("audio") or {})
    _check_scoring(protocol.get("training", {}).get("scoring"), datamodule.scoring)
    _check_labels(protocol)
    predictions = _inference.predict(
        model,
        getattr(datamodule, f"{split}_set"),
        classes,
        batch_size=getattr(datamodule, "batch_size", 32),
        num_workers=getattr(datamodule, "num_workers", 0),
    )
    evaluation = Evaluation.from_predictions(predictions, classes, datamodule.scoring, protocol)
    if output_dir is not None:
        evaluation.save(output_dir)
    return evaluation


def _check_classes(known: Sequence[str] | None, classes: tuple[str, ...]) -> None:
    if known and tuple(known) != classes:
        raise LabelError(
            f"the model knows the classes {list(known)}, the data set has {list(classes)}; "
            f"choose the data module's labels to fit the model"
        )


def _check_audio(model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    differing = {name: (model[name], data[name]) for name in model.keys() & data.keys() if model[name] != data[name]}
    if "sample_rate" in differing:
        wanted, given = differing["sample_rate"]
        raise ValueError(
            f"the model takes sound at {wanted} Hz, the data module gives it at {given} Hz; "
            f"build the data module with sample_rate={wanted}"
        )
    other = [
        f"{name} {differing[name][1]!r} instead of {differing[name][0]!r}" for name in _READING if name in differing
    ]
    if other:
        warnings.warn(
            f"the data module reads sound otherwise than the model: {', '.join(other)}; "
            f"build it with the model's settings, unless that is what you want to measure",
            UserWarning,
            stacklevel=3,
        )


def _check_scoring(trained: str | None, scoring: str) -> None:
    if trained not in (None, scoring):
        warnings.warn(
            f"the model was trained on data scored by {trained!r}; this data set is scored by {scoring!r}, "
            f"and scores of two rules do not compare",
            UserWarning,
            stacklevel=3,
        )


def _check_labels(protocol: Mapping[str, Any]) -> None:
    training = protocol.get("training", {})
    # Names of label maps of one data set, and of joined ones, do not compare.
    alike = ("trained_on" in training) == ("trained_on" in protocol) and not _protocol.trained_elsewhere(protocol)
    trained, tested = training.get("labels"), protocol.get("labels")
    if alike and None not in (trained, tested) and trained != tested:
        warnings.warn(
            f"the model was trained on labels {trained!r}; here they are {tested!r}, so that other cycles count, or "
            f"count as another class",
            UserWarning,
            stacklevel=3,
        )


def _stamped(protocol: Mapping[str, Any], predictions: pd.DataFrame) -> tuple[dict[str, Any], pd.DataFrame]:
    """Bring together the stamps that follow from the protocol and those that the table already carries."""
    protocol = dict(protocol)
    carried = ";".join(predictions["stamps"].dropna().unique()) if "stamps" in predictions else ""
    more = set(carried.split(";")) - {"", *_protocol.stamps(protocol)}
    if more:
        protocol["stamps"] = sorted({*protocol.get("stamps", ()), *more})
    return protocol, predictions.assign(stamps=";".join(_protocol.stamps(protocol)))


def _shared(predictions: pd.DataFrame, protocol: Mapping[str, Any]) -> list[str]:
    """Return the patients of the predictions whom the record names to be in train or validation too."""
    if protocol.get("split") != "test" or not _protocol.saw_dataset(protocol):
        return []
    tested = set(predictions["patient"].astype(str))
    return [patient for patient in map(str, protocol.get("shared_patients", [])) if patient in tested]


def _disjoint(
    predictions: pd.DataFrame, classes: tuple[str, ...], scoring: str, shared: Sequence[str]
) -> dict[str, float] | None:
    if not shared:
        return None
    rest = predictions[~predictions["patient"].astype(str).isin(list(shared))]
    confmat = _scores.confusion(rest, len(classes))
    recall = _scores.class_scores(confmat, classes)["recall"]
    return _scores.overall_scores(confmat, scoring, classes) | {
        **{f"recall_{name}": float(value) for name, value in zip(classes, recall, strict=True)},
        "cycles": len(rest),
        "patients": rest["patient"].nunique(),
    }


def _versions() -> dict[str, str]:
    torch_version, lightning = str(torch.__version__), version("lightning")
    return {"respiro": __version__, "torch": torch_version, "lightning": lightning, "python": platform.python_version()}
