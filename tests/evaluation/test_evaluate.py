from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)

from respiro.errors import LabelError
from respiro.evaluation import Evaluation, bootstrap_by_patient, evaluate
from respiro.metrics._counts import metrics_for

Make = Callable[..., tuple[Any, Any]]
SPRSOUND = ("Normal", "Poor Quality", "CAS", "DAS", "CAS & DAS")


def test_predictions_join_the_cycles_table(make: Make) -> None:
    model, data = make()
    table = evaluate(model, data).predictions
    cycles = data.side.cycles
    assert data.calls == ["prepare_data", "test"]
    assert table.index.equals(cycles.index)
    assert list(table.columns[:8]) == [
        "recording",
        "cycle",
        "start",
        "end",
        "class",
        "label",
        "prediction",
        "predicted_class",
    ]
    assert (table[cycles.columns] == cycles).where(cycles.notna(), True).all(axis=None)
    assert (table["prediction"].to_numpy() == data.side.logits.argmax(1).numpy()).all()
    probabilities = table[[f"p_{name}" for name in data.classes]]
    np.testing.assert_allclose(probabilities, data.side.logits.double().softmax(1), atol=1e-6)
    assert (table["predicted_class"] == probabilities.idxmax(axis=1).str.removeprefix("p_")).all()
    assert (table["class"] == np.array(data.classes)[table["label"]]).all()


@pytest.mark.parametrize(
    ("classes", "scoring"),
    [(("normal", "crackle", "wheeze", "both"), "icbhi"), (("normal", "abnormal"), "icbhi"), (SPRSOUND, "sprsound")],
    ids=["icbhi-4", "icbhi-2", "sprsound-2-2"],
)
def test_scores_match_the_metrics_and_scikit_learn(make: Make, classes: tuple[str, ...], scoring: str) -> None:
    model, data = make(classes=classes, scoring=scoring)
    found = evaluate(model, data)
    y, p = found.predictions["label"], found.predictions["prediction"]
    collection = metrics_for(scoring, classes)
    collection.update(data.side.logits, torch.tensor(y.tolist()))
    expected = {name: float(value) for name, value in collection.compute().items()}
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    if scoring == "icbhi" and len(classes) > 2:
        assert found.metrics["two_class_sensitivity"] == pytest.approx(recall_score(y > 0, p > 0))
        rate = found.metrics["two_class_sensitivity"] + found.metrics["specificity"]
        assert found.metrics["two_class_score"] == pytest.approx(rate / 2)
    else:
        assert "two_class_score" not in found.metrics
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(y, p, average="macro"))
    assert found.metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p))
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(y, p))
    assert (found.confusion.to_numpy() == confusion_matrix(y, p)).all()
    np.testing.assert_allclose(found.per_class["recall"], recall_score(y, p, average=None))
    np.testing.assert_allclose(found.per_class["precision"], precision_score(y, p, average=None))
    np.testing.assert_allclose(found.per_class["f1"], f1_score(y, p, average=None))
    assert found.per_class["support"].tolist() == np.bincount(y).tolist()
    assert set(found.intervals) == set(found.metrics) - {"ece"}
    for name, interval in found.intervals.items():
        assert interval.value == pytest.approx(found.metrics[name])
        assert interval.low <= interval.value <= interval.high


def test_calibration_error_matches_a_loop(make: Make) -> None:
    model, data = make(300)
    found = evaluate(model, data)
    confidence = found.predictions[[f"p_{name}" for name in found.classes]].max(axis=1).to_numpy()
    correct = (found.predictions["label"] == found.predictions["prediction"]).to_numpy()
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert found.metrics["ece"] == pytest.approx(expected)
    assert found.calibration["cycles"].sum() == 300


def test_every_group_is_scored_with_its_size(make: Make) -> None:
    model, data = make(scoring="sprsound", classes=("Normal", "Adventitious"))
    found = evaluate(model, data)
    groups = found.by_group
    assert list(groups["group"].unique()) == ["device", "location", "sex", "age_group", "split"]
    assert set(groups.query("group == 'sex'")["value"]) == {"F", "M", "unknown"}
    for row in groups.to_dict("records"):
        column = found.predictions[row["group"]]
        part = found.predictions[column.isna() if row["value"] == "unknown" else column == row["value"]]
        assert (row["cycles"], row["patients"]) == (len(part), part["patient"].nunique())
        assert row["sensitivity"] == pytest.approx(recall_score(part["label"], part["prediction"]))
        assert row["specificity"] == pytest.approx(recall_score(part["label"], part["prediction"], pos_label=0))
    assert groups.groupby("group")["cycles"].sum().eq(len(found.predictions)).all()


@pytest.mark.parametrize(("scoring", "score"), [("icbhi", 0.5), ("sprsound", 0.25)])
def test_the_floor_is_calling_all_normal(make: Make, scoring: str, score: float) -> None:
    model, data = make(scoring=scoring)
    floor = evaluate(model, data).floor
    assert (floor["specificity"], floor["sensitivity"], floor["score"]) == (1.0, 0.0, score)


def test_a_class_without_cycles_is_undefined_not_zero(make: Make) -> None:
    model, data = make(absent=(3,))
    found = evaluate(model, data)
    y, p = found.predictions["label"], found.predictions["prediction"]
    assert math.isnan(found.per_class["recall"][3])
    assert found.per_class["support"][3] == 0
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(y, p, labels=[0, 1, 2], average="macro"))
    assert found.metrics["balanced_accuracy"] == pytest.approx(recall_score(y, p, labels=[0, 1, 2], average="macro"))
    found.plot_confusion()


def test_no_abnormal_cycles(make: Make, tmp_path: Path) -> None:
    found = evaluate(*make(absent=(1, 2, 3)), output_dir=tmp_path)
    assert math.isnan(found.metrics["score"])
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["score"] is None
    assert "specificity" in str(found)


