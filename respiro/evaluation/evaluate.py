"""From a trained model to its predictions, its scores with their uncertainty, and the protocol behind them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from typing_extensions import Self

from respiro import __version__
from respiro.errors import LabelError
from respiro.evaluation import _scores, plots, report
from respiro.evaluation.statistics import Interval, bootstrap_by_patient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evaluation", "evaluate"]

_STAGES = {"val": "validate", "test": "test"}
_GROUPS = ("device", "location", "sex", "age_group")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What a model did on one side of a data set, under a recorded protocol. Printing it gives the report.

    All scores are in [0, 1], NaN where undefined (no cycle of a kind).

    Attributes:
        predictions: One row a cycle, row labels those of the cycles table: ``recording``, ``cycle``, ``start`` and
            ``end`` (s), ``class``, ``label``, ``prediction``, ``predicted_class``, ``p_<class>`` for each class, and
            all metadata.
        classes: Class names in the order of their labels.
        scoring: ``"icbhi"`` or ``"sprsound"``.
        metrics: ``sensitivity``, ``specificity``, ``score``; for ICBHI with more than two classes
            ``two_class_sensitivity`` and ``two_class_score`` (any abnormal class is right for an abnormal cycle), for
            SPRSound ``average_score`` and ``harmonic_score``; ``macro_f1`` and ``balanced_accuracy`` over the classes
            that have cycles, ``accuracy``, and ``ece`` (expected calibration error, 15 bins of equal width).
        intervals: 95 % interval over patients of each metric but ``ece``.
        per_class: ``class``, ``recall``, ``precision``, ``f1``, ``support`` (cycles).
        by_group: ``group``, ``value``, ``cycles``, ``patients``, ``sensitivity``, ``specificity``, ``score``, for
            device, location, sex, age group, and for each test set where there are several.
        floor: The metrics of calling every cycle normal.
        disjoint: The metrics without patients who are on the train side too, with ``recall_<class>``, ``cycles`` and
            ``patients``; ``None`` where there are no such patients.
        confusion: Cycles by true class (rows) and predicted class.
        calibration: Cycles, mean ``confidence`` and ``accuracy`` of each bin of the largest probability.
        protocol: Record of data set, split, label map, selection rule and seed; the record the model was trained
            under is at ``"training"``.
        versions: Of respiro, torch, lightning and Python.
    """

    predictions: pd.DataFrame
    classes: tuple[str, ...]
    scoring: str
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    per_class: pd.DataFrame
    by_group: pd.DataFrame
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
            predictions: ``label``, ``prediction``, ``patient``, ``p_<class>`` for each class, and metadata.
            classes: Class names in the order of their labels.
            scoring: ``"icbhi"`` or ``"sprsound"``.
            protocol: Record to keep beside the scores.
        """
        classes = tuple(classes)
        confmat = _scores.confusion(predictions, len(classes))
        bins = _scores.calibration(
            predictions[[f"p_{name}" for name in classes]].max(axis=1),
            predictions["label"] == predictions["prediction"],
        )

        def score(counts: npt.NDArray[np.int64]) -> dict[str, float]:
            return _scores.overall_scores(counts, scoring, classes)

        groups = [name for name in _GROUPS if name in predictions]
        if "split" in predictions and predictions["split"].nunique() > 1:
            groups.append("split")
        return cls(
            predictions=predictions,
            classes=classes,
            scoring=scoring,
            metrics=score(confmat) | {"ece": _scores.calibration_error(bins)},
            intervals=bootstrap_by_patient(
                predictions["label"],
                predictions["prediction"],
                predictions["patient"],
                score,
                num_classes=len(classes),
            ),
            per_class=_scores.class_scores(confmat, classes),
            by_group=_scores.group_scores(predictions, groups, scoring, classes),
            floor=score(_scores.confusion(predictions.assign(prediction=0), len(classes))),
            disjoint=_disjoint(predictions, classes, scoring, protocol),
            confusion=pd.DataFrame(confmat, pd.Index(classes, name="true"), pd.Index(classes, name="predicted")),
            calibration=bins,
            protocol=dict(protocol),
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

    The model runs in eval mode on the device it is on, and gets its train mode back.

    Args:
        model: Maps waveforms to logits. Its ``classes`` and ``protocol``, if it has them, are checked and recorded.
        datamodule: Any with ``prepare_data``, ``setup``, ``<split>_dataloader``, ``<split>_set`` (with ``cycles``),
            ``classes``, ``scoring`` and ``protocol``, such as :class:`respiro.datamodules.ICBHIDataModule`.
        split: The side to evaluate on.
        output_dir: Where to save the result; by default it is not saved.

    Shape:
        model: ``(B, S)`` to ``(B, C)``.

    Raises:
        LabelError: If the model's classes are not those of the data set.
        ValueError: If there is no such split, a logit is not finite, or a cycle came twice or not at all.
    """
    if split not in _STAGES:
        raise ValueError(f"split must be one of {', '.join(map(repr, _STAGES))}, got {split!r}")
    datamodule.prepare_data()
    datamodule.setup(_STAGES[split])
    classes = tuple(datamodule.classes)
    _check_classes(getattr(model, "classes", None), classes)
    index, logits = _run(model, getattr(datamodule, f"{split}_dataloader")(), classes)
    predictions = _predictions(getattr(datamodule, f"{split}_set").cycles, index, logits, classes)
    evaluation = Evaluation.from_predictions(
        predictions, classes, datamodule.scoring, _protocol(model, datamodule, split)
    )
    if output_dir is not None:
        evaluation.save(output_dir)
    return evaluation


