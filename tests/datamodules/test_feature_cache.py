"""Features of every cycle beside its waveform, kept on disk for all sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from respiro.component import Transform, describe
from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI
from respiro.errors import StoreError
from respiro.transforms import LogMelSpectrogram

FAST: dict[str, Any] = {"duration": 1.0, "sample_rate": 4000}


class Energy(Transform):
    """Energy of frames of 100 samples, once and times *gain*."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.gain = gain
        self.computed = 0

    def forward(self, waveform: Tensor) -> Tensor:
        self.computed += len(waveform)
        energy = waveform.unfold(1, 100, 100).square().sum(2)
        return torch.stack([energy, self.gain * energy], dim=2)


def energies(waveform: Tensor, gain: float = 2.0) -> Tensor:
    """The same of one waveform, by a loop."""
    frames = [float(sum(x * x for x in waveform[start : start + 100].double())) for start in range(0, 4000, 100)]
    return torch.tensor([[energy, gain * energy] for energy in frames])


def cached(data: Any, front_end: Energy) -> Any:
    data.cache_features(front_end, describe(front_end))
    return data


def ready(data: Any, stage: str = "fit") -> Any:
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.fixture
def icbhi(icbhi_root: Path, tmp_path: Path) -> ICBHIDataModule:
    data: ICBHIDataModule = ready(ICBHIDataModule(icbhi_root, val_fraction=0.3, cache_dir=tmp_path, **FAST))
    return data


def left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "features").glob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("reading", [{"pad": "repeat", "fade": "recording"}, {"pad": "zero", "fade": "none"}])
def test_a_sample_has_the_features_of_its_waveform(icbhi_root: Path, tmp_path: Path, reading: Any) -> None:
    data = cached(ICBHI(icbhi_root, split="test", cache_dir=tmp_path, **FAST, **reading), Energy())
    for row in (0, 1, len(data) - 1, -1):
        sample = data[row]
        assert sample["features"].dtype == torch.float16
        assert sample["features"].shape == (40, 2)
        torch.testing.assert_close(sample["features"].float(), energies(sample["waveform"]), rtol=1e-3, atol=1e-6)


def test_every_side_has_them_and_they_are_computed_once(icbhi: ICBHIDataModule) -> None:
    assert "features" not in icbhi.train_set[0]
    front_end = Energy()
    cached(icbhi, front_end)
    assert front_end.computed == len(icbhi.data.all_cycles)
    icbhi.setup("test")  # a side that comes later
    sides = [icbhi.train_set, icbhi.val_set, icbhi.test_set]
    for side, loader in zip(
        sides, [icbhi.train_dataloader(), icbhi.val_dataloader(), icbhi.test_dataloader()], strict=True
    ):
        batch = next(iter(loader))
        assert batch["features"].shape == (len(batch["label"]), 40, 2)
        for waveform, features in zip(batch["waveform"][:3], batch["features"], strict=False):
            torch.testing.assert_close(features.float(), energies(waveform), rtol=1e-3, atol=1e-6)
        assert side.feature_store is icbhi.data.feature_store
    again = Energy()
    cached(icbhi, again)
    assert (again.computed, front_end.computed) == (2, len(icbhi.data.all_cycles))  # two to compare


def test_sides_set_up_earlier_have_them_too(icbhi: ICBHIDataModule) -> None:
    icbhi.setup("test")
    part = icbhi.train_set.subset(icbhi.train_set.cycles.index[:2])
    cached(icbhi, Energy())
    assert all("features" in side[0] for side in (icbhi.train_set, icbhi.val_set, icbhi.test_set))
    assert "features" not in part[0]  # as with labels: only what is made from here on
    assert "features" in icbhi.train_set.subset(icbhi.train_set.cycles.index[:2])[1]


