"""Training on one data set and testing on others: sides, labels, names, record, audit, checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from sklearn.metrics import confusion_matrix
from torch.utils.data import DataLoader

from respiro.cli import main
from respiro.datamodules import CrossDatasetDataModule, ICBHIDataModule, SPRSoundDataModule
from respiro.datamodules.base import RespiratoryDataModule
from respiro.datasets import ICBHI, SPRSound, write_synthetic_icbhi
from respiro.datasets._joined import JoinedDataset, Side
from respiro.errors import DatasetNotFoundError, LabelError
from respiro.evaluation import evaluate
from respiro.evaluation.statistics import icbhi_score
from respiro.methods import SoundClassifier
from respiro.methods._checkpoint import read_checkpoint
from respiro.models import CNN6
from respiro.splits import audit_leakage
from respiro.transforms import AudioQuality, LogMelSpectrogram

MAPS = ("drop", "qlung", "two-class")


@pytest.fixture(scope="session")
def leaky_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic ICBHI large enough to have a patient on both sides, as the real one has two."""
    return Path(write_synthetic_icbhi(tmp_path_factory.mktemp("leaky") / "icbhi", num_patients=16))


@pytest.fixture
def icbhi(icbhi_root: Path) -> ICBHIDataModule:
    return ICBHIDataModule(icbhi_root)


@pytest.fixture
def children(sprsound_root: Path) -> SPRSoundDataModule:
    return SPRSoundDataModule(sprsound_root, partial=True)


def ready(data: RespiratoryDataModule, stage: str = "fit") -> Any:
    data.prepare_data()
    data.setup(stage)
    return data


def sets(data: Any) -> dict[str, int]:
    return data.test_set.cycles["split"].value_counts().to_dict()


@pytest.mark.parametrize("label_map", MAPS)
def test_icbhi_trains_and_all_test(label_map: Any, icbhi: Any, children: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, [icbhi, children], label_map), "test")
    data.setup("fit")
    own = {"labels": "2-class" if label_map == "two-class" else "4-class"}
    theirs = {"task": "icbhi2"} if label_map == "two-class" else {"task": "icbhi4"}
    theirs |= {"rhonchi_stridor": "drop"} if label_map == "drop" else {}
    root, far = icbhi.hparams["root"], children.hparams["root"]
    train = ICBHI(root, "train", **own)  # type: ignore[arg-type]
    expected = {"ICBHI test": ICBHI(root, "test", **own)}  # type: ignore[arg-type]
    for side in ("inter", "intra"):
        expected[f"SPRSound {side}"] = SPRSound(far, side, partial=True, **theirs)  # type: ignore[arg-type, assignment]
    assert data.classes == data.data.classes == train.classes
    assert np.add(data.train_set.class_counts, data.val_set.class_counts).tolist() == train.class_counts
    assert sets(data) == {name: len(part) for name, part in expected.items()}
    for name, part in expected.items():
        rows = data.test_set.cycles[data.test_set.cycles["split"] == name]
        assert part.classes == data.classes
        assert rows["label"].tolist() == part.cycles["label"].tolist()
        assert rows["recording"].tolist() == [f"{name.split()[0]} {one}" for one in part.cycles["recording"]]
    assert data.protocol["tested_on"] == ["ICBHI", "SPRSound"]


@pytest.mark.parametrize("label_map", MAPS)
def test_sprsound_trains_and_all_test(label_map: Any, icbhi: Any, children: Any) -> None:
    data = ready(CrossDatasetDataModule(children, [icbhi, children], label_map, val_fraction=0.0), "test")
    data.setup("fit")
    task = "icbhi2" if label_map == "two-class" else "icbhi4"
    policy = "drop" if label_map == "drop" else "wheeze"
    train = SPRSound(children.hparams["root"], "train", task, partial=True, rhonchi_stridor=policy)  # type: ignore[arg-type]
    assert data.train_set.class_counts == data.class_counts == train.class_counts
    assert set(sets(data)) == {"ICBHI test", "SPRSound inter", "SPRSound intra"}
    left_out = data.data.left_out["event"].unique().tolist()
    assert sorted(left_out) == (["Rhonchi", "Stridor"] if label_map == "drop" else [])
    assert data.protocol["left_out_by_labels"] == len(data.data.left_out)


