"""Metadata labels of the datamodules: in every batch, counted on train, in the record, and after restoring."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from respiro.cli import main
from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datamodules.base import RespiratoryDataModule
from respiro.datasets import ICBHI, metadata_labels
from respiro.errors import LabelError
from respiro.methods._checkpoint import RECORD, read_checkpoint

SHORT: dict[str, Any] = {"batch_size": 4, "duration": 1.0}


def ready(data: RespiratoryDataModule, *stages: str) -> Any:
    for stage in stages or ("fit",):
        data.setup(stage)
    return data


def check_batches(data: Any, name: str, ids: pd.Series[int]) -> None:
    """Every side that is there carries the labels of its rows."""
    sides = [side for side in ("train", "val", "test") if hasattr(data, f"{side}_set")]
    for side in sides:
        batch = next(iter(getattr(data, f"{side}_dataloader")()))
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == batch["label"].shape
        assert batch[name].tolist() == ids.loc[batch["index"].tolist()].tolist()


@pytest.mark.parametrize("stages", [("fit",), ("test",), ("validate",), ("fit", "test"), ("test", "fit")], ids=str)
@pytest.mark.parametrize("select_on", ["val", "test"])
def test_every_stage_has_sex_and_age(icbhi_root: Path, stages: tuple[str, ...], select_on: Any) -> None:
    data = ready(ICBHIDataModule(icbhi_root, val_fraction=0.3, select_on=select_on, **SHORT), *stages)
    expected = metadata_labels(data.data.all_cycles, ["sex", "age_group"], reference=data.split.train)
    assert data.protocol["metadata"] == {"sex_age": expected.to_dict()}
    check_batches(data, "sex_age", expected.ids)


def test_labels_are_counted_on_the_train_side_alone(icbhi_root: Path) -> None:
    asked = {"who": ["patient"]}
    official = ICBHI(icbhi_root, split="train").cycles["patient"].value_counts()
    held_out = ready(ICBHIDataModule(icbhi_root, val_fraction=0.4, metadata=asked))
    whole = ready(ICBHIDataModule(icbhi_root, val_fraction=0.4, metadata=asked, select_on="test"))
    counts, record = held_out.protocol["metadata"]["who"]["counts"], whole.protocol["metadata"]["who"]
    assert {name: count for name, count in record["counts"].items() if count} == official.to_dict()
    validation = set(held_out.val_set.cycles["patient"])
    assert validation
    assert {name for name in official.index if counts[name] == 0} == validation
    assert record["names"] == held_out.protocol["metadata"]["who"]["names"]  # ids are the same under both


def test_small_combinations_are_merged_by_their_train_cycles(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, metadata={"who": ["patient"]}, merge_below=1, **SHORT), "fit", "test")
    record = data.protocol["metadata"]["who"]
    trained = set(data.train_set.cycles["patient"])
    assert set(record["names"]) == trained | {"other"}
    assert set(record["merged"]) == set(data.data.cycles["patient"]) - trained
    check_batches(data, "who", data.data.metadata["who"].ids)


def test_several_labels_each_have_a_key(icbhi_root: Path) -> None:
    metadata = {"where": ["location"], "mic": ("device",), "sex_class": ["sex", "class"]}
    data = ready(ICBHIDataModule(icbhi_root, metadata=metadata, **SHORT))
    batch = next(iter(data.train_dataloader()))
    assert {"where", "mic", "sex_class"} <= set(batch)
    assert "sex_age" not in batch
    assert list(data.protocol["metadata"]) == list(metadata)
    assert data.protocol["metadata"]["sex_class"]["columns"] == ["sex", "class"]


def test_none_are_made_where_none_are_asked_for(icbhi_root: Path) -> None:
    data = ready(ICBHIDataModule(icbhi_root, metadata={}, **SHORT))
    assert data.protocol["metadata"] == {}
    assert "sex_age" not in next(iter(data.train_dataloader()))


def test_sprsound_divides_at_five_years(sprsound_root: Path) -> None:
    data = ready(SPRSoundDataModule(sprsound_root, partial=True, **SHORT), "fit", "test")
    ids, names = data.data.metadata["sex_age"].ids, data.protocol["metadata"]["sex_age"]["names"]
    cycles = data.data.all_cycles
    expected = cycles["sex"] + np.where(cycles["age"] < 5, ",<5", ",>=5")
    assert [names[i] for i in ids] == expected.tolist()
    assert set(cycles["age"] < 5) == {True, False}
    check_batches(data, "sex_age", ids)


@pytest.fixture(params=["adults only", "no sex", "mostly no sex"])
def poor_root(request: pytest.FixtureRequest, icbhi_root: Path, tmp_path: Path) -> Path:
    """A data set whose demographics say little."""
    for path in icbhi_root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    table = tmp_path / "ICBHI_Challenge_demographic_information.txt"
    lines = [line.split() for line in table.read_text().splitlines()]
    train = sorted(ICBHI(icbhi_root, split="train").cycles["patient"].unique())
    for number, fields in enumerate(lines):
        patient_known = {"adults only": True, "no sex": False, "mostly no sex": fields[0] in train[:2]}[request.param]
        fields[1:3] = "40", ("M" if patient_known else "NA")
        if request.param == "mostly no sex" and patient_known:
            fields[2] = "MF"[train.index(fields[0])]
        lines[number] = fields
    table.unlink()
    table.write_text("\n".join("\t".join(fields) for fields in lines) + "\n")
    return tmp_path


def test_the_default_never_fails_or_warns(poor_root: Path, request: pytest.FixtureRequest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = ready(ICBHIDataModule(poor_root, val_fraction=0.0, **SHORT))
    record = data.protocol["metadata"]["sex_age"]
    assert json.loads(json.dumps(data.protocol)) == data.protocol
    batch = next(iter(data.train_dataloader()))
    if "mostly" in request.node.name:
        assert record["unknown"] > sum(record["counts"].values()) > 0
        assert "problem" not in record
    else:
        assert batch["sex_age"].tolist() == [-1] * 4
        assert "labels from sex and age_group" in record["problem"]
        assert record["unknown"] == len(data.train_set)


def test_what_is_asked_for_has_to_be_of_use(poor_root: Path, request: pytest.FixtureRequest) -> None:
    data = ICBHIDataModule(poor_root, val_fraction=0.0, metadata={"sex_age": ["sex", "age_group"]})
    if "mostly" in request.node.name:
        with pytest.warns(UserWarning, match="labels from sex and age_group are unknown in"):
            data.setup("fit")
        return
    for _ in range(2):  # a second try fails as the first one did
        with pytest.raises(LabelError, match="labels from sex and age_group"):
            data.setup("fit")


def test_an_absent_column_is_named(icbhi_root: Path) -> None:
    with pytest.raises(LabelError, match="no column 'smoker' to make labels of; the table has recording, cycle"):
        ICBHIDataModule(icbhi_root, metadata={"habit": ["smoker"]}).setup("test")


@pytest.mark.parametrize("build", [ICBHIDataModule, SPRSoundDataModule])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metadata": {"sex": ["sex"]}}, "labels cannot be named 'sex', which every batch has already"),
        ({"metadata": {"sex_age": []}}, "columns must name at least one column"),
        ({"metadata": ["sex", "age_group"]}, "metadata must map names to columns, such as"),
        ({"age_threshold": -1.0}, "age_threshold must be a positive number of years, got -1.0"),
        ({"merge_below": -1}, "merge_below must not be negative, got -1"),
    ],
    ids=str,
)
def test_wrong_values_are_named_before_any_file_is_read(build: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("anywhere", **arguments)


def test_settings_are_plain(icbhi_root: Path) -> None:
    metadata = {"sex_age": ("sex", "age_group"), "mic": "device"}
    numpy: Any = {"age_threshold": np.float64(16), "merge_below": np.int64(2)}
    data = ICBHIDataModule(icbhi_root, metadata=metadata, **numpy)
    kept = {name: data.hparams[name] for name in ("metadata", "age_threshold", "merge_below")}
    assert kept == {
        "metadata": {"sex_age": ["sex", "age_group"], "mic": ["device"]},
        "age_threshold": 16.0,
        "merge_below": 2,
    }
    assert type(kept["metadata"]) is dict
    assert {type(value) for value in (*kept["metadata"].values(), *kept.values())} == {list, dict, float, int}
    again = ICBHIDataModule(**data.hparams)
    assert again.metadata == data.metadata
    assert ready(again).protocol == ready(data).protocol
    assert ICBHIDataModule(icbhi_root).hparams["metadata"] is None


def test_a_checkpoint_brings_its_labels_back(icbhi_root: Path, tmp_path: Path) -> None:
    """From a YAML config to training, and from the checkpoint's record to its report."""
    metadata = {"sex_age": ["sex", "age_group"], "who": ["patient"]}
    data = {"root": str(icbhi_root), "duration": 1.0, "age_threshold": 30.0, "merge_below": 3, "metadata": metadata}
    trainer = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "default_root_dir": str(tmp_path), "enable_model_summary": False}
    config = {"data": {"class_path": "ICBHIDataModule", "init_args": data}, "trainer": trainer}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    path = next(tmp_path.rglob("last.ckpt"))
    record = read_checkpoint(path)[RECORD]
    assert record["data"]["init_args"]["metadata"] == metadata
    trained = record["history"][-1]["metadata"]
    assert {"M,<30", "M,>=30"} & {*trained["sex_age"]["names"], *trained["sex_age"]["merged"]}
    assert set(trained) == set(metadata)
    main(["validate", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert json.loads((tmp_path / "out" / "result.json").read_text())["protocol"]["metadata"] == trained


@pytest.mark.parametrize("given", ["{mic: [device], place: [location]}", "{}"])
def test_labels_can_be_given_as_an_option(icbhi_root: Path, tmp_path: Path, given: str) -> None:
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1".split()
    data += ["--data.metadata", given]
    trainer = f"--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.default_root_dir {tmp_path}"
    main(["fit", *data, *trainer.split()])


def test_icbhi_as_published_has_the_labels_of_the_paper(shared: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*226_1b1_Pl_sc_LittC2SE")  # every real copy has it
        data = ready(ICBHIDataModule(shared("data/icbhi_4k"), select_on="test"), "test")
    counts = data.protocol["metadata"]["sex_age"]["counts"]
    assert counts == {"F,<18": 213, "F,>=18": 1614, "M,<18": 242, "M,>=18": 2073}
    assert data.protocol["metadata"]["sex_age"]["unknown"] == 0
