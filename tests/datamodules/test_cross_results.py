"""Train on one data set, test on others: the record, the audit, and what a result says of both."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import confusion_matrix

from respiro.datamodules import CrossDatasetDataModule, ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import SPRSound
from respiro.evaluation import evaluate
from respiro.evaluation.statistics import icbhi_score
from respiro.methods import SoundClassifier
from respiro.models import CNN6


def trained(data: Any, dataset: str | None = None) -> SoundClassifier:
    data.setup("fit")
    model = SoundClassifier(CNN6())
    model.history = [data.protocol | ({} if dataset is None else {"dataset": dataset})]
    return model


def test_a_result_knows_which_data_sets_the_model_saw(leaky_root: Path, children: Any) -> None:
    module = ICBHIDataModule(leaky_root, duration=0.5)
    cross = CrossDatasetDataModule(ICBHIDataModule(leaky_root), children, duration=0.5)
    # Trained across, tested at home: two patients are on both sides there.
    home = evaluate(trained(cross), module)
    assert home.disjoint is not None
    assert "the model was trained on another data set" not in str(home)
    assert "OTHER SPLIT" not in str(home)
    # Trained at home, tested across.
    both = CrossDatasetDataModule(ICBHIDataModule(leaky_root), [ICBHIDataModule(leaky_root), children], duration=0.5)
    mixed = evaluate(trained(module), both)
    assert mixed.disjoint is not None
    by_set = mixed.by_set.set_index("set")
    shared = {str(patient) for patient in mixed.protocol["shared_patients"]}
    rest = mixed.predictions[~mixed.predictions["patient"].isin(shared)]
    for name, part in [*rest.groupby("split"), ("all", rest)]:
        expected = icbhi_score(confusion_matrix(part["label"], part["prediction"], labels=range(4)))
        assert by_set.loc[name, "score_disjoint"] == pytest.approx(expected), name
    assert by_set.loc["all", "score_disjoint"] == mixed.disjoint["score"]
    assert "disjoint Score" in str(mixed)
    far = evaluate(trained(module), cross)
    assert far.disjoint is None  # nobody is shared
    assert "the model was trained on another data set" not in str(far)  # the train side of this record is the model's
    assert "score_disjoint" not in far.by_set
    # Trained at home, tested on the other data set by itself: its own train side is not the model's.
    children_alone = SPRSoundDataModule(children.hparams["root"], partial=True, task="icbhi4", duration=0.5)
    assert "the model was trained on another data set" in str(evaluate(trained(module), children_alone))
    # Trained on what another record only tests on: who was seen is not in that record.
    back = CrossDatasetDataModule(children, ICBHIDataModule(leaky_root), duration=0.5)
    assert "OTHER SPLIT" in str(evaluate(trained(module), back))
    assert "OTHER SPLIT" not in str(evaluate(trained(back), back))
    # More test sets do not change who trained.
    clean = ICBHIDataModule(leaky_root, protocol="official-clean")
    few, many = (CrossDatasetDataModule(clean, test, duration=0.5) for test in ([clean], [clean, children]))
    assert "OTHER SPLIT" not in str(evaluate(trained(few), many))
    assert "OTHER SPLIT" in str(evaluate(trained(both), many))


@pytest.mark.parametrize(("trained_by", "tested_by"), [("qlung", "drop"), ("drop", "drop")])
def test_another_label_map_than_that_of_the_training_is_said(
    trained_by: Any, tested_by: Any, icbhi: Any, children: Any
) -> None:
    # Another test set than that of the training is nothing to warn of, another label map is.
    model = trained(CrossDatasetDataModule(icbhi, icbhi, trained_by, duration=0.5))
    data = CrossDatasetDataModule(icbhi, children, tested_by, duration=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(model, data)
        evaluate(model, ICBHIDataModule(icbhi.hparams["root"], duration=0.5))  # whose maps have other names
    said = [str(warning.message) for warning in caught if "trained on labels" in str(warning.message)]
    assert len(said) == (trained_by != tested_by)
    assert all(f"labels '{trained_by} (" in text and f"they are '{tested_by} (" in text for text in said)


def test_the_record_is_plain_and_names_every_part(icbhi: Any, children: Any, ready: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, [icbhi, children], band=(50, 2000)))
    record = json.loads(json.dumps(data.protocol))
    assert record == data.protocol
    assert record["trained_on"] == ["ICBHI"]
    assert record["audio"]["band"] == [50.0, 2000.0]
    assert [(part["dataset"], part["partial"]) for part in record["parts"]] == [("ICBHI", False), ("SPRSound", True)]
    assert record["partial"] is True
    assert record["parts"][0]["data_digest"] == icbhi.data.digest
    assert record["labels"] == "qlung (rhonchi and stridor: wheeze)"
    assert record["vocabularies"]["device"][-1] == "Yunting II"
    assert set(data.protocol["metadata"]) == {"sex_age"}


def test_too_few_cycles_are_said_wherever_a_result_goes(icbhi: Any, children: Any, ready: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, children, duration=0.5), "test")
    counts = {name: part["class"].value_counts() for name, part in data.test_set.cycles.groupby("split")}
    few = {
        name: [label for label in data.classes if found.get(label, 0) < 10] for name, found in sorted(counts.items())
    }
    expected = {name: labels for name, labels in few.items() if labels}
    assert expected  # else this test shows nothing
    assert data.protocol["unmeasured"] == expected
    for name, labels in expected.items():
        for label in labels:
            (note,) = [note for note in data.protocol["notes"] if note.startswith(name) and repr(label) in note]
            assert f" {counts[name].get(label, 0) or 'no'} cycle" in note
    found = evaluate(SoundClassifier(CNN6()), data)
    assert "too few to measure" in str(found)
    assert found.by_set["set"].tolist() == [*sorted(counts), "all"]


def test_the_audit_counts_what_can_be_measured(icbhi: Any, children: Any, ready: Any) -> None:
    data = CrossDatasetDataModule(icbhi, [icbhi, children], label_map="drop", band=(50, 3000))
    audit = data.audit()
    assert list(audit.test) == ["ICBHI test", "SPRSound inter", "SPRSound intra"]
    plain = json.loads(json.dumps(audit.to_dict()))
    assert plain == audit.to_dict()
    module = ready(data, "test")
    for name, side in audit.test.items():
        part = module.test_set.cycles[module.test_set.cycles["split"] == name]
        assert (side.cycles, side.patients) == (len(part), part["patient"].nunique())
        assert side.classes == {label: int((part["class"] == label).sum()) for label in data.classes}
        assert side.unmeasured == tuple(label for label, count in side.classes.items() if count < 10)
        assert side.floor == 0.5
        rates = part.drop_duplicates("recording")["sample_rate"]
        assert side.sample_rates == rates.value_counts().to_dict()
        limits = [min(rate / 2, 3000, 8000) for rate in (rates.min(), rates.max())]
        assert list(side.highest) == limits
    assert sum(side["cycles"] for side in plain["test"].values()) == len(module.test_set)
    events = SPRSound(children.hparams["root"], "intra", "1-2", partial=True).cycles["event"].value_counts()
    dropped = {name: int(events[name]) for name in ("Rhonchi", "Stridor") if name in events}
    assert audit.test["SPRSound intra"].left_out == dropped
    text = str(audit)
    assert "band 50 to 3000 Hz" in text
    assert all(name in text for name in audit.test)
    assert "SPRSound inter: too few cycles to measure (fewer than 10):" in text


def test_bandwidths_that_differ_are_said(icbhi: Any, children: Any) -> None:
    text = str(CrossDatasetDataModule(icbhi, children).audit())
    assert "sound up to 4000 Hz, in train up to 2000 to 8000 Hz; band=(low, 2000) makes them alike" in text
    assert "makes them alike" not in str(CrossDatasetDataModule(icbhi, children, band=(50, 2000)).audit())