def test_one_test_side_alone(icbhi: Any, sprsound_root: Path) -> None:
    inter = SPRSoundDataModule(sprsound_root, partial=True, test_side="inter")
    data = ready(CrossDatasetDataModule(icbhi, inter), "test")
    assert set(sets(data)) == {"SPRSound inter"}
    assert data.protocol["test_splits"] == ["SPRSound inter"]
    assert data.protocol["dataset"] == "ICBHI to SPRSound inter"


def test_later_releases_are_named_by_their_year(icbhi: Any) -> None:
    later = [SPRSoundDataModule("anywhere", year=year) for year in (2023, 2024)]
    data = CrossDatasetDataModule(icbhi, [SPRSoundDataModule("anywhere"), *later])
    names = ("SPRSound inter", "SPRSound intra", "SPRSound test 2023", "SPRSound test 2024")
    assert data.test_splits == names


@pytest.mark.parametrize("train", ["icbhi", "children"])
def test_waveforms_are_those_of_the_data_sets(train: str, icbhi: Any, children: Any) -> None:
    modules = {"icbhi": icbhi, "children": children}
    data = ready(CrossDatasetDataModule(modules[train], [icbhi, children], duration=1.5, band=(100, 2000)), "test")
    reading: dict[str, Any] = {"duration": 1.5, "band": (100, 2000)}
    alone: dict[str, Any] = {
        "ICBHI": ICBHI(icbhi.hparams["root"], "all", **reading),
        "SPRSound": SPRSound(children.hparams["root"], "all", "icbhi4", partial=True, **reading),
    }
    for row in range(0, len(data.test_set), 37):
        cycle = data.test_set.cycles.iloc[row]
        part = alone[cycle["dataset"]]
        name = cycle["recording"].removeprefix(cycle["dataset"] + " ")
        (same,) = np.flatnonzero((part.cycles["recording"] == name) & (part.cycles["cycle"] == cycle["cycle"]))
        torch.testing.assert_close(data.test_set[row]["waveform"], part[same]["waveform"], rtol=0, atol=0)
        assert data.test_set[row]["length"] == part[same]["length"]
    first = alone["ICBHI" if train == "icbhi" else "SPRSound"]
    assert data.protocol["audio"] == first.reading


def test_validation_is_held_out_by_patient_as_in_the_data_set_alone(icbhi_root: Path, children: Any) -> None:
    alone = ready(ICBHIDataModule(icbhi_root, val_fraction=0.3, seed=2))
    data = ready(CrossDatasetDataModule(ICBHIDataModule(icbhi_root), children, val_fraction=0.3, seed=2))
    patients = {f"ICBHI {name}" for name in alone.val_set.cycles["patient"]}
    assert set(data.val_set.cycles["patient"]) == patients
    assert patients.isdisjoint(data.train_set.cycles["patient"])
    assert not hasattr(data, "test_set")


def test_selecting_on_test_is_as_in_any_datamodule(icbhi: Any, children: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, children, select_on="test"))
    assert set(data.val_set.cycles["split"]) == {"SPRSound inter", "SPRSound intra"}
    assert set(data.train_set.cycles["split"]) == {"train"}
    assert data.protocol["select_on"] == "test"


def test_shared_patients_are_named_where_one_database_is_on_both_sides(leaky_root: Path, children: Any) -> None:
    module = ICBHIDataModule(leaky_root)
    alone = ready(module, "test").protocol["shared_patients"]
    assert alone
    data = ready(CrossDatasetDataModule(module, [module, children]), "test")
    assert data.protocol["shared_patients"] == [f"ICBHI {name}" for name in alone]
    assert any(note.startswith("in train and in test: patients ICBHI") for note in data.protocol["notes"])
    assert ready(CrossDatasetDataModule(module, children), "test").protocol["shared_patients"] == []