def test_one_patient_has_no_interval(make: Make) -> None:
    found = evaluate(*make(num_patients=1))
    assert math.isnan(found.intervals["score"].low)
    assert not math.isnan(found.metrics["score"])
    assert str(found)


def test_the_model_gets_its_modes_back(make: Make) -> None:
    model, data = make()
    model.train()
    model.norm.eval()  # a frozen part
    evaluate(model, data)
    assert model.training
    assert not model.norm.training
    assert model.scale.grad is None


def test_the_report_shows_percent_beside_the_floor(make: Make) -> None:
    found = evaluate(*make())
    (line,) = [line for line in found.table().splitlines() if line.startswith("Score")]
    interval = found.intervals["score"]
    numbers = [100 * value for value in (found.metrics["score"], interval.low, interval.high, found.floor["score"])]
    assert line.split() == ["Score", *"{:.2f} {:.2f} to {:.2f} {:.2f}".format(*numbers).split()]
    assert repr(found) == str(found) == found.table()


def test_the_loaders_of_a_trainer_are_not_used(make: Make) -> None:
    model, data = make()
    expected = evaluate(model, data)
    data.test_dataloader = lambda: [{"index": torch.tensor([0])}]  # what one of many processes would get
    pd.testing.assert_frame_equal(evaluate(model, data).predictions, expected.predictions)


def test_a_recording_stands_for_a_missing_patient(make: Make) -> None:
    model, data = make()
    missing = data.side.cycles["patient"].isin(["101", "105"])
    data.side.cycles["patient"] = data.side.cycles["patient"].where(~missing)
    found = evaluate(model, data)
    y, p = found.predictions["label"], found.predictions["prediction"]
    names = np.where(missing, found.predictions["recording"], found.predictions["patient"])
    assert found.intervals["score"] == pytest.approx(bootstrap_by_patient(y, p, names))
    lone = bootstrap_by_patient(y, p, found.predictions["patient"])
    assert found.intervals["score"] != pytest.approx(lone)
    alone = Evaluation.from_predictions(
        found.predictions.drop(columns="recording"), found.classes, found.scoring, found.protocol
    )
    assert alone.intervals["score"] == pytest.approx(lone)


def test_save_writes_every_file(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    found = evaluate(*make(scoring="sprsound", absent=(3,)), output_dir=folder)
    files = {"predictions.csv", "result.json", "confusion.png", "reliability.png", "score_by_group.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in files if name.endswith("png"))
    result = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["metrics"] == found.metrics
    assert result["intervals"]["score"] == [found.intervals["score"].low, found.intervals["score"].high]
    assert result["protocol"] == found.protocol
    assert result["per_class"][3]["recall"] is None
    assert result["confusion"] == found.confusion.to_numpy().tolist()
    assert (result["cycles"], result["patients"]) == (90, 9)
    assert len(result["by_group"]) == len(found.by_group)


def test_saved_predictions_give_the_same_scores(make: Make, tmp_path: Path) -> None:
    found = evaluate(*make(), output_dir=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv", index_col="index", dtype={"patient": str})
    again = Evaluation.from_predictions(table, found.classes, found.scoring, found.protocol)
    assert again.metrics == pytest.approx(found.metrics)
    assert again.intervals["score"] == pytest.approx(found.intervals["score"])
    assert str(again) == str(found)


def test_broken_logits_name_the_cycle(make: Make) -> None:
    model, data = make()
    data.side.logits[5, 1] = torch.nan
    row = data.side.cycles.iloc[5]
    with pytest.raises(
        ValueError, match=f"not finite for 1 of 90 cycles .first: recording '{row['recording']}', cycle 5"
    ):
        evaluate(model, data)
    assert model.training


def test_classes_must_fit(make: Make) -> None:
    model, data = make()
    model.classes = ("normal", "wheeze", "crackle", "both")
    with pytest.raises(LabelError, match="the model knows the classes"):
        evaluate(model, data)
    binary, _ = make(classes=("normal", "abnormal"))
    with pytest.raises(LabelError, match=r"output of shape \(32, 2\) for 32 cycles of a data set with 4 classes"):
        evaluate(binary, data)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (range(89), "gave 89 cycles, 89 different ones, of a table of 90"),
        ([*range(90), 0], "gave 91 cycles, 90 different ones"),
        ([0, *range(89)], "gave 90 cycles, 89 different ones"),
    ],
    ids=["missing", "padded", "twice"],
)
def test_every_cycle_must_come_once(make: Make, rows: Any, message: str) -> None:
    model, data = make()
    data.side.rows = rows
    with pytest.raises(ValueError, match=message):
        evaluate(model, data)


def test_any_order_of_cycles_gives_the_same(make: Make) -> None:
    model, data = make()
    expected = evaluate(model, data)
    data.side.rows = list(reversed(range(90)))
    data.batch_size = 7
    pd.testing.assert_frame_equal(evaluate(model, data).predictions, expected.predictions)


def test_an_unknown_split_is_named(make: Make) -> None:
    with pytest.raises(ValueError, match="split must be one of 'val', 'test', got 'train'"):
        evaluate(*make(), split="train")  # type: ignore[arg-type]


def test_figures_show_the_numbers(make: Make) -> None:
    found = evaluate(*make())
    (axes,) = found.plot_confusion().axes
    counts = [int(text.get_text().splitlines()[-1]) for text in axes.texts]
    assert counts == found.confusion.to_numpy().ravel().tolist()
    (axes,) = found.plot_groups().axes
    assert len(axes.get_yticklabels()) == len(found.by_group) + found.by_group["group"].nunique()
    assert len(found.plot_reliability().axes) == 2
