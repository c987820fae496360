from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, recall_score

from respiro.evaluation import Evaluation, evaluate

Make = Callable[..., tuple[Any, Any]]
RANDOM = {"protocol": "random-recording", "leaky": True}
FOLD = {"protocol": "patient-fold-1"}
AUDIO = {"sample_rate": 16000, "duration": 8.0, "pad": "repeat", "fade": "recording", "resample": "recording"}


def test_disjoint_leaves_out_patients_of_the_train_side(make: Make) -> None:
    model, data = make(shared_patients=["101", "104"])
    found = evaluate(model, data)
    rest = found.predictions[~found.predictions["patient"].isin(["101", "104"])]
    assert found.disjoint is not None
    assert (found.disjoint["cycles"], found.disjoint["patients"]) == (len(rest), 7)
    assert found.disjoint["accuracy"] == pytest.approx(accuracy_score(rest["label"], rest["prediction"]))
    recall = recall_score(rest["label"], rest["prediction"], average=None)[3]
    assert found.disjoint["recall_both"] == pytest.approx(recall)
    assert "disjoint" in str(found)
    assert evaluate(model, data, split="val").disjoint is None
    assert evaluate(*make()).disjoint is None


def test_the_protocol_is_kept_and_printed_first(make: Make) -> None:
    model, data = make(notes=["two patients are on both sides"])
    model.protocol = {"dataset": "Table", "protocol": "official", "select_on": "val", "seed": 3, "training_seed": 11}
    found = evaluate(model, data)
    assert found.protocol["split"] == "test"
    assert found.protocol["seed"] == 7
    assert found.protocol["training"] == model.protocol
    assert "training_history" not in found.protocol
    assert len(found.protocol["weights_sha256"]) == 64
    lines = str(found).splitlines()
    assert lines[0] == "Table, protocol official, labels 4-class, test split"
    assert lines[1] == "selection on val, split seed 7, training seed 11"
    assert lines[2] == "note: two patients are on both sides"
    assert "***" not in str(found)
    assert set(found.versions) == {"respiro", "torch", "lightning", "python"}


@pytest.mark.parametrize(
    ("protocol", "training", "split", "expected"),
    [
        ({"select_on": "test"}, {}, "test", ["TEST-SELECTED"]),
        ({}, {"select_on": "test"}, "test", ["TEST-SELECTED"]),
        ({"leaky": True, "partial": True}, {}, "test", ["LEAKY", "PARTIAL"]),
        ({"protocol": "patient-fold-1"}, {"protocol": "patient-fold-0"}, "test", ["OTHER SPLIT"]),
        ({"seed": 0}, {"seed": 1}, "test", []),
        ({"seed": 0}, {"seed": 1}, "val", ["OTHER SPLIT"]),
        ({"seed": None}, {"seed": None}, "val", []),
        ({"protocol": "official"}, {"dataset": "Another", "protocol": "official-clean"}, "test", []),
        (RANDOM | {"seed": 0}, RANDOM | {"seed": 1}, "test", ["LEAKY", "OTHER SPLIT"]),
        (RANDOM | {"seed": 1}, RANDOM | {"seed": 1}, "test", ["LEAKY"]),
        (FOLD | {"folds": "drawn", "seed": 0}, FOLD | {"folds": "drawn", "seed": 1}, "test", ["OTHER SPLIT"]),
        (FOLD | {"folds": "given", "seed": 0}, FOLD | {"folds": "given", "seed": 1}, "test", []),
        (FOLD | {"folds": "drawn"}, FOLD | {"folds": "given"}, "test", ["OTHER SPLIT"]),
        (
            {"protocol": "official-clean", "test_splits": ["intra", "inter"]},
            {"protocol": "official-clean", "test_splits": ("inter", "intra")},
            "test",
            [],
        ),
        (
            {"protocol": "official-clean", "test_splits": ["intra", "inter"]},
            {"protocol": "official-clean", "test_splits": ["inter"]},
            "test",
            ["OTHER SPLIT"],
        ),
    ],
    ids=[
        "test-selected",
        "in-training",
        "leaky-partial",
        "other-fold",
        "seed-test",
        "seed-val",
        "no-seed",
        "cross",
        "random-other-seed",
        "random-same-seed",
        "drawn-other-seed",
        "given-other-seed",
        "drawn-given",
        "same-test-splits",
        "other-test-splits",
    ],
)
def test_stamps_are_on_all_that_leaves(
    make: Make,
    tmp_path: Path,
    protocol: dict[str, Any],
    training: dict[str, Any],
    split: Any,
    expected: list[str],
) -> None:
    model, data = make(30, **protocol)
    if training:
        model.protocol = {"dataset": "Table", "protocol": "official", "select_on": "val"} | training
    found = evaluate(model, data, split)
    assert [line.split("***")[1].strip() for line in str(found).splitlines() if "***" in line] == expected
    title = found.plot_confusion().get_suptitle()
    assert title.split("   ") == (expected or [""])
    assert (found.predictions["stamps"] == ";".join(expected)).all()


