"""Train on one data set, test on others: sides, label maps, checkpoints, configurations, real recordings."""

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
from torch.utils.data import DataLoader

from respiro.cli import main
from respiro.datamodules import CrossDatasetDataModule, ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI, SPRSound
from respiro.evaluation import evaluate
from respiro.methods import SoundClassifier
from respiro.methods._checkpoint import read_checkpoint
from respiro.models import CNN6
from respiro.splits import audit_leakage
from respiro.transforms import AudioQuality, LogMelSpectrogram

MAPS = ("drop", "qlung", "two-class")


def sets(data: Any) -> dict[str, int]:
    return data.test_set.cycles["split"].value_counts().to_dict()


@pytest.mark.parametrize("label_map", MAPS)
def test_icbhi_trains_and_all_test(label_map: Any, icbhi: Any, children: Any, ready: Any) -> None:
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
def test_sprsound_trains_and_all_test(label_map: Any, icbhi: Any, children: Any, ready: Any) -> None:
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


def test_one_test_side_alone(icbhi: Any, sprsound_root: Path, ready: Any) -> None:
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
def test_waveforms_are_those_of_the_data_sets(train: str, icbhi: Any, children: Any, ready: Any) -> None:
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


def test_validation_is_held_out_by_patient_as_in_the_data_set_alone(
    icbhi_root: Path, children: Any, ready: Any
) -> None:
    alone = ready(ICBHIDataModule(icbhi_root, val_fraction=0.3, seed=2))
    data = ready(CrossDatasetDataModule(ICBHIDataModule(icbhi_root), children, val_fraction=0.3, seed=2))
    patients = {f"ICBHI {name}" for name in alone.val_set.cycles["patient"]}
    assert set(data.val_set.cycles["patient"]) == patients
    assert patients.isdisjoint(data.train_set.cycles["patient"])
    assert not hasattr(data, "test_set")


def test_selecting_on_test_is_as_in_any_datamodule(icbhi: Any, children: Any, ready: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, children, select_on="test"))
    assert set(data.val_set.cycles["split"]) == {"SPRSound inter", "SPRSound intra"}
    assert set(data.train_set.cycles["split"]) == {"train"}
    assert data.protocol["select_on"] == "test"


def test_shared_patients_are_named_where_one_database_is_on_both_sides(
    leaky_root: Path, children: Any, ready: Any
) -> None:
    module = ICBHIDataModule(leaky_root)
    alone = ready(module, "test").protocol["shared_patients"]
    assert alone
    data = ready(CrossDatasetDataModule(module, [module, children]), "test")
    assert data.protocol["shared_patients"] == [f"ICBHI {name}" for name in alone]
    assert any(note.startswith("in train and in test: patients ICBHI") for note in data.protocol["notes"])
    assert ready(CrossDatasetDataModule(module, children), "test").protocol["shared_patients"] == []


def test_other_recordings_of_the_train_children_are_shared_patients(children: Any, icbhi: Any, ready: Any) -> None:
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


def test_the_clean_protocol_leaves_patients_out_whatever_is_tested_on(
    leaky_root: Path, children: Any, ready: Any
) -> None:
    clean = ICBHIDataModule(leaky_root, protocol="official-clean")
    shared = ready(ICBHIDataModule(leaky_root), "test").protocol["shared_patients"]
    alone = ready(clean)
    for test in (children, [clean, children]):
        data = ready(CrossDatasetDataModule(clean, test))
        assert data.protocol["protocol"] == "official-clean"
        assert data.protocol["shared_patients"] == []
        assert data.protocol["train"] == alone.protocol["train"]
        assert any("'left-out'" in note and f"ICBHI {shared[0]}" in note for note in data.protocol["notes"])


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


def test_features_are_kept_for_all_of_it(icbhi: Any, children: Any, tmp_path: Path, ready: Any) -> None:
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


def test_quality_is_that_of_the_data_sets(icbhi: Any, children: Any, ready: Any) -> None:
    data = ready(CrossDatasetDataModule(icbhi, [icbhi, children], duration=0.5), "test")
    quality = AudioQuality(rms="raw")  # which knows no train side
    data.add_quality(quality)
    alone = SPRSound(children.hparams["root"], "inter", "icbhi4", partial=True)
    alone.add_quality(AudioQuality(rms="raw"))
    found = data.test_set.cycles.query("split == 'SPRSound inter'")["quality"]
    np.testing.assert_array_equal(found, alone.cycles["quality"])
    assert data.test_set[len(data.test_set) - 1]["quality"] == data.test_set.cycles["quality"].iloc[-1]
    assert data.protocol["quality"]


def test_loader_processes_and_pickles_give_the_same(icbhi: Any, children: Any, ready: Any) -> None:
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
