"""Sides, protocol record and loaders of the datamodules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datamodules.base import RespiratoryDataModule
from respiro.datasets import ICBHI
from respiro.datasets.icbhi import respirenet_folds
from respiro.errors import DatasetNotFoundError


def ready(data: RespiratoryDataModule, stage: str = "fit") -> Any:
    data.prepare_data()
    data.setup(stage)
    return data


def patients(data: Any) -> set[str]:
    return set(data.cycles["patient"])


def test_validation_is_held_out_by_patient(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, val_fraction=0.3))
    assert patients(data.train_set).isdisjoint(patients(data.val_set))
    official = ICBHI(icbhi_root, split="train").cycles.index
    assert sorted([*data.train_set.cycles.index, *data.val_set.cycles.index]) == sorted(official)
    assert not hasattr(data, "test_set")  # fitting must not open the test side


def test_the_test_side_is_the_official_one(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root), "test")
    assert data.test_set.cycles.index.tolist() == ICBHI(icbhi_root, split="test").cycles.index.tolist()


def test_selecting_on_test_trains_on_the_whole_train_side_and_says_so(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, select_on="test"))
    assert data.train_set.cycles.index.tolist() == ICBHI(icbhi_root, split="train").cycles.index.tolist()
    assert data.val_set.cycles.index.tolist() == ICBHI(icbhi_root, split="test").cycles.index.tolist()
    assert data.protocol["select_on"] == "test"


@pytest.mark.parametrize(
    ("protocol", "leaky"),
    [("official", False), ("official-clean", False), ("patient-fold-1", False), ("random-recording", True)],
)
def test_the_protocol_record_is_plain_and_complete(icbhi_root: Path, protocol: str, leaky: bool) -> None:
    data = ready(ICBHIDataModule(icbhi_root, protocol=protocol, seed=3))
    record = json.loads(json.dumps(data.protocol))
    assert record == data.protocol
    assert record["leaky"] is leaky
    assert {"dataset", "protocol", "labels", "classes", "select_on", "seed", "partial", "audio", "metadata"} <= set(
        record
    )
    assert record["dataset"] == "ICBHI"
    assert record["seed"] == 3
    if protocol != "random-recording":
        assert patients(data.train_set).isdisjoint(patients(data.val_set))


def test_folds_are_the_published_ones_and_the_record_says_so(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, protocol="patient-fold-1"), "test")
    assert {respirenet_folds()[patient] for patient in patients(data.test_set)} == {1}
    assert data.protocol["folds"] == "published"


def test_the_record_names_the_release_and_the_data(sprsound_root: Path) -> None:
    data = ready(SPRSoundDataModule(sprsound_root, partial=True))
    assert data.protocol["year"] == 2022
    assert data.protocol["commit"] is None
    assert data.protocol["recordings_without_events"] > 0
    assert len(data.protocol["data_digest"]) == 64


def test_settings_are_plain_and_mean_the_same_elsewhere(icbhi_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(icbhi_root.parent)
    data = ICBHIDataModule(icbhi_root.name, seed=np.int64(1), cache_dir=Path("cache"))  # type: ignore[arg-type]
    monkeypatch.chdir("/")
    assert data.hparams["root"] == str(icbhi_root)
    assert data.hparams["cache_dir"] == str(icbhi_root.parent / "cache")
    assert type(data.hparams["seed"]) is int
    data.setup("fit")


def test_a_copy_without_a_train_side_says_so(sprsound_root: Path, tmp_path: Path) -> None:
    shutil.copytree(sprsound_root / "test_json" / "intra_test_json", tmp_path / "BioCAS2023" / "test2023_json")
    shutil.copytree(sprsound_root / "test_wav", tmp_path / "BioCAS2023" / "test2023_wav")
    for extra in (tmp_path / "BioCAS2023" / "test2023_wav").iterdir():
        if not (tmp_path / "BioCAS2023" / "test2023_json" / f"{extra.stem}.json").exists():
            extra.unlink()
    data = SPRSoundDataModule(tmp_path, year=2023, partial=True)
    with pytest.raises(DatasetNotFoundError, match="no train side"):
        data.setup("test")


def test_batches_have_the_documented_keys_and_types(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, batch_size=3, duration=2.0, sample_rate=8000))
    batch = next(iter(data.train_dataloader()))
    assert batch["waveform"].shape == (3, 16000)
    assert batch["waveform"].dtype == batch["quality"].dtype == torch.float32
    assert torch.isnan(batch["quality"]).all()
    for name in ("label", "index", "length", "patient", "device", "location", "sex", "age_group", "sex_age"):
        assert batch[name].dtype == torch.int64, name
        assert batch[name].shape == (3,)
    rows = data.train_set.all_cycles.loc[batch["index"]]
    assert rows["label"].tolist() == batch["label"].tolist()


def test_the_patients_of_one_seed_stay_the_same(icbhi_root: Path) -> None:
    first, second = (ready(ICBHIDataModule(icbhi_root, seed=5)).val_set.cycles.index.tolist() for _ in range(2))
    assert first == second


def test_without_a_validation_side_there_is_no_loader(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, val_fraction=0.0))
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="val_fraction is 0"):
        data.setup("validate")


@pytest.mark.parametrize("side", ["inter", "intra", "both"])
@pytest.mark.parametrize("task", ["1-1", "2-2", "icbhi4"])
def test_sprsound_sides(sprsound_root: Path, side: Any, task: Any) -> None:
    data = ready(SPRSoundDataModule(sprsound_root, task=task, test_side=side, partial=True), "test")
    expected = {"inter", "intra"} if side == "both" else {side}
    assert set(data.test_set.cycles["split"]) == expected
    assert data.protocol["test_splits"] == sorted(expected)
    assert data.protocol["partial"] is True
    assert data.scoring == ("icbhi" if task == "icbhi4" else "sprsound")


@pytest.mark.parametrize("build", [ICBHIDataModule, SPRSoundDataModule])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[
            ("batch_size", 0),
            ("val_fraction", 1.0),
            ("val_fraction", -0.1),
            ("select_on", "train"),
            ("num_workers", -1),
        ],
        *[("seed", -1), ("pad", "circular"), ("fade", "both"), ("duration", 0.0), ("sample_rate", 16000.5)],
    ],
)
def test_wrong_values_are_named(build: Any, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        build("anywhere", **{argument: value})


@pytest.mark.parametrize(
    ("build", "argument", "value"),
    [
        (SPRSoundDataModule, "test_side", "outer"),
        (SPRSoundDataModule, "task", "3-1"),
        (SPRSoundDataModule, "year", 2021),
        (SPRSoundDataModule, "rhonchi_stridor", "crackle"),
        (ICBHIDataModule, "labels", "5-class"),
        (ICBHIDataModule, "protocol", "offical"),
    ],
)
def test_wrong_choices_are_named_before_any_file_is_read(build: Any, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be one of"):
        build("anywhere", **{argument: value})