def _check_classes(known: Sequence[str] | None, classes: tuple[str, ...]) -> None:
    if known and tuple(known) != classes:
        raise LabelError(
            f"the model knows the classes {list(known)}, the data set has {list(classes)}; "
            f"choose the data module's labels to fit the model"
        )


def _run(model: nn.Module, loader: Any, classes: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Return row labels ``(N,)`` and logits ``(N, C)`` in the order in which the cycles came."""
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    index, logits = [], []
    with _eval_mode(model), torch.inference_mode():
        for batch in loader:
            output = model(batch["waveform"].to(device))
            if output.shape != (len(batch["index"]), len(classes)):
                raise LabelError(
                    f"the model gives an output of shape {tuple(output.shape)} for {len(batch['index'])} cycles of a "
                    f"data set with {len(classes)} classes {list(classes)}; expected one logit for each class"
                )
            index.append(batch["index"].cpu())
            logits.append(output.float().cpu())
    if not index:
        raise ValueError("there is no cycle to evaluate on: the data loader is empty")
    return torch.cat(index).numpy(), torch.cat(logits)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode; afterwards give every part its own mode back, as some may be frozen in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _predictions(
    cycles: pd.DataFrame, index: npt.NDArray[np.int64], logits: Tensor, classes: tuple[str, ...]
) -> pd.DataFrame:
    """Join the model's output with the cycles table, in the table's order."""
    came = pd.Index(index)
    if not came.is_unique or len(came) != len(cycles) or not came.isin(cycles.index).all():
        raise ValueError(
            f"the data loader gave {len(came)} cycles, {came.nunique()} different ones, of a table of {len(cycles)}; "
            f"every cycle must come exactly once (no padding sampler, no drop_last)"
        )
    order = came.get_indexer(cycles.index)
    logits = logits[torch.from_numpy(order)]
    broken = ~logits.isfinite().all(1).numpy()
    if broken.any():
        first = cycles.iloc[int(np.flatnonzero(broken)[0])]
        raise ValueError(
            f"the model gave logits that are not finite for {broken.sum()} of {len(cycles)} cycles (first: recording "
            f"{first['recording']!r}, cycle {first['cycle']}); has training diverged?"
        )
    names = np.array(classes, dtype=object)
    labels, predicted = cycles["label"].to_numpy("int64"), logits.argmax(1).numpy()
    table = cycles[["recording", "cycle", "start", "end"]].rename_axis("index")
    table = table.assign(**{"class": names[labels], "label": labels, "prediction": predicted})
    table["predicted_class"] = names[predicted]
    probabilities = logits.double().softmax(1).numpy()
    table[[f"p_{name}" for name in classes]] = probabilities
    return table.join(cycles[[name for name in cycles.columns if name not in table.columns]])


def _disjoint(
    predictions: pd.DataFrame, classes: tuple[str, ...], scoring: str, protocol: Mapping[str, Any]
) -> dict[str, float] | None:
    if protocol.get("split") != "test":  # the record names patients who are in train or validation, and in test
        return None
    shared = [str(patient) for patient in protocol.get("shared_patients", [])]
    rest = predictions[~predictions["patient"].astype(str).isin(shared)]
    if len(rest) == len(predictions):
        return None
    confmat = _scores.confusion(rest, len(classes))
    recall = _scores.class_scores(confmat, classes)["recall"]
    return _scores.overall_scores(confmat, scoring, classes) | {
        **{f"recall_{name}": float(value) for name, value in zip(classes, recall, strict=True)},
        "cycles": len(rest),
        "patients": rest["patient"].nunique(),
    }


def _protocol(model: nn.Module, datamodule: Any, split: str) -> dict[str, Any]:
    protocol = dict(datamodule.protocol) | {"split": split, "weights_sha256": _digest(model)}
    if protocol.get("seed") is None:
        protocol["seed"] = getattr(datamodule, "seed", None)
    training = getattr(model, "protocol", None)
    return protocol | ({"training": dict(training)} if training else {})


def _digest(model: nn.Module) -> str:
    """Return SHA-256 over names and bytes of all weights: which checkpoint a result belongs to."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    torch_version, lightning = str(torch.__version__), version("lightning")
    return {"respiro": __version__, "torch": torch_version, "lightning": lightning, "python": platform.python_version()}