def test_other_recordings_of_the_train_children_are_shared_patients(children: Any, icbhi: Any) -> None:
    data = ready(CrossDatasetDataModule(children, [icbhi, children], duration=0.5), "test")
    data.setup("fit")
    cycles = data.test_set.cycles
    seen = set(data.train_set.cycles["patient"]) | set(data.val_set.cycles["patient"])
    both = seen & set(cycles["patient"])
    assert both == seen & set(cycles.query("split == 'SPRSound intra'")["patient"])
    assert data.protocol["shared_patients"] == sorted(both)
    model = SoundClassifier(CNN6())
    model.history = [data.protocol]
    found = evaluate(model, data)
    rest = cycles[~cycles["patient"].isin(both)]
    assert found.disjoint is not None
    assert found.disjoint["cycles"] == len(rest) < len(cycles)
    assert set(rest["split"]) <= {"ICBHI test", "SPRSound inter", "SPRSound intra"}
    audit = audit_leakage(data.train_set.cycles, data.test_set.cycles, data.data.all_recordings)
    assert set(audit.shared_patients) <= both


def test_the_clean_protocol_leaves_patients_out_whatever_is_tested_on(leaky_root: Path, children: Any) -> None:
    clean = ICBHIDataModule(leaky_root, protocol="official-clean")
    shared = ready(ICBHIDataModule(leaky_root), "test").protocol["shared_patients"]
    alone = ready(clean)
    for test in (children, [clean, children]):
        data = ready(CrossDatasetDataModule(clean, test))
        assert data.protocol["protocol"] == "official-clean"
        assert data.protocol["shared_patients"] == []
        assert data.protocol["train"] == alone.protocol["train"]
        assert any("'left-out'" in note and f"ICBHI {shared[0]}" in note for note in data.protocol["notes"])


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


def test_the_record_is_plain_and_names_every_part(icbhi: Any, children: Any) -> None:
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


def test_too_few_cycles_are_said_wherever_a_result_goes(icbhi: Any, children: Any) -> None:
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


def test_the_audit_counts_what_can_be_measured(icbhi: Any, children: Any) -> None:
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