@pytest.mark.parametrize(
    ("training", "line"),
    [
        (None, "selection: not recorded, split seed 7"),
        ({}, "selection: not recorded, split seed 7"),
        ({"select_on": None}, "selection: not recorded, split seed 7, training seed not recorded"),
        ({"select_on": "val", "val_fraction": 0.2}, "selection on val, split seed 7, training seed not recorded"),
        (
            {"select_on": "val", "val_fraction": 0.0, "training_seed": 0},
            "selection: none (no validation side), split seed 7, training seed 0",
        ),
        (
            {"select_on": "test", "val_fraction": 0.0, "training_seed": 0},
            "selection on test, split seed 7, training seed 0",
        ),
    ],
    ids=["foreign", "never-trained", "no-rule", "val", "no-val", "test"],
)
def test_the_selection_rule_is_that_of_the_training(make: Make, training: dict[str, Any] | None, line: str) -> None:
    model, data = make(30, select_on="val", val_fraction=0.15)
    if training is not None:
        model.protocol = training
    assert str(evaluate(model, data)).splitlines()[1] == line


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({"select_on": "test"}, ["TEST-SELECTED"]),
        ({"leaky": True, "dataset": "Another"}, ["LEAKY"]),
        ({"partial": True}, ["PARTIAL"]),
        ({"protocol": "patient-fold-3"}, ["OTHER SPLIT"]),
        ({"protocol": "patient-fold-3", "dataset": "Another"}, []),
    ],
    ids=["test-selected", "leaky", "partial", "other-split", "other-split-of-another"],
)
def test_earlier_trainings_count(make: Make, earlier: dict[str, Any], expected: list[str]) -> None:
    model, data = make(30)
    model.protocol = {"dataset": "Table", "protocol": "official", "select_on": "val", "val_fraction": 0.15}
    model.history = [model.protocol | earlier, model.protocol]
    found = evaluate(model, data)
    assert found.protocol["training"] == model.protocol
    assert found.protocol["training_history"] == model.history
    assert [line.split("***")[1].strip() for line in str(found).splitlines() if "***" in line] == expected
    assert str(found).splitlines()[1].startswith("selection on val")


@pytest.mark.parametrize(
    ("datasets", "shown"),
    [([], True), (["Table"], True), (["Another"], False), (["Table", "Another"], True), (["Another", "Other"], False)],
    ids=["no-record", "same", "another", "same-before", "others"],
)
def test_patients_are_shared_only_with_a_model_that_saw_the_data_set(
    make: Make, datasets: list[str], shown: bool
) -> None:
    model, data = make(shared_patients=["101", "104"])
    model.history = [{"dataset": name, "select_on": "val"} for name in datasets]
    model.protocol = model.history[-1] if datasets else {}
    assert (evaluate(model, data).disjoint is not None) == shown


def test_stamps_travel_with_the_table(make: Make, tmp_path: Path) -> None:
    found = evaluate(*make(leaky=True, partial=True), output_dir=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv", index_col="index", dtype={"patient": str})
    assert (table["stamps"] == "LEAKY;PARTIAL").all()
    bare = {"dataset": "Table", "partial": True}
    again = Evaluation.from_predictions(table, found.classes, found.scoring, bare)
    assert again.protocol["stamps"] == ["LEAKY"]
    assert (again.predictions["stamps"] == "PARTIAL;LEAKY").all()
    assert "*** LEAKY *** so marked in the table of predictions" in str(again)
    assert bare == {"dataset": "Table", "partial": True}


def test_the_sampling_rate_must_fit(make: Make) -> None:
    model, data = make(audio=AUDIO | {"sample_rate": 4000})
    model.audio = AUDIO
    with pytest.raises(ValueError, match=r"sound at 16000 Hz, the data module gives it at 4000 Hz.*sample_rate=16000"):
        evaluate(model, data)


def test_other_reading_settings_are_named_once(make: Make) -> None:
    model, data = make(30, audio=AUDIO | {"duration": 5.0, "fade": "none"})
    model.audio = AUDIO
    with pytest.warns(UserWarning, match="otherwise than the model") as caught:
        evaluate(model, data)
    (warning,) = caught
    assert "duration 5.0 instead of 8.0, fade 'none' instead of 'recording'" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)


def test_another_scoring_than_in_training_is_named(make: Make) -> None:
    model, data = make(30)
    model.protocol = {"dataset": "Another", "scoring": "sprsound"}
    with pytest.warns(UserWarning, match="scored by 'sprsound'; this data set is scored by 'icbhi'"):
        evaluate(model, data)


@pytest.mark.parametrize("audio", [None, {}, AUDIO], ids=["none", "empty", "same"])
def test_fitting_settings_are_silent(make: Make, audio: Any) -> None:
    model, data = make(30, audio=AUDIO)
    model.audio = audio
    model.protocol = {"dataset": "Table", "scoring": "icbhi"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, data)
