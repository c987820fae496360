from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, recall_score

from respiro.evaluation import Evaluation, bootstrap_by_patient, evaluate

Make = Callable[..., tuple[Any, Any]]
SPRSOUND = ("Normal", "Poor Quality", "CAS", "DAS", "CAS & DAS")
RATES = ["sensitivity", "specificity", "average_score", "harmonic_score", "score"]


def rates_by_hand(part: pd.DataFrame) -> dict[str, float]:
    """Rates and scores of SPRSound's record tasks, where 1 is poor quality."""
    se = recall_score(part["label"], part["prediction"], labels=[2, 3, 4], average="micro")
    sp = recall_score(part["label"], part["prediction"], labels=[0], average="micro")
    average, harmonic = (se + sp) / 2, 2 * se * sp / (se + sp)
    return dict(zip(RATES, (se, sp, average, harmonic, (average + harmonic) / 2), strict=True))


def score_of_counts(counts: np.ndarray) -> float:
    se, sp = np.trace(counts[2:, 2:]) / counts[2:].sum(), counts[0, 0] / counts[0].sum()
    return float((se + sp) / 4 + se * sp / (se + sp))


@pytest.fixture
def found(make: Make) -> Evaluation:
    return evaluate(*make(200, 12, classes=SPRSOUND, scoring="sprsound"))


def test_every_test_set_and_all_of_them_are_scored_apart(found: Evaluation) -> None:
    table = found.by_set
    more = ["score_low", "score_high", "floor", "macro_f1", "macro_f1_floor"]
    assert list(table.columns) == ["set", "cycles", "patients", *RATES, *more]
    assert table["set"].tolist() == ["inter", "intra", "all"]
    for row in table.to_dict("records"):
        part = found.predictions
        part = part if row["set"] == "all" else part[part["split"] == row["set"]]
        assert (row["cycles"], row["patients"]) == (len(part), part["patient"].nunique())
        assert {name: row[name] for name in RATES} == pytest.approx(rates_by_hand(part))
        interval = bootstrap_by_patient(part["label"], part["prediction"], part["patient"], score_of_counts)
        assert (row["score_low"], row["score_high"]) == pytest.approx(interval[1:])
        assert row["score_low"] < row["score"] < row["score_high"]
        assert row["floor"] == 0.25
        assert row["macro_f1"] == pytest.approx(f1_score(part["label"], part["prediction"], average="macro"))
        normal = np.zeros(len(part), dtype=int)
        assert row["macro_f1_floor"] == pytest.approx(f1_score(part["label"], normal, average="macro"))


def test_the_last_row_is_that_of_the_metrics(found: Evaluation) -> None:
    last = found.by_set.iloc[-1]
    assert {name: last[name] for name in RATES} == {name: found.metrics[name] for name in RATES}
    assert (last["score_low"], last["score_high"]) == found.intervals["score"][1:]


def test_groups_have_the_scores_of_their_rule(found: Evaluation, make: Make) -> None:
    assert list(found.by_group.columns) == ["group", "value", "cycles", "patients", *RATES]
    for row in found.by_group.to_dict("records"):
        column = found.predictions[row["group"]]
        part = found.predictions[column.isna() if row["value"] == "unknown" else column == row["value"]]
        assert {name: row[name] for name in RATES} == pytest.approx(rates_by_hand(part))
    sets = found.by_group.query("group == 'split'").reset_index(drop=True)
    pd.testing.assert_frame_equal(sets[RATES], found.by_set[RATES][:2])
    icbhi = evaluate(*make())
    assert list(icbhi.by_group.columns) == [
        "group",
        "value",
        "cycles",
        "patients",
        "sensitivity",
        "specificity",
        "score",
    ]


def test_one_test_set_is_one_row(make: Make) -> None:
    found = evaluate(*make())
    (row,) = found.by_set.to_dict("records")
    assert (row["set"], row["cycles"], row["floor"]) == ("all", 90, 0.5)
    assert row["score"] == found.metrics["score"]
    assert "average_score" not in row
    assert "\nset " not in str(found)


def test_a_set_without_adventitious_sounds_has_no_score(make: Make, tmp_path: Path) -> None:
    model, data = make(classes=("Normal", "Adventitious"), scoring="sprsound")
    data.side.cycles["split"] = np.where(data.side.cycles["label"] == 0, "inter", "intra")
    found = evaluate(model, data, output_dir=tmp_path)
    inter, intra, whole = found.by_set.to_dict("records")
    assert not math.isnan(inter["specificity"])
    assert all(math.isnan(inter[name]) for name in ("sensitivity", "score", "score_low", "score_high", "floor"))
    assert math.isnan(intra["specificity"])
    assert whole["score"] == found.metrics["score"]
    (line,) = [line for line in str(found).splitlines() if line.startswith("inter ")]
    assert line.split()[3:7] == ["-", f"{100 * inter['specificity']:.2f}", "-", "-"]
    assert line.split()[7:10] == ["-", "-", "-"]  # score, interval, floor; the F1 of normal cycles is there
    saved = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)["by_set"]
    assert saved[0]["score"] is None
    assert saved[2]["score"] == whole["score"]