def test_another_front_end_takes_the_place_of_the_first(icbhi: ICBHIDataModule, tmp_path: Path) -> None:
    cached(icbhi, Energy())
    cached(icbhi, Energy(gain=3.0))
    sample = icbhi.train_set[0]
    torch.testing.assert_close(sample["features"].float(), energies(sample["waveform"], 3.0), rtol=1e-3, atol=1e-6)
    assert len(left_in(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"duration": 1.1},
        {"pad": "zero"},
        {"fade": "cycle"},
        {"sample_rate": 4100},
        {"resample": "cycle", "fade": "none"},
    ],
    ids=lambda change: "-".join(change),
)
def test_whatever_shapes_the_waveforms_makes_another_store(icbhi_root: Path, tmp_path: Path, change: Any) -> None:
    for options in ({}, change):
        cached(ICBHI(icbhi_root, cache_dir=tmp_path, **{**FAST, **options}), Energy())
    assert len(left_in(tmp_path)) == 2


def test_the_split_and_the_labels_do_not_matter(icbhi_root: Path, tmp_path: Path) -> None:
    for options in ({}, {"split": "test"}, {"labels": "2-class"}):
        cached(ICBHI(icbhi_root, cache_dir=tmp_path, **FAST, **options), Energy())
    assert len(left_in(tmp_path)) == 1


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_every_worker_reads_the_same(icbhi: ICBHIDataModule, workers: int, context: str | None) -> None:
    data = cached(icbhi, Energy()).val_set
    batch = next(iter(DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context=context)))
    torch.testing.assert_close(batch["features"], torch.stack([data[row]["features"] for row in range(4)]))


def test_a_sample_is_a_copy(icbhi: ICBHIDataModule) -> None:
    data = cached(icbhi, Energy()).train_set
    before = data[0]["features"].clone()
    data[0]["features"].zero_()
    assert torch.equal(data[0]["features"], before)
    assert before.abs().sum() > 0
    data.feature_store.verify()


def test_features_of_sprsound_records(sprsound_root: Path, tmp_path: Path) -> None:
    data = ready(SPRSoundDataModule(sprsound_root, task="2-1", partial=True, cache_dir=tmp_path, **FAST), "test")
    front_end = LogMelSpectrogram(sample_rate=4000, n_fft=256, hop_length=100, n_mels=16, f_max=1800)
    data.cache_features(front_end, describe(front_end))
    for row in range(len(data.test_set)):
        sample = data.test_set[row]
        expected = front_end(sample["waveform"][None])[0]
        torch.testing.assert_close(sample["features"].float(), expected, rtol=1e-3, atol=1e-3)


def test_cycles_that_cannot_be_kept_are_named(icbhi: ICBHIDataModule) -> None:
    first = icbhi.data.all_cycles.iloc[0]
    with pytest.raises(
        StoreError, match=rf"^recording '{first['recording']}', {first['start']:g} s to .* s: .*not finite"
    ):
        cached(icbhi, Energy(gain=float("nan")))
    assert "features" not in icbhi.train_set[0]


def test_a_front_end_that_respiro_cannot_describe_is_refused(icbhi: ICBHIDataModule) -> None:
    class Foreign(torch.nn.Module):
        def forward(self, waveform: Tensor) -> Tensor:
            return waveform[..., None]

    with pytest.raises(ValueError, match="Foreign' cannot be told from others"):
        icbhi.cache_features(Foreign(), describe(Foreign()))


@pytest.mark.parametrize("build", [ICBHIDataModule, SPRSoundDataModule])
def test_the_argument_is_kept_and_off_by_default(build: Any) -> None:
    assert build("anywhere").feature_cache is False
    data = build("anywhere", feature_cache=True)
    assert data.feature_cache is True
    assert data.hparams["feature_cache"] is True
    assert build(**data.hparams).feature_cache is True


def test_float16_holds_log_spectra_closely(icbhi: ICBHIDataModule) -> None:
    """What the cache costs in precision: a standardised log spectrum differs by less than 1 in 1,000."""
    front_end = LogMelSpectrogram(sample_rate=4000, n_fft=256, hop_length=100, n_mels=16, f_max=1800)
    icbhi.cache_features(front_end, describe(front_end))
    for row in range(5):
        sample = icbhi.train_set[row]
        exact = front_end(sample["waveform"][None])[0].numpy()
        np.testing.assert_allclose(sample["features"].numpy(), exact, rtol=2.0**-11, atol=1e-7)
