"""An evaluation as text, and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from respiro.evaluation._protocol import seeds, selection, stamps, trained_elsewhere

if TYPE_CHECKING:
    from respiro.evaluation.evaluate import Evaluation

__all__ = ["percent", "save", "text"]

_NAMES = {
    "specificity": "specificity (Sp)",
    "sensitivity": "sensitivity (Se)",
    "score": "Score",
    "average_score": "average score (AS)",
    "harmonic_score": "harmonic score (HS)",
    "two_class_sensitivity": "two-class Se",
    "two_class_score": "two-class Score",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "ece": "calibration error (ECE)",
}
_OF_SETS = {
    "score_disjoint": "disjoint Score",
    "floor": "all normal",
    "macro_f1_floor": "macro-F1 of all normal",
}
_TOGETHER = "all sets together"
_SHORT = {
    "specificity": "Sp",
    "sensitivity": "Se",
    "average_score": "AS",
    "harmonic_score": "HS",
    "score": "Score",
}


def percent(value: float) -> str:
    """Return a share as percent with two decimals, ``-`` where undefined."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def text(evaluation: Evaluation) -> str:
    """Return the report: protocol, test sets, scores, classes, groups; percent with two decimals."""
    several, unmeasured = len(evaluation.by_set) > 1, evaluation.protocol.get("unmeasured")
    names = _NAMES | ({"macro_f1": "macro-F1, every class"} if unmeasured else {})
    scores = pd.DataFrame(
        {
            _TOGETHER if several else "": [names[name] for name in _in_order(evaluation.metrics)],
            "percent": [percent(evaluation.metrics[name]) for name in _in_order(evaluation.metrics)],
            "95 % interval": [_interval(evaluation.intervals.get(name)) for name in _in_order(evaluation.metrics)],
            "all normal": [percent(evaluation.floor.get(name, math.nan)) for name in _in_order(evaluation.metrics)],
        }
    )
    if evaluation.disjoint is not None:
        disjoint = evaluation.disjoint
        scores["disjoint"] = [percent(disjoint.get(name, math.nan)) for name in _in_order(evaluation.metrics)]
    parts = ["\n".join(_header(evaluation))]
    if several or unmeasured:
        parts.append(_layout(_sets(evaluation)))
    parts.append(_layout(scores))
    classes = evaluation.per_class.copy()
    if evaluation.disjoint is not None:
        classes.insert(2, "disjoint recall", [evaluation.disjoint[f"recall_{name}"] for name in evaluation.classes])
    parts.append(_layout(_in_percent(classes)))
    groups = evaluation.by_group.query("group != 'split'")  # these are the sets
    if len(groups):
        groups = groups.assign(group=groups["group"].where(~groups["group"].duplicated(), ""))
        parts.append(_layout(_in_percent(groups).rename(columns=_SHORT)))
    return "\n\n".join(parts)


def _sets(evaluation: Evaluation) -> pd.DataFrame:
    by_set = evaluation.by_set
    if len(by_set) == 1:
        by_set = by_set.assign(set=", ".join(evaluation.protocol["unmeasured"]))
    bounds = zip(by_set["score"], by_set["score_low"], by_set["score_high"], strict=True)
    columns = list(by_set.columns)
    first = _in_percent(by_set[columns[: columns.index("score_low")]]).rename(columns=_SHORT)
    first["95 % interval"] = [_interval(interval) for interval in bounds]
    more = by_set[columns[columns.index("score_high") + 1 :]].rename(columns=_NAMES | _OF_SETS)
    return pd.concat([first, more.map(percent)], axis=1)


def save(evaluation: Evaluation, folder: Path) -> Path:
    """Write predictions, figures and, last, the result."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "predictions.csv", lambda path: evaluation.predictions.to_csv(path))
    figures = {
        "confusion.png": evaluation.plot_confusion(),
        "reliability.png": evaluation.plot_reliability(),
        "score_by_group.png": evaluation.plot_groups(),
    }
    for name, figure in figures.items():
        _write(folder / name, lambda path, figure=figure: figure.savefig(path, dpi=150, format="png"))  # type: ignore[misc]
    result = json.dumps(_plain(_result(evaluation)), indent=2, allow_nan=False) + "\n"
    _write(folder / "result.json", lambda path: path.write_text(result, encoding="utf-8"))
    return folder


def _write(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def _result(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "protocol": evaluation.protocol,
        "stamps": list(stamps(evaluation.protocol)),
        "cycles": len(evaluation.predictions),
        "patients": evaluation.predictions["patient"].nunique(),
        "classes": evaluation.classes,
        "scoring": evaluation.scoring,
        "metrics": evaluation.metrics,
        "intervals": {name: [interval.low, interval.high] for name, interval in evaluation.intervals.items()},
        "floor": evaluation.floor,
        "disjoint": evaluation.disjoint,
        "per_class": evaluation.per_class.to_dict("records"),
        "by_group": evaluation.by_group.to_dict("records"),
        "by_set": evaluation.by_set.to_dict("records"),
        "confusion": evaluation.confusion.to_numpy().tolist(),
        "calibration": evaluation.calibration.to_dict("records"),
        "versions": evaluation.versions,
    }


def _plain(value: Any) -> Any:
    """Return *value* as valid JSON data: numpy scalars as Python's, NaN and infinities as ``None``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_plain(item) for item in value]
    return str(value)


def _in_order(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in _NAMES if name in metrics]


def _header(evaluation: Evaluation) -> list[str]:
    protocol, predictions = evaluation.protocol, evaluation.predictions
    title = [protocol.get("dataset", "data set not named"), f"protocol {protocol.get('protocol', 'not named')}"]
    title += [f"labels {protocol['labels']}"] if "labels" in protocol else []
    title += [f"{protocol.get('split', 'unnamed')} split"]
    lines = [", ".join(map(str, title)), f"{selection(protocol)}, {seeds(protocol)}"]
    lines += [f"*** {stamp} *** {meaning}" for stamp, meaning in stamps(protocol).items()]
    lines += [f"note: {note}" for note in protocol.get("notes", [])]
    if trained_elsewhere(protocol):
        lines.append(
            "note: the model was trained on another data set; the train side that is named here, and patients who are "
            "in it too, are not the model's"
        )
    lines.append(f"{len(predictions)} cycles, {predictions['patient'].nunique()} patients; intervals over patients")
    if evaluation.disjoint is not None:
        rest = evaluation.disjoint
        lines.append(
            f"disjoint: without patients who are also in train: {rest['cycles']} cycles, {rest['patients']} patients"
        )
    return lines


def _interval(interval: tuple[float, float, float] | None) -> str:
    if interval is None or math.isnan(interval[1]):
        return "-"
    return f"{percent(interval[1])} to {percent(interval[2])}"


def _in_percent(table: pd.DataFrame) -> pd.DataFrame:
    shares = [name for name in table.columns if table[name].dtype == float]
    return table.assign(**{name: table[name].map(percent) for name in shares})


def _layout(table: pd.DataFrame) -> str:
    """Return aligned columns, text to the left and numbers to the right."""
    cells = [[str(name) for name in table.columns], *table.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [name in ("", _TOGETHER, "class", "group", "value", "set") for name in table.columns]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)
