"""The waveform cache: content, views, key, and what goes wrong with recordings and segments."""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile

from respiro import audio
from respiro.errors import AnnotationError, AudioError, StoreError
from respiro.store import WaveformStore

SPANS = [(0.0, 0.8613), (0.8613, 2.0004), (2.0004, 9.0)]  # the last ends after the recording

LeftIn = Callable[[], list[str]]


def write_recording(path: Path, rate: int, seconds: float, seed: int = 0, channels: int = 1) -> Path:
    samples = 0.1 * np.random.default_rng(seed).standard_normal((round(rate * seconds), channels))
    soundfile.write(path, samples, rate, "PCM_16")
    return path


def write_recordings(folder: Path) -> pd.DataFrame:
    """Three recordings at three rates, nine segments in an order that mixes them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [("a.wav", 4000, 2.75), ("b.flac", 16000, 2.51), ("c.wav", 44100, 2.333)]
    paths = [write_recording(folder / name, rate, s, seed) for seed, (name, rate, s) in enumerate(files)]
    return pd.DataFrame(
        [(path, start, end) for start, end in SPANS for path in paths], columns=["path", "start", "end"]
    )


@pytest.fixture
def segments(tmp_path: Path) -> pd.DataFrame:
    return write_recordings(tmp_path / "recordings")


def plain_cycle(path: Path, start: float, end: float, rate: int, resample: str, rounding: str) -> tuple[Any, int, int]:
    """One cycle by the rules, alone."""

    def position(seconds: float, at_rate: int) -> int:
        return int(seconds * at_rate) if rounding == "truncate" else round(seconds * 1000) * at_rate // 1000

    waveform, native = audio.read(path)
    if resample == "recording":
        waveform = audio.resample(waveform, native, rate)
        cycle = waveform[position(start, rate) : position(end, rate)]
        return cycle, position(start, rate), len(waveform)
    cycle = audio.resample(waveform[position(start, native) : position(end, native)], native, rate)
    return cycle, 0, len(cycle)


# ----------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("rounding", ["truncate", "milliseconds"])
@pytest.mark.parametrize("resample", ["recording", "cycle"])
@pytest.mark.parametrize("rate", [16000, 8000])
def test_every_cycle_follows_the_rules(
    segments: pd.DataFrame, cache: Path, rate: int, resample: Any, rounding: Any
) -> None:
    store = WaveformStore.open(segments, rate, resample=resample, rounding=rounding, cache_dir=cache, progress=False)
    assert len(store) == len(segments)
    for cycle, (path, start, end) in zip(store, segments.itertuples(index=False), strict=True):
        samples, begin, total = plain_cycle(path, start, end, rate, resample, rounding)
        np.testing.assert_array_equal(cycle.samples, samples)
        assert (cycle.begin, cycle.total) == (begin, total)
    store.verify()


def test_rounding_differs_where_it_should(cache: Path, tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.wav", 8000, 1.0)
    segments = pd.DataFrame({"path": [path], "start": [0.1006], "end": [0.5004]})
    lengths = {}
    for rounding in ("truncate", "milliseconds"):
        store = WaveformStore.open(segments, 8000, rounding=rounding, cache_dir=cache, progress=False)
        lengths[rounding] = (store[0].begin, len(store[0].samples))
    assert lengths == {"truncate": (804, 4003 - 804), "milliseconds": (808, 4000 - 808)}


@pytest.mark.parametrize("name", ["r44100", "r4000"])
def test_patch_mix_chain(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    vectors = np.load(shared("golden/patchmix") / "preprocess.npz")
    soundfile.write(tmp_path / "a.wav", vectors[f"{name}_pcm"], int(vectors[f"{name}_sr"]))
    segments = pd.DataFrame(vectors[f"{name}_ann"][:, :2], columns=["start", "end"]).assign(
        path=str(tmp_path / "a.wav")
    )
    store = WaveformStore.open(segments, 16000, cache_dir=tmp_path, progress=False)
    assert [len(cycle.samples) for cycle in store] == vectors[f"{name}_slice_lengths"].tolist()
    for pad in ("repeat", "zero"):
        for row, expected in zip(vectors[f"{name}_{pad}_cycles"], vectors[f"{name}_{pad}"], strict=True):
            samples, begin, total = store[row]
            fitted = audio.fit_length(audio.fade(samples, 1000, begin, total), 128000, pad, 1000)
            np.testing.assert_allclose(fitted, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:1 of 1 recordings have several channels")
@pytest.mark.parametrize("number", [0, 1, 2], ids=["44k", "4k-stereo-cut", "16k"])
def test_scl_chain(shared: Callable[[str], Path], tmp_path: Path, number: int) -> None:
    vectors = np.load(shared("golden/scl") / "preprocess.npz")
    soundfile.write(tmp_path / "a.wav", vectors[f"raw_{number}"], int(vectors[f"sr_{number}"]))
    span = {"start": [float(vectors[f"onset_{number}"])], "end": [float(vectors[f"offset_{number}"])]}
    segments = pd.DataFrame({"path": [tmp_path / "a.wav"], **span})
    samples, begin, total = WaveformStore.open(segments, 16000, resample="cycle", cache_dir=tmp_path, progress=False)[0]
    assert total == len(samples) == vectors[f"cycle_samples_{number}"]
    cycle = audio.fade(samples, 1000, begin, total)
    size = 16000 * int(vectors[f"duration_{number}"])
    np.testing.assert_allclose(audio.fit_length(cycle, size, "repeat", 1000), vectors[f"circular_{number}"], atol=2e-6)
    if f"zero_{number}" in vectors:
        np.testing.assert_allclose(audio.fit_length(cycle, size, "zero"), vectors[f"zero_{number}"], atol=2e-6)


def test_stereo_is_averaged_with_one_warning(tmp_path: Path, cache: Path) -> None:
    paths = [write_recording(tmp_path / f"{n}.wav", 8000, 1.0, n, channels) for n, channels in enumerate((1, 2, 3))]
    segments = pd.DataFrame({"path": paths, "start": 0.0, "end": 1.0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = WaveformStore.open(segments, 8000, cache_dir=cache, progress=False)
    messages = [str(warning.message) for warning in caught]
    assert messages == [f"2 of 3 recordings have several channels, which are averaged (first: {paths[1]})"]
    assert caught[0].filename == __file__
    np.testing.assert_allclose(store[2].samples, soundfile.read(paths[2])[0].mean(axis=1), atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- views


def test_cycles_are_read_only_views_of_the_file(segments: pd.DataFrame, cache: Path) -> None:
    store = WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    samples = store[3].samples
    assert type(samples) is np.ndarray
    assert samples.dtype == np.float32
    assert np.shares_memory(samples, store[3].samples)
    with pytest.raises(ValueError, match="read-only"):
        samples[0] = 1
    np.testing.assert_array_equal(store[-1].samples, store[len(store) - 1].samples)
    with pytest.raises(IndexError):
        store[len(store)]


def test_the_cache_folder_is_the_argument_or_the_variable_or_the_users(
    segments: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("RESPIRO_CACHE", str(tmp_path / "variable"))
    by_argument = WaveformStore.open(segments, 4000, cache_dir=tmp_path / "argument", progress=False)
    by_variable = WaveformStore.open(segments, 4000, progress=False)
    monkeypatch.delenv("RESPIRO_CACHE")
    by_default = WaveformStore.open(segments, 4000, progress=False)
    assert by_argument.folder.parent == tmp_path / "argument" / "waveforms"
    assert by_variable.folder.parent == tmp_path / "variable" / "waveforms"
    if sys.platform == "linux":
        assert by_default.folder.parent == tmp_path / "user" / "respiro" / "waveforms"


# --------------------------------------------------------------------------------------------------------------- key


def _rename(segments: pd.DataFrame) -> pd.DataFrame:
    path = segments["path"][0]
    return segments.replace({path: path.rename(path.with_name("other.wav"))})


def _lengthen(segments: pd.DataFrame) -> pd.DataFrame:
    path = segments["path"][0]
    times = path.stat()
    write_recording(path, 4000, 2.76)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return segments


def _touch(segments: pd.DataFrame) -> pd.DataFrame:
    path = segments["path"][0]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return segments


def _set(column: str, value: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(segments: pd.DataFrame) -> pd.DataFrame:
        changed = segments.copy()
        changed.loc[4, column] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (_rename, {}),
        (_lengthen, {}),
        (_touch, {}),
        (_set("start", 0.8614), {}),
        (_set("end", 2.0005), {}),
        (lambda s: s.iloc[::-1], {}),
        (lambda s: s.iloc[:-1], {}),
        (lambda s: s.assign(path=s["path"].to_numpy()[[1, 0, 2, 3, 4, 5, 6, 7, 8]]), {}),
        (lambda s: s, {"sample_rate": 8000}),
        (lambda s: s, {"resample": "cycle"}),
        (lambda s: s, {"rounding": "milliseconds"}),
    ],
    ids=["name", "size", "mtime", "start", "end", "order", "rows", "path", "sample-rate", "resample", "rounding"],
)
def test_whatever_shapes_the_content_makes_another_store(
    segments: pd.DataFrame,
    cache: Path,
    left_in: LeftIn,
    change: Callable[[pd.DataFrame], pd.DataFrame],
    settings: dict[str, Any],
) -> None:
    base: dict[str, Any] = {"sample_rate": 4000, "cache_dir": cache, "progress": False}
    before = WaveformStore.open(segments, **base)
    after = WaveformStore.open(change(segments), **(base | settings))
    assert after.folder != before.folder
    assert sorted(left_in()) == sorted([before.folder.name, after.folder.name])


def test_the_place_of_the_recordings_and_other_columns_do_not_matter(
    segments: pd.DataFrame, cache: Path, tmp_path: Path
) -> None:
    before = WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    moved = shutil.copytree(tmp_path / "recordings", tmp_path / "elsewhere")
    elsewhere = segments.assign(path=[str(moved / path.name) for path in segments["path"]], label=1).set_index("label")
    assert WaveformStore.open(elsewhere, 4000, cache_dir=cache, progress=False).folder == before.folder


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_disk_without_room_for_a_cycle_leaves_nothing(
    segments: pd.DataFrame, cache: Path, left_in: LeftIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    def open_on_full_disk(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "r+b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(StoreError, match=r"writing failed: .*No space left on device.*RESPIRO_CACHE"):
        WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    assert left_in() == []
    monkeypatch.undo()
    WaveformStore.open(segments, 4000, cache_dir=cache, progress=False).verify()


@pytest.mark.parametrize("broken", ["missing", "truncated"])
def test_a_bad_recording_stops_the_build(segments: pd.DataFrame, cache: Path, left_in: LeftIn, broken: str) -> None:
    path = segments["path"][1]
    if broken == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"b\.flac: (cannot be opened|is (damaged or )?truncated)"):
        WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    assert left_in() == []


@pytest.mark.parametrize(
    ("start", "end", "problem"),
    [
        (0.5, 0.50001, "holds no samples of its recording"),
        (2.75, 2.9, "holds no samples of its recording"),
        (0.5, 0.5, "is not a span of time"),
        (0.5, 0.4, "is not a span of time"),
        (-0.1, 0.4, "is not a span of time"),
        (math.nan, 0.4, "is not a span of time"),
        (0.1, math.nan, "is not a span of time"),
        (0.1, math.inf, "is not a span of time"),
    ],
    ids=["rounded-away", "after-the-end", "empty", "backwards", "negative", "nan-start", "nan-end", "endless"],
)
@pytest.mark.parametrize("resample", ["recording", "cycle"])
def test_a_segment_without_samples_is_named(
    segments: pd.DataFrame, cache: Path, resample: Any, start: float, end: float, problem: str
) -> None:
    segments.loc[3, ["start", "end"]] = [start, end]
    with pytest.raises(AnnotationError, match=rf"a\.wav: segment 3 \({start} s to {end} s\) {problem}"):
        WaveformStore.open(segments, 4000, resample=resample, cache_dir=cache, progress=False)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda s: s.drop(columns="end"), {}, "must have the columns path, start and end, end is missing"),
        (lambda s: s.iloc[:0], {}, "at least one row"),
        (lambda s: s, {"sample_rate": 0}, "sample_rate must be positive, got 0"),
        (lambda s: s, {"resample": "never"}, "resample must be one of 'recording', 'cycle', got 'never'"),
        (lambda s: s, {"rounding": "up"}, "rounding must be one of 'truncate', 'milliseconds', got 'up'"),
    ],
    ids=["no-end", "no-rows", "rate", "resample", "rounding"],
)
def test_arguments_without_meaning_are_refused(
    segments: pd.DataFrame,
    cache: Path,
    change: Callable[[pd.DataFrame], pd.DataFrame],
    settings: dict[str, Any],
    message: str,
) -> None:
    arguments: dict[str, Any] = {"sample_rate": 4000, "cache_dir": cache, "progress": False} | settings
    with pytest.raises(ValueError, match=message):
        WaveformStore.open(change(segments), **arguments)
