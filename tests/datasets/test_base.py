"""What every data set shares: tables, subsets, waveforms, arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from respiro.datasets.base import RespiratoryDataset
from respiro.errors import AudioError, LabelError

RATE = 8000
VOCABULARIES = {
    "patient": ("1", "2"),
    "device": ("mic", "scope"),
    "location": ("Al", "Tc"),
    "sex": ("M", "F"),
    "age_group": ("adult", "child"),
}


@pytest.fixture
def tables(tmp_path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two recordings of a ramp, three cycles each; the second patient is unknown in everything."""
    rows = []
    for number, name in enumerate(["a", "b"], start=1):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, np.linspace(0.1, 0.9, 3 * RATE) / number, RATE, subtype="PCM_16")
        known = number == 1
        rows.append(
            {
                "recording": name, "path": str(path), "patient": str(number), "device": "scope" if known else None,
                "location": "Tc" if known else None, "take": name, "sex": "F" if known else None,
                "age": 3.0 if known else float("nan"), "age_group": "child" if known else None,
                "split": "train" if known else "test", "sample_rate": RATE, "frames": 3 * RATE, "channels": 1,
                "encoding": "PCM_16",
            }
        )  # fmt: skip
    cycles = [
        {"recording": name, "cycle": k, "start": float(k), "end": float(k + 1), "label": label}
        for name, labels in (("a", [0, 1, -1]), ("b", [1, 1, 0]))
        for k, label in enumerate(labels)
    ]
    return pd.DataFrame(rows), pd.DataFrame(cycles)


def make(tables: tuple[pd.DataFrame, pd.DataFrame], **options: Any) -> RespiratoryDataset:
    settings = {"splits": ("train", "test"), "sample_rate": RATE, "duration": 1.5, "fade": "none"} | options
    return RespiratoryDataset(*tables, classes=("normal", "abnormal"), vocabularies=VOCABULARIES, **settings)


def test_rows_of_the_label_map_are_left_out_and_listed(tables: Any) -> None:
    data = make(tables)
    assert len(data) == 5
    assert data.left_out.index.tolist() == [2]
    assert data.cycles.index.tolist() == [0, 1, 3, 4, 5]
    assert data.cycles["class"].tolist() == ["normal", "abnormal", "abnormal", "abnormal", "normal"]
    assert data.class_counts == [2, 3]


def test_a_sample_is_its_row(tables: Any) -> None:
    data = make(tables)
    sample = data[1]
    assert sample["index"] == 1
    assert {name: int(sample[name]) for name in VOCABULARIES} == {
        "patient": 0, "device": 1, "location": 1, "sex": 1, "age_group": 1,
    }  # fmt: skip
    expected = np.linspace(0.1, 0.9, 3 * RATE)[RATE : 2 * RATE]
    np.testing.assert_allclose(sample["waveform"][:RATE], expected, atol=1e-4)
    assert sample["waveform"].shape == (12000,)
    assert sample["length"] == RATE


def test_unknown_is_minus_one(tables: Any) -> None:
    sample = make(tables)[3]
    assert [int(sample[name]) for name in VOCABULARIES] == [1, -1, -1, -1, -1]


def test_subsets_keep_the_row_labels(tables: Any) -> None:
    data = make(tables)
    part = data.subset(np.array([4, 0]))
    assert part.cycles.index.tolist() == [4, 0]
    assert [int(part[row]["index"]) for row in range(2)] == [4, 0]
    torch.testing.assert_close(part[0]["waveform"], data[3]["waveform"])
    assert part.recordings["recording"].tolist() == ["a", "b"]
    assert len(data) == 5
    assert part.subset(np.array([0])).cycles.index.tolist() == [0]
    test = make(tables, splits=("test",))
    for rows, source in (([17], data), ([2], data), ([0], test), ([1], part)):  # absent, left out, other side, other
        with pytest.raises(LabelError, match=f"row {rows[0]} is not a cycle of this data set"):
            source.subset(np.array(rows))


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_every_worker_reads_the_same(tables: Any, workers: int, context: str | None) -> None:
    data = make(tables)
    batch = next(iter(DataLoader(data, batch_size=5, num_workers=workers, multiprocessing_context=context)))
    torch.testing.assert_close(batch["waveform"], torch.stack([data[row]["waveform"] for row in range(5)]))


@pytest.mark.parametrize("fade", ["recording", "cycle", "none"])
def test_fades_are_where_they_belong(tables: Any, fade: Any) -> None:
    data = make(tables, fade=fade)
    ramp = np.linspace(0.1, 0.9, 3 * RATE)
    first, middle = data.waveform(0), data.waveform(1)
    faded_start = fade in ("recording", "cycle")
    assert (first[0] == 0) == faded_start
    assert (middle[0] == 0) == (fade == "cycle")
    np.testing.assert_allclose(middle[500:-500], ramp[RATE + 500 : 2 * RATE - 500], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate"),
        ({"sample_rate": 8000.5}, "sample_rate must be a whole number"),
        ({"duration": 1e-5}, "duration"),
        ({"duration": 0.0}, "duration"),
        ({"duration": float("inf")}, "duration"),
        ({"pad": "circular"}, "pad must be one of 'repeat', 'zero', 'reflect', got 'circular'"),
        ({"fade": "both"}, "fade must be one of"),
        ({"resample": "never"}, "resample must be one of"),
        ({"fade": "recording", "resample": "cycle"}, "needs resample='recording'"),
    ],
)
def test_wrong_values_are_named(tables: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tables, **options)


@pytest.mark.parametrize(("column", "value"), [("channels", 2), ("encoding", "FLOAT")], ids=["stereo", "float"])
def test_files_that_were_converted_need_consent(tables: Any, column: str, value: Any) -> None:
    tables[0].loc[1, column] = value
    with pytest.raises(AudioError, match=r"1 of 2 recordings.*b\.wav.*any_encoding=True"):
        make(tables)
    assert len(make(tables, any_encoding=True)) == 5


def test_the_digest_tells_one_data_set_from_another(tables: Any) -> None:
    recordings, cycles = tables
    first = make(tables).digest
    assert make(tables, splits=("train",), duration=1.0).digest == first
    assert make((recordings, cycles.assign(label=0))).digest != first
    assert make((recordings.assign(frames=1), cycles)).digest != first


def test_samples_that_are_no_numbers_are_found(tables: Any, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "b.wav", np.full(3 * RATE, np.nan, dtype="float32"), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"b\.wav: sample 0 is NaN or infinite"):
        make(tables).prepare()


def test_counts_by_split_and_device(tables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = make(tables)
    counts = data.counts()
    columns = ["recordings", "patients", "cycles", "normal", "abnormal"]
    assert counts.loc[("all", "all"), columns].tolist() == [2, 2, 5, 2, 3]
    assert counts.loc[("train", "scope"), "cycles"] == 2
    data.summary()
    assert "left out by the label map: 1 cycles" in capsys.readouterr().out


def test_indices_wrap_and_end(tables: Any) -> None:
    data = make(tables)
    assert data[-1]["index"] == 5
    with pytest.raises(IndexError):
        data[5]
