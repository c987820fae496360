"""The quality of every cycle, in the tables and samples of data sets and datamodules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from respiro.datamodules import CrossDatasetDataModule, ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI, RespiratoryDataset
from respiro.transforms import AudioQuality

RATE = 4000
FAST: dict[str, Any] = {"duration": 1.0, "sample_rate": RATE}


def quality(**options: Any) -> AudioQuality:
    return AudioQuality(RATE, **options)


def measured(data: RespiratoryDataset) -> tuple[np.ndarray, np.ndarray]:
    """Entropy and RMS of every cycle as it was cut, one by one, by the equations: ``(N,)`` each."""
    entropies, levels = [], []
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(100) / 100)
    for cycle in data.store:
        clip = cycle.samples.astype("float64")
        levels.append(math.sqrt((clip**2).mean()))
        clip = np.pad(clip, (0, max(0, 512 - len(clip))))
        frames = [clip[start + 206 : start + 306] * window for start in range(0, len(clip) - 511, 40)]
        powers = [np.abs(np.fft.rfft(frame, 512)) ** 2 for frame in frames if np.sqrt((frame**2).mean()) >= 1e-5]
        shares = [power / power.sum() for power in powers]
        entropies.append(np.mean([-(p * np.log(p)).sum() / np.log(257) for p in shares]) if shares else 1.0)
    return np.array(entropies), np.array(levels)


def scored(data: RespiratoryDataset, reference: Any) -> np.ndarray:
    """The score of every cycle, with the range of the RMS of the reference rows."""
    entropy, level = measured(data)
    low, high = np.percentile(level[data.all_cycles.index.isin(reference)], [5, 95])
    return np.clip(1 - 0.7 * entropy + 0.3 * np.clip((level - low) / (high - low), 0, 1), 0, 1)


def ready(data: Any, stage: str = "fit") -> Any:
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.fixture
def dataset(icbhi_root: Path, tmp_path: Path) -> ICBHI:
    return ICBHI(icbhi_root, split="train", cache_dir=tmp_path, **FAST)


@pytest.fixture
def icbhi(icbhi_root: Path, tmp_path: Path) -> ICBHIDataModule:
    data: ICBHIDataModule = ready(ICBHIDataModule(icbhi_root, val_fraction=0.3, cache_dir=tmp_path, **FAST))
    return data


def left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "quality").glob("*") if path.suffix != ".lock"]


class TestDataset:
    def test_every_cycle_of_every_split_has_the_score_of_its_raw_cycle(self, dataset: ICBHI) -> None:
        """Which is neither faded nor padded nor cut to the duration."""
        assert dataset.cycles["quality"].isna().all()
        assert dataset[0]["quality"].isnan()
        dataset.add_quality(quality())
        cycles = dataset.all_cycles
        expected = scored(dataset, cycles.index[cycles["split"] == "train"])
        assert set(cycles["split"]) == {"train", "test"}
        assert cycles["quality"].dtype == np.float32
        np.testing.assert_allclose(cycles["quality"], expected, atol=1e-4)
        np.testing.assert_array_equal(dataset.cycles["quality"], cycles["quality"][dataset.cycles.index])
        for row in (0, len(dataset) - 1):
            assert dataset[row]["quality"] == dataset.cycles["quality"].iloc[row]
            assert dataset[row]["quality"].dtype == torch.float32
        batch = next(iter(DataLoader(dataset, batch_size=4)))
        np.testing.assert_array_equal(batch["quality"], dataset.cycles["quality"][:4])

    def test_the_reference_gives_the_range(self, dataset: ICBHI) -> None:
        rows = dataset.all_cycles.index[5:40]
        measure = quality(percentiles=(10, 60))
        dataset.add_quality(measure, rows)
        level = measured(dataset)[1]
        np.testing.assert_allclose(measure.rms_range, np.percentile(level[5:40], [10, 60]), rtol=1e-5)
        dataset.add_quality(measure, rows.to_numpy()[::-1])
        np.testing.assert_allclose(measure.rms_range, np.percentile(level[5:40], [10, 60]), rtol=1e-5)

    def test_without_a_train_split_every_cycle_is_the_reference(self, dataset: ICBHI) -> None:
        dataset.replace_cycles(dataset.all_cycles.assign(split="inter"))
        measure = quality()
        dataset.add_quality(measure)
        np.testing.assert_allclose(measure.rms_range, np.percentile(measured(dataset)[1], [5, 95]), rtol=1e-5)

    @pytest.mark.parametrize("rows", [[], [10**6], np.array([True, False])], ids=["none", "unknown", "bool"])
    def test_a_reference_that_makes_no_sense(self, dataset: ICBHI, rows: Any) -> None:
        with pytest.raises(ValueError, match="reference must hold row labels of the table"):
            dataset.add_quality(quality(), rows)
        assert dataset.cycles["quality"].isna().all()

    def test_another_sampling_rate_is_refused(self, dataset: ICBHI) -> None:
        with pytest.raises(ValueError, match=r"for 16000 Hz, but the data set reads at 4000 Hz; .*sample_rate=4000"):
            dataset.add_quality(AudioQuality())

    def test_subsets_made_before_keep_what_they_had(self, dataset: ICBHI) -> None:
        table = dataset.all_cycles
        before = dataset.subset(dataset.cycles.index[:3])
        dataset.add_quality(quality())
        first = dataset.cycles["quality"].copy()
        between = dataset.subset(dataset.cycles.index[:3])
        dataset.add_quality(quality(rms="raw"))
        assert table["quality"].isna().all()  # nobody else's table changes
        assert before[0]["quality"].isnan()
        np.testing.assert_array_equal(between.cycles["quality"], first[:3])
        assert between[1]["quality"] == first.iloc[1]
        assert not np.array_equal(dataset.cycles["quality"], first)
        assert dataset[0]["quality"] == dataset.cycles["quality"].iloc[0]

    def test_everything_else_stays(self, dataset: ICBHI) -> None:
        dataset.add_labels("sex_age", ["sex", "age_group"])
        before = dataset[1], dataset.digest, dataset.class_counts
        columns = list(dataset.all_cycles.columns)
        dataset.add_quality(quality())
        after = dataset[1], dataset.digest, dataset.class_counts
        assert list(dataset.all_cycles.columns) == columns
        assert before[1:] == after[1:]
        assert all(torch.equal(before[0][key], after[0][key]) for key in before[0] if key != "quality")

    def test_the_measures_are_made_once_whatever_they_are_weighed_with(
        self, dataset: ICBHI, icbhi_root: Path, tmp_path: Path
    ) -> None:
        dataset.add_quality(quality())
        for options in ({"rms": "raw"}, {"percentiles": (1, 99)}, {"alpha": 0.5, "beta": 0.5}):
            dataset.add_quality(quality(**options))
        for reading in ({"split": "test"}, {"labels": "2-class"}, {"fade": "none"}, {"pad": "zero"}, {"duration": 2.0}):
            ICBHI(icbhi_root, cache_dir=tmp_path, **{**FAST, **reading}).add_quality(quality())
        assert len(left_in(tmp_path)) == 1
        dataset.add_quality(quality(entropy="mean-psd"))
        ICBHI(icbhi_root, cache_dir=tmp_path, sample_rate=RATE + 100).add_quality(AudioQuality(RATE + 100))
        assert len(left_in(tmp_path)) == 3


class TestDataModule:
    def test_every_side_has_the_score_whenever_it_is_set_up(self, icbhi: ICBHIDataModule) -> None:
        train, val = icbhi.train_set, icbhi.val_set
        assert train[0]["quality"].isnan()
        measure = quality()
        icbhi.add_quality(measure)
        icbhi.setup("test")
        expected = scored(icbhi.data, icbhi.split.train)
        assert not np.allclose(expected, scored(icbhi.data, icbhi.data.cycles.index), atol=1e-3)  # it matters which
        for side in (train, val, icbhi.train_set, icbhi.val_set, icbhi.test_set):
            np.testing.assert_allclose(side.cycles["quality"], expected[side.cycles.index], atol=1e-4)
            assert side[1]["quality"] == side.cycles["quality"].iloc[1]
        loaders: Any = [icbhi.train_dataloader(), icbhi.val_dataloader(), icbhi.test_dataloader()]
        for loader in loaders:
            batch = next(iter(loader))
            np.testing.assert_allclose(batch["quality"], expected[batch["index"]], atol=1e-4)

    def test_the_record_tells_how(self, icbhi: ICBHIDataModule) -> None:
        measure = quality(band=(50, 1900))
        before = dict(icbhi.protocol)
        icbhi.add_quality(measure)
        found = icbhi.protocol["quality"]
        assert found["class_path"] == "respiro.transforms.AudioQuality"
        assert found["init_args"]["band"] == [50, 1900]
        assert found["rms_range"] == measure.rms_range.tolist()
        assert all(type(edge) is float for edge in found["rms_range"])
        assert {name: icbhi.protocol[name] for name in before} == before

    def test_it_may_come_before_the_setup(self, icbhi_root: Path, tmp_path: Path, icbhi: ICBHIDataModule) -> None:
        early = ICBHIDataModule(icbhi_root, val_fraction=0.3, cache_dir=tmp_path, **FAST)
        early.add_quality(quality())
        ready(early)
        icbhi.add_quality(quality())
        assert early.protocol == icbhi.protocol
        assert list(early.protocol["metadata"]) == ["sex_age"]
        assert torch.equal(early.val_set[0]["quality"], icbhi.val_set[0]["quality"])
        assert "sex_age" in early.train_set[0]

    def test_another_one_takes_its_place(self, icbhi: ICBHIDataModule) -> None:
        icbhi.add_quality(quality())
        first = icbhi.train_set.cycles["quality"].copy()
        icbhi.add_quality(quality(rms="raw"))
        assert icbhi.protocol["quality"]["init_args"]["rms"] == "raw"
        assert not np.array_equal(icbhi.train_set.cycles["quality"], first)

    def test_sprsound(self, sprsound_root: Path, tmp_path: Path) -> None:
        data = ready(SPRSoundDataModule(sprsound_root, partial=True, cache_dir=tmp_path, **FAST), "fit")
        data.add_quality(quality())
        expected = scored(data.data, data.split.train)
        np.testing.assert_allclose(data.data.all_cycles["quality"], expected, atol=1e-4)

    def test_one_data_set_trains_and_another_tests(self, icbhi_root: Path, sprsound_root: Path, tmp_path: Path) -> None:
        train, test = ICBHIDataModule(icbhi_root), SPRSoundDataModule(sprsound_root, partial=True)
        data = ready(CrossDatasetDataModule(train=train, test=[test], cache_dir=tmp_path, **FAST))
        measure = quality()
        data.add_quality(measure)
        data.setup("test")
        alone = ICBHI(icbhi_root, split="train", cache_dir=tmp_path, **FAST)
        names = alone.cycles["recording"] + alone.cycles["cycle"].astype(str)
        cycles = data.train_set.cycles
        counted = names.isin(cycles["recording"].str.removeprefix("ICBHI ") + cycles["cycle"].astype(str))
        alone.add_quality(quality(), alone.cycles.index[counted])
        np.testing.assert_allclose(cycles["quality"], alone.cycles["quality"][counted], atol=1e-6)
        assert data.test_set.cycles["quality"].between(0, 1).all()


class TestRealRecordings:
    @staticmethod
    def by_device(folder: Path, cache: Path, measure: AudioQuality) -> tuple[pd.DataFrame, pd.DataFrame]:
        data = ICBHI(folder, split="all", partial=True, any_encoding=True, cache_dir=cache)
        data.add_quality(measure)
        return data.all_cycles, data.cycles.groupby("device")["quality"].describe()

    @pytest.mark.filterwarnings("ignore:.*recordings have another device")
    @pytest.mark.parametrize("entropy", ["frame-mean", "mean-psd"])
    def test_scores_lie_between_0_and_1_and_differ_by_device(
        self, shared: Callable[[str], Path], tmp_path: Path, entropy: Any
    ) -> None:
        cycles, devices = self.by_device(shared("data/icbhi_mini"), tmp_path, AudioQuality(entropy=entropy))
        assert cycles["quality"].between(0, 1).all()
        assert len(devices) == 4
        assert cycles["quality"].std() > 0.02
        # The electronic stethoscope with its narrow band lies apart from the microphone.
        assert devices.loc["AKGC417L", "50%"] > devices.loc["Litt3200", "50%"] + 0.05