def test_the_report_has_a_line_for_each_set(found: Evaluation) -> None:
    lines = str(found).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("set "))
    heading = "set cycles patients Se Sp AS HS Score 95 % interval all normal macro-F1 macro-F1 of all normal"
    assert next(line for line in lines[start:] if line.startswith("all sets together  "))  # these come after
    assert " ".join(lines[start].split()) == heading
    for line, row in zip(lines[start + 1 : start + 4], found.by_set.to_dict("records"), strict=True):
        shares = [f"{100 * row[name]:.2f}" for name in RATES]
        interval = f"{100 * row['score_low']:.2f} to {100 * row['score_high']:.2f}"
        f1 = f"{100 * row['macro_f1']:.2f} {100 * row['macro_f1_floor']:.2f}"
        size = f"{row['set']} {row['cycles']} {row['patients']}"
        assert " ".join(line.split()) == f"{size} {' '.join(shares)} {interval} 25.00 {f1}"
    assert not any(line.startswith("split ") for line in lines)  # the sets are not shown twice


def test_saved_results_hold_every_set(make: Make, tmp_path: Path) -> None:
    model, data = make(classes=SPRSOUND, scoring="sprsound")
    found = evaluate(model, data, output_dir=tmp_path)
    saved = json.loads((tmp_path / "result.json").read_text())["by_set"]
    pd.testing.assert_frame_equal(pd.DataFrame(saved), found.by_set)
    table = pd.read_csv(tmp_path / "predictions.csv", index_col="index", dtype={"patient": str})
    again = Evaluation.from_predictions(table, found.classes, found.scoring, found.protocol)
    pd.testing.assert_frame_equal(again.by_set, found.by_set)


def of_two_sets(make: Make, **protocol: Any) -> tuple[Any, Any]:
    """Four classes in two sets, of which the first has one cycle of the last class."""
    model, data = make(200, 12, **protocol)
    rare = np.flatnonzero(data.side.cycles["label"] == 3)
    sets = np.where(np.arange(200) % 2 == 0, "far", "near")
    sets[rare] = "near"
    sets[rare[0]] = "far"
    data.side.cycles["split"] = sets
    return model, data


def test_macro_f1_of_a_set_leaves_out_what_cannot_be_measured(make: Make) -> None:
    found = evaluate(*of_two_sets(make, unmeasured={"far": ["both"]}))
    far, near, whole = found.by_set.to_dict("records")
    for row, labels in ((far, [0, 1, 2]), (near, [0, 1, 2, 3]), (whole, [0, 1, 2, 3])):
        part = found.predictions
        part = part if row["set"] == "all" else part[part["split"] == row["set"]]
        # scikit-learn takes the mean over these labels of an F1 to which every cycle counts.
        expected = f1_score(part["label"], part["prediction"], labels=labels, average="macro")
        assert row["macro_f1"] == pytest.approx(expected), row["set"]
        normal = np.zeros(len(part), dtype=int)
        assert row["macro_f1_floor"] == pytest.approx(f1_score(part["label"], normal, labels=labels, average="macro"))
        abnormal = part[part["label"] > 0]
        two_class = (abnormal["prediction"] > 0).mean() / 2 + row["specificity"] / 2
        assert row["two_class_score"] == pytest.approx(two_class)
        assert row["floor"] == 0.5
    assert whole["macro_f1"] == found.metrics["macro_f1"]
    assert whole["two_class_score"] == found.metrics["two_class_score"]


def test_a_single_set_leaves_out_its_classes_and_is_shown(make: Make) -> None:
    model, data = make(unmeasured={"test": ["both"]})
    found = evaluate(model, data)
    (row,) = found.by_set.to_dict("records")
    part = found.predictions
    expected = f1_score(part["label"], part["prediction"], labels=[0, 1, 2], average="macro")
    assert row["macro_f1"] == pytest.approx(expected)
    heading, line = (line for line in str(found).splitlines() if line.startswith(("set ", "test ")))
    assert line.split()[0] == "test"
    assert "macro-F1, every class" in str(found)  # that of the scores, beside that of the set
    names = "set cycles patients Se Sp Score 95 % interval all normal two-class Score macro-F1 macro-F1 of all normal"
    assert " ".join(heading.split()) == names


def test_two_classes_have_no_two_class_score(make: Make) -> None:
    found = evaluate(*make(classes=("normal", "abnormal")))
    assert "two_class_score" not in found.by_set
