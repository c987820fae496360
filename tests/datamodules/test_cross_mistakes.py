"""Train on one data set, test on others: sources that do not fit, and data that cannot be learnt or measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from respiro.datamodules import CrossDatasetDataModule, ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI
from respiro.datasets._joined import JoinedDataset, Side
from respiro.errors import DatasetNotFoundError, LabelError

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


def test_a_class_that_cannot_be_learnt_is_named(sprsound_root: Path, icbhi: Any, tmp_path: Path, ready: Any) -> None:
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
    sprsound_root: Path, icbhi: Any, tmp_path: Path, ready: Any
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
    assert set(data.test_set.cycles["split"]) == {"SPRSound test 2023"}
    with pytest.raises(DatasetNotFoundError, match="has no train side"):
        CrossDatasetDataModule(source, icbhi).setup("fit")
    # The same children under another release: known by their names.
    mixed = ready(CrossDatasetDataModule(SPRSoundDataModule(sprsound_root, partial=True), source), "test")
    assert mixed.protocol["shared_patients"]


def test_a_copy_with_test_sides_alone_tests_but_does_not_train(sprsound_root: Path, icbhi: Any, tmp_path: Path) -> None:
    root = without(sprsound_root, tmp_path / "copy", lambda *_: True)
    for folder in root.glob("train*"):
        shutil.rmtree(folder)
    source = SPRSoundDataModule(root, partial=True)
    data = CrossDatasetDataModule(icbhi, source)
    data.setup("test")
    assert set(data.test_set.cycles["split"]) == {"SPRSound inter", "SPRSound intra"}
    with pytest.raises(DatasetNotFoundError, match="has no train side"):
        CrossDatasetDataModule(source, icbhi).setup("fit")


def test_one_recording_cannot_be_on_two_sides(icbhi_root: Path) -> None:
    data = ICBHI(icbhi_root, "all")
    with pytest.raises(LabelError, match="recordings stand on two sides: ICBHI 101"):
        JoinedDataset([Side(data, "ICBHI", data.all_cycles), Side(data, "ICBHI", data.all_cycles.iloc[:1])])
    two = ICBHI(icbhi_root, "all", labels="2-class")
    with pytest.raises(LabelError, match="only data sets with the same classes"):
        JoinedDataset([Side(data, "ICBHI", data.all_cycles), Side(two, "two", two.all_cycles)])