@pytest.mark.parametrize("select_on", ["val", "test"])
def test_a_checkpoint_rebuilds_it(select_on: Any, icbhi: Any, children: Any, tmp_path: Path) -> None:
    data = CrossDatasetDataModule(icbhi, [icbhi, children], duration=0.5, band=(50, 2000), select_on=select_on)
    model = SoundClassifier(CNN6())
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=1, accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    record = read_checkpoint(path)["respiro"]["data"]
    assert json.loads(json.dumps(record)) == record
    assert record["class_path"] == "respiro.datamodules.CrossDatasetDataModule"
    again = CrossDatasetDataModule(**record["init_args"])
    assert dict(again.hparams) == dict(data.hparams)
    restored = SoundClassifier.load_from_checkpoint(path, weights_only=True)
    found, same = evaluate(model, data), evaluate(restored, again)
    pd.testing.assert_frame_equal(found.predictions, same.predictions)
    main(["test", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["score"] == pytest.approx(found.metrics["score"])
    assert [row["set"] for row in result["by_set"]] == ["ICBHI test", "SPRSound inter", "SPRSound intra", "all"]
    assert ("TEST-SELECTED" in result["stamps"]) is (select_on == "test")


@pytest.mark.parametrize("several", [True, False])
def test_fit_takes_it_from_a_config(several: bool, icbhi_root: Path, sprsound_root: Path, tmp_path: Path) -> None:
    icbhi = {"class_path": "ICBHIDataModule", "init_args": {"root": str(icbhi_root), "protocol": "official-clean"}}
    far = {"class_path": "respiro.datamodules.SPRSoundDataModule"}
    far |= {"init_args": {"root": str(sprsound_root), "partial": True, "test_side": "inter"}}  # type: ignore[dict-item]
    arguments = {"train": icbhi, "test": [icbhi, far] if several else far, "label_map": "two-class"}
    arguments |= {"duration": 1.0, "band": [50, 2000], "batch_size": 4}  # type: ignore[dict-item]
    config = {
        "data": {"class_path": "CrossDatasetDataModule", "init_args": arguments},
        "trainer": {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "accelerator": "cpu"},
    }
    config["trainer"] |= {"default_root_dir": str(tmp_path), "enable_progress_bar": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    main(["test", str(checkpoint), "--output", str(tmp_path / "out"), "--device", "cpu", "--data.batch_size", "8"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["classes"] == ["normal", "abnormal"]
    assert result["protocol"]["test_splits"] == (["ICBHI test"] if several else []) + ["SPRSound inter"]
    assert result["protocol"]["audio"]["band"] == [50.0, 2000.0]


def test_features_are_kept_for_all_of_it(icbhi: Any, children: Any, tmp_path: Path) -> None:
    data = CrossDatasetDataModule(icbhi, children, duration=0.5, feature_cache=True, cache_dir=tmp_path)
    ready(data, "test").setup("fit")
    front = LogMelSpectrogram()
    data.cache_features(front, front.spec())
    for side in (data.train_set, data.test_set):
        sample = side[len(side) - 1]
        expected = front(sample["waveform"][None])[0].half()
        torch.testing.assert_close(sample["features"], expected, atol=1e-2, rtol=1e-2)
    kept = {path.name for path in (tmp_path / "features").iterdir() if path.is_dir()}
    other = CrossDatasetDataModule(children, icbhi, duration=0.5, cache_dir=tmp_path)
    ready(other).cache_features(front, front.spec())
    assert len({path.name for path in (tmp_path / "features").iterdir() if path.is_dir()} - kept) == 1


def test_quality_is_that_of_the_data_sets(icbhi: Any, children: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, [icbhi, children], duration=0.5), "test")
    quality = AudioQuality(rms="raw")  # which knows no train side
    data.add_quality(quality)
    alone = SPRSound(children.hparams["root"], "inter", "icbhi4", partial=True)
    alone.add_quality(AudioQuality(rms="raw"))
    found = data.test_set.cycles.query("split == 'SPRSound inter'")["quality"]
    np.testing.assert_array_equal(found, alone.cycles["quality"])
    assert data.test_set[len(data.test_set) - 1]["quality"] == data.test_set.cycles["quality"].iloc[-1]
    assert data.protocol["quality"]


def test_loader_processes_and_pickles_give_the_same(icbhi: Any, children: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, [icbhi, children], duration=0.5), "test").test_set
    again = pickle.loads(pickle.dumps(data))
    rows = [0, len(data) // 2, len(data) - 1]
    for row in rows:
        torch.testing.assert_close(again[row]["waveform"], data[row]["waveform"], rtol=0, atol=0)
    part = data.subset(data.cycles.index[rows])
    loader = DataLoader(part, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    (batch,) = list(loader)
    assert batch["index"].tolist() == data.cycles.index[rows].tolist()
    torch.testing.assert_close(batch["waveform"][2], data[rows[2]]["waveform"], rtol=0, atol=0)


COMMON = [
    (ICBHIDataModule, "labels", "2-class", "label_map"),
    (SPRSoundDataModule, "task", "1-2", "label_map"),
    (SPRSoundDataModule, "rhonchi_stridor", "drop", "label_map"),
    (ICBHIDataModule, "batch_size", 8, "batch_size"),
    (SPRSoundDataModule, "val_fraction", 0.3, "val_fraction"),
    (ICBHIDataModule, "select_on", "test", "select_on"),
    (ICBHIDataModule, "band", (100, 1000), "band"),
    (SPRSoundDataModule, "duration", 5.0, "duration"),
    (ICBHIDataModule, "metadata", {"place": ["device"]}, "metadata"),
    (ICBHIDataModule, "cache_dir", "somewhere", "cache_dir"),
    (SPRSoundDataModule, "age_threshold", 7.0, "age_threshold"),
]


@pytest.mark.parametrize(("build", "argument", "value", "whole"), COMMON, ids=[f"{row[1]}" for row in COMMON])
def test_what_is_common_is_said_once(build: Any, argument: str, value: Any, whole: str) -> None:
    source = build("anywhere", **{argument: value})
    plain = {"class_path": f"respiro.datamodules.{build.__name__}", "init_args": {"root": "x", argument: value}}
    for where, sides in (
        ("train", (source, ICBHIDataModule("x"))),
        ("test[0]", (SPRSoundDataModule("y"), source)),
        ("train", (plain, ICBHIDataModule("x"))),
    ):
        with pytest.raises(
            ValueError,
            match=rf"^{where.replace('[', '.').replace(']', '.')}: {argument} .*got {argument}=.*give {whole} to",
        ):
            CrossDatasetDataModule(*sides)
    if whole == argument:  # two that say the same agree
        CrossDatasetDataModule(source, SPRSoundDataModule("y"), **{argument: value})


def test_labels_that_agree_with_the_map_are_fine() -> None:
    spr = SPRSoundDataModule("y", task="icbhi4", rhonchi_stridor="drop")
    CrossDatasetDataModule(ICBHIDataModule("x"), spr, label_map="drop")
    CrossDatasetDataModule(ICBHIDataModule("x", labels="2-class"), SPRSoundDataModule("y"), label_map="two-class")


class Mine(ICBHIDataModule):
    """A datamodule that somebody derived."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": Mine("x")}, "train must be one of ICBHIDataModule or SPRSoundDataModule, .* got Mine"),
        ({"test": [SPRSoundDataModule("y"), 3]}, r"test\[1\] must be one of .* got int"),
        ({"train": {"class_path": "mylab.Data"}}, "train must be one of .* got 'mylab.Data'"),
        ({"test": []}, "it is empty"),
        ({"test": [SPRSoundDataModule("y"), SPRSoundDataModule("z")]}, "'SPRSound inter' stands in it twice"),
        ({"train": ICBHIDataModule("x", protocol="patient-fold-0")}, "train: protocol must be one of 'official'"),
        ({"label_map": "4-class"}, "label_map must be one of 'drop', 'qlung', 'two-class', got '4-class'"),
        ({"band": (0, 9000)}, "band must be two numbers"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_arguments_are_named_before_any_file_is_read(arguments: Any, message: str) -> None:
    given = {"train": ICBHIDataModule("x"), "test": SPRSoundDataModule("y")} | arguments
    with pytest.raises(ValueError, match=message):
        CrossDatasetDataModule(**given)


def without(root: Path, folder: Path, keep: Any) -> Path:
    """Copy a synthetic SPRSound, with only the events that *keep* takes."""
    for path in sorted(root.rglob("*.json")):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        record = json.loads(path.read_text())
        if "event_annotation" in record:
            record["event_annotation"] = [event for event in record["event_annotation"] if keep(path, event["type"])]
            record.pop("record_annotation", None)
        target.write_text(json.dumps(record))
    for path in root.rglob("*.wav"):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return folder


def test_a_class_that_cannot_be_learnt_is_named(sprsound_root: Path, icbhi: Any, tmp_path: Path) -> None:
    root = without(sprsound_root, tmp_path / "copy", lambda _, event: event != "Wheeze+Crackle")
    train = SPRSoundDataModule(root, partial=True)
    data = CrossDatasetDataModule(train, icbhi, label_map="drop")
    with pytest.raises(LabelError, match=r"label_map 'drop', SPRSound has no train cycle of 'both'"):
        data.setup("fit")
    ready(CrossDatasetDataModule(train, icbhi, label_map="two-class"))


def test_a_test_set_without_cycles_is_named(sprsound_root: Path, icbhi: Any, tmp_path: Path) -> None:
    root = without(sprsound_root, tmp_path / "copy", lambda path, _: "inter" not in path.parent.name)
    data = CrossDatasetDataModule(icbhi, SPRSoundDataModule(root, partial=True))
    with pytest.raises(ValueError, match="the test set 'SPRSound inter' has no cycle under label_map 'qlung'"):
        data.setup("test")


def test_a_release_without_a_train_side_tests_but_does_not_train(
    sprsound_root: Path, icbhi: Any, tmp_path: Path
) -> None:
    later = tmp_path / "BioCAS2023"
    for kind, folder in (("json", "test_json/intra_test_json"), ("wav", "test_wav")):
        (later / f"test2023_{kind}").mkdir(parents=True)
        names = {path.stem for path in (sprsound_root / "test_json" / "intra_test_json").iterdir()}
        for path in sorted((sprsound_root / folder).iterdir()):
            if path.stem in names:
                (later / f"test2023_{kind}" / path.name).symlink_to(path)
    source = SPRSoundDataModule(tmp_path, year=2023, partial=True)
    data = ready(CrossDatasetDataModule(icbhi, source), "test")
    assert set(sets(data)) == {"SPRSound test 2023"}
    with pytest.raises(DatasetNotFoundError, match="has no train side"):
        CrossDatasetDataModule(source, icbhi).setup("fit")
    # The same children under another release: known by their names.
    mixed = ready(CrossDatasetDataModule(SPRSoundDataModule(sprsound_root, partial=True), source), "test")
    assert mixed.protocol["shared_patients"]


def test_one_recording_cannot_be_on_two_sides(icbhi_root: Path) -> None:
    data = ICBHI(icbhi_root, "all")
    with pytest.raises(LabelError, match="recordings stand on two sides: ICBHI 101"):
        JoinedDataset([Side(data, "ICBHI", data.all_cycles), Side(data, "ICBHI", data.all_cycles.iloc[:1])])
    two = ICBHI(icbhi_root, "all", labels="2-class")
    with pytest.raises(LabelError, match="only data sets with the same classes"):
        JoinedDataset([Side(data, "ICBHI", data.all_cycles), Side(two, "two", two.all_cycles)])


def mini(shared: Any, label_map: str, name: str, back: bool = False) -> CrossDatasetDataModule:
    icbhi = ICBHIDataModule(shared(f"data/{name}"), partial=True)
    children = SPRSoundDataModule(shared("data/sprsound_mini"), partial=True)
    sources = (children, [icbhi, children]) if back else (icbhi, [icbhi, children])
    return CrossDatasetDataModule(*sources, label_map=label_map)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:1 recordings have another device")
@pytest.mark.parametrize("name", ["icbhi_mini", "icbhi_4k"])
@pytest.mark.parametrize("label_map", MAPS)
def test_real_recordings_have_the_expected_counts(label_map: str, name: str, shared: Any) -> None:
    expected = json.loads((shared("data/sprsound_mini") / "expected_counts.json").read_text())["splits"]
    key = {"drop": "icbhi4/drop", "qlung": "icbhi4/wheeze", "two-class": "icbhi2"}[label_map]
    for back in (False, True):
        audit = mini(shared, label_map, name, back).audit()
        sides = {"inter": audit.test["SPRSound inter"], "intra": audit.test["SPRSound intra"]}
        for side, found in (sides | ({"train": audit.train} if back else {})).items():
            counts = dict(expected[side]["label_maps"][key])
            assert sum(found.left_out.values()) == counts.pop("dropped", 0)
            assert found.classes == counts
        if label_map != "two-class":
            assert audit.test["SPRSound inter"].unmeasured == ("both",)
            assert audit.test["SPRSound intra"].unmeasured == ("both",)


@pytest.mark.filterwarnings("ignore:1 recordings have another device")
def test_the_real_icbhi_shares_its_two_patients(shared: Any) -> None:
    audit = mini(shared, "qlung", "icbhi_4k").audit()
    assert audit.test["ICBHI test"].shared_patients == ("ICBHI 156", "ICBHI 218")
    assert audit.test["ICBHI test"].classes == {"normal": 1579, "crackle": 649, "wheeze": 385, "both": 143}
    assert audit.train.classes == {"normal": 2063, "crackle": 1215, "wheeze": 501, "both": 363}
    assert audit.test["SPRSound inter"].shared_patients == ()
    assert mini(shared, "qlung", "icbhi_4k", back=True).audit().test["SPRSound inter"].shared_patients == ()
