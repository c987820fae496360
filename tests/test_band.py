"""A band of frequencies alone: the filter, the stores, the data sets, and models that were trained on one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from respiro import audio
from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
from respiro.datasets import ICBHI, SPRSound
from respiro.evaluation import evaluate
from respiro.methods import SoundClassifier
from respiro.methods._predict import read_cycles
from respiro.models import CNN6
from respiro.store import WaveformStore

RATE = 8000
BAND = (200.0, 1000.0)


def sine(frequency: float, phase: float = 0.3, seconds: float = 2.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return np.sin(2 * np.pi * frequency * time + phase).astype(np.float32)


def wanted_gain(frequency: float, band: tuple[float, float] = BAND, edge: float = 100.0) -> float:
    """Raised-cosine edges outside the band, written for one frequency."""
    low, high = band
    beyond = low - frequency if frequency < low else frequency - high if frequency > high else 0.0
    width = min(edge, low) if frequency < low else min(edge, RATE / 2 - high)
    if beyond == 0:
        return 1.0
    return 0.0 if beyond >= width else (1 + np.cos(np.pi * beyond / width)) / 2


@pytest.mark.parametrize("frequency", [10, 100, 130, 150, 180, 200, 201, 600, 999, 1000, 1040, 1050, 1100, 1500, 3999])
def test_the_gain_is_the_stated_one_and_no_phase_moves(frequency: float) -> None:
    waveform = sine(frequency)
    filtered = audio.band_pass(waveform, RATE, BAND)
    inside = slice(RATE // 2, -RATE // 2)  # where the ends of the sine ring no more
    np.testing.assert_allclose(filtered[inside], wanted_gain(frequency) * waveform[inside], atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 7, 800, 4001])
def test_it_is_a_convolution_of_the_whole_waveform(size: int) -> None:
    waveform = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    grid = np.fft.rfftfreq(1 << 17, 1 / RATE)
    kernel = np.fft.fftshift(np.fft.irfft([wanted_gain(frequency) for frequency in grid]))
    centre = len(kernel) // 2
    expected = np.convolve(waveform, kernel[centre - size : centre + size + 1])[size : 2 * size]
    filtered = audio.band_pass(waveform, RATE, BAND)
    assert filtered.shape == (size,)
    assert filtered.dtype == np.float32
    np.testing.assert_allclose(filtered, expected, atol=2e-5)


def test_the_end_does_not_reach_the_begin() -> None:
    click = np.zeros(RATE, dtype=np.float32)
    click[-1] = 1
    assert np.abs(audio.band_pass(click, RATE, BAND)[: RATE // 2]).max() < 1e-6


def test_all_frequencies_change_nothing_and_the_input_stays() -> None:
    waveform = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    before = waveform.copy()
    np.testing.assert_allclose(audio.band_pass(waveform, RATE, (0, RATE / 2)), waveform, atol=1e-6)
    audio.band_pass(waveform, RATE, BAND)
    np.testing.assert_array_equal(waveform, before)


def test_a_band_from_above_zero_takes_the_mean_away() -> None:
    constant = np.ones(4 * RATE, dtype=np.float32)
    assert np.abs(audio.band_pass(constant, RATE, (20, 1000))[2 * RATE]) < 1e-3
    assert audio.band_pass(constant, RATE, (0, 1000))[2 * RATE] == pytest.approx(1, abs=1e-3)


WRONG = [(100,), (100, 200, 300), (200, 100), (100, 100), (-1, 100), (100, 4001), ("a", "b"), "50", 100]
WRONG += [(0, float("nan")), (float("nan"), 100), (0, float("inf"))]


@pytest.mark.parametrize("band", WRONG, ids=repr)
def test_bands_without_meaning_are_named(band: Any) -> None:
    with pytest.raises(ValueError, match=r"band must be two numbers .* <= 4000, .*, got "):
        audio.check_band(band, RATE)


@pytest.mark.parametrize("build", [ICBHI, SPRSound, ICBHIDataModule, SPRSoundDataModule])
def test_every_data_set_names_them_before_it_reads_a_file(build: Any) -> None:
    with pytest.raises(ValueError, match="band must be two numbers"):
        build("anywhere", band=(50, 5000), sample_rate=RATE)


def test_stores_without_a_band_keep_their_name(icbhi_root: Path, tmp_path: Path) -> None:
    data = ICBHI(icbhi_root, split="all", sample_rate=RATE, cache_dir=tmp_path)
    paths = data.all_recordings.set_index("recording")["path"]
    recordings = [Path(paths[name]) for name in dict.fromkeys(data.all_cycles["recording"])]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in recordings]
    digest = hashlib.sha256(json.dumps([1, RATE, "recording", "truncate", stats]).encode())
    digest.update(data.all_cycles["recording"].factorize()[0].astype("<i8").tobytes())
    for column in ("start", "end"):
        digest.update(data.all_cycles[column].to_numpy("<f8").tobytes())
    assert data.store.folder.name == digest.hexdigest()


def test_each_band_has_a_store_of_its_own(icbhi_root: Path, tmp_path: Path) -> None:
    bands = [None, (100, 900), [100.0, 900.0], (100, 901)]
    stores = [ICBHI(icbhi_root, sample_rate=RATE, cache_dir=tmp_path, band=band).store.folder for band in bands]  # type: ignore[arg-type]
    assert stores[1] == stores[2]
    assert len(set(stores)) == 3
    WaveformStore(stores[1]).verify()


READINGS = [{"resample": "recording", "fade": "recording"}, {"resample": "cycle", "fade": "cycle"}]


@pytest.mark.parametrize("how", READINGS, ids=["recording", "cycle"])
def test_cycles_are_cut_of_the_filtered_recording(icbhi_root: Path, how: dict[str, Any]) -> None:
    data = ICBHI(icbhi_root, sample_rate=RATE, band=BAND, **how | {"fade": "none"})
    row = data.cycles.iloc[3]
    path = data.recordings.set_index("recording").loc[row["recording"], "path"]
    samples, rate = audio.read(path)
    if how["resample"] == "recording":
        whole = audio.band_pass(audio.resample(samples, rate, RATE), RATE, BAND)
        expected = whole[int(row["start"] * RATE) : int(row["end"] * RATE)]
    else:
        cycle = samples[int(row["start"] * rate) : int(row["end"] * rate)]
        expected = audio.band_pass(audio.resample(cycle, rate, RATE), RATE, BAND)
    np.testing.assert_array_equal(data.waveform(3), expected)


@pytest.mark.parametrize("how", READINGS, ids=["recording", "cycle"])
@pytest.mark.parametrize("kind", [ICBHI, SPRSound])
def test_a_file_is_read_as_the_data_set_reads_it(
    kind: Any, how: dict[str, Any], icbhi_root: Path, sprsound_root: Path
) -> None:
    root = icbhi_root if kind is ICBHI else sprsound_root
    data = kind(root, sample_rate=RATE, duration=1.5, band=BAND, partial=True, **how)
    assert data.reading["band"] == [200.0, 1000.0]
    cycles = data.cycles[data.cycles["recording"] == data.cycles["recording"].iloc[0]]
    path = data.recordings["path"].iloc[0]
    times = list(cycles[["start", "end"]].itertuples(index=False, name=None))
    expected = torch.stack([data[row]["waveform"] for row in range(len(cycles))])
    torch.testing.assert_close(read_cycles(path, times, **data.reading), expected, rtol=0, atol=0)


def test_a_model_predicts_in_the_band_it_was_trained_in(icbhi_root: Path) -> None:
    data = ICBHIDataModule(icbhi_root, duration=1.0, band=(100, 1500))
    data.prepare_data()
    data.setup("test")
    assert json.loads(json.dumps(data.protocol)) == data.protocol
    assert data.hparams["band"] == data.protocol["audio"]["band"] == [100.0, 1500.0]
    model = SoundClassifier(CNN6())
    assert model.audio["band"] is None
    model.history = [data.protocol]
    row = data.test_set.cycles.iloc[0]
    path = data.test_set.recordings.set_index("recording").loc[row["recording"], "path"]
    of_file = model.predict(path, [(row["start"], row["end"])]).iloc[0]
    of_set = model.predict(data.test_set).iloc[0]
    for name in model.classes:
        assert of_file[f"p_{name}"] == pytest.approx(of_set[f"p_{name}"], abs=1e-5)


def test_another_band_is_noticed(icbhi_root: Path) -> None:
    data = ICBHIDataModule(icbhi_root, duration=1.0, band=(100, 1500))
    data.setup("fit")
    model = SoundClassifier(CNN6())
    model.history = [data.protocol]
    with pytest.warns(UserWarning, match=r"band None instead of \[100.0, 1500.0\]"):
        evaluate(model, ICBHIDataModule(icbhi_root, duration=1.0))
