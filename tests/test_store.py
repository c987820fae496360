from __future__ import annotations

import errno
import json
import math
import multiprocessing
import operator
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from respiro import audio
from respiro.errors import AnnotationError, AudioError, StoreError
from respiro.store import Cycle, WaveformStore

SPANS = [(0.0, 0.8613), (0.8613, 2.0004), (2.0004, 9.0)]  # the last ends after the recording


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


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    """What lies in the cache, without the locks."""
    return [path.name for path in (cache / "waveforms").glob("*") if path.suffix != ".lock"]


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


def test_a_pickled_store_is_small_and_opens_in_a_spawned_process(segments: pd.DataFrame, cache: Path) -> None:
    store = WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    assert len(pickle.dumps(store)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        cycle = Cycle(*pool.apply(operator.getitem, (store, 4)))
    np.testing.assert_array_equal(cycle.samples, store[4].samples)
    assert cycle[1:] == store[4][1:]


def test_a_finished_store_is_opened_without_writing(segments: pd.DataFrame, cache: Path) -> None:
    first = WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    (lock,) = cache.glob("waveforms/*.lock")
    lock.unlink()
    again = WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    assert again.folder == first.folder
    assert not lock.exists()


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
    segments: pd.DataFrame, cache: Path, change: Callable[[pd.DataFrame], pd.DataFrame], settings: dict[str, Any]
) -> None:
    base: dict[str, Any] = {"sample_rate": 4000, "cache_dir": cache, "progress": False}
    before = WaveformStore.open(segments, **base)
    after = WaveformStore.open(change(segments), **(base | settings))
    assert after.folder != before.folder
    assert sorted(left_in(cache)) == sorted([before.folder.name, after.folder.name])


def test_the_place_of_the_recordings_and_other_columns_do_not_matter(
    segments: pd.DataFrame, cache: Path, tmp_path: Path
) -> None:
    before = WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    moved = shutil.copytree(tmp_path / "recordings", tmp_path / "elsewhere")
    elsewhere = segments.assign(path=[str(moved / path.name) for path in segments["path"]], label=1).set_index("label")
    assert WaveformStore.open(elsewhere, 4000, cache_dir=cache, progress=False).folder == before.folder


# --------------------------------------------------------------------------------------------- builders, side by side

BUILD = """
import sys, pandas as pd
from respiro.store import Cycle, WaveformStore
print("ready", flush=True)
sys.stdin.readline()
store = WaveformStore.open(pd.read_pickle(sys.argv[1]), 16000, cache_dir=sys.argv[2])
store.verify()
print((store.folder / "samples.f32").stat().st_ino)
"""


def start_builder(segments: pd.DataFrame, cache: Path) -> subprocess.Popen[str]:
    table = cache.parent / "segments.pickle"
    segments.to_pickle(table)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", BUILD, str(table), str(cache)], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def many_recordings(folder: Path, count: int) -> pd.DataFrame:
    """Enough work to be in the middle of: *count* names of one recording of 20 s."""
    folder.mkdir()
    first = write_recording(folder / "0.wav", 44100, 20.0)
    for number in range(1, count):
        os.link(first, folder / f"{number}.wav")
    return pd.DataFrame({"path": [folder / f"{n}.wav" for n in range(count)], "start": 0.5, "end": 4.0})


def test_two_builders_at_once_build_once(tmp_path: Path, cache: Path) -> None:
    segments = many_recordings(tmp_path / "many", 40)
    builders = [start_builder(segments, cache) for _ in range(2)]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("\n")
        builder.stdin.flush()
    ends = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert ends[0][0] == ends[1][0]  # the same file
    assert sorted("preparing 40 cycles: 100%" in errors for _, errors in ends) == [False, True]
    assert len(left_in(cache)) == 1


def test_a_killed_builder_leaves_nothing_that_matters(tmp_path: Path, cache: Path) -> None:
    segments = many_recordings(tmp_path / "many", 100)
    with start_builder(segments, cache) as builder:
        assert builder.stdin is not None
        builder.stdin.write("\n")
        builder.stdin.flush()
        deadline = time.monotonic() + 60
        while not list(cache.glob("waveforms/*.partial/samples.f32")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        builder.kill()
    (partial,) = left_in(cache)
    assert partial.endswith(".partial")
    store = WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    store.verify()
    assert left_in(cache) == [partial.removesuffix(".partial")] == [store.folder.name]
    np.testing.assert_array_equal(store[0].samples, store[99].samples)


def test_the_build_gives_torch_its_threads_back(segments: pd.DataFrame, cache: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _flip(name: str, position: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return change


def _cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "meta.json").unlink(), r"meta\.json is missing"),
        (lambda folder: (folder / "index.npy").unlink(), r"index\.npy is missing"),
        (lambda folder: (folder / "samples.f32").unlink(), r"samples\.f32 is missing"),
        (_cut("samples.f32", 4), r"samples\.f32 has \d+ samples instead of \d+"),
        (_cut("samples.f32", 3), ""),
        (_cut("samples.f32", -4), r"samples\.f32 has \d+ samples instead of \d+"),
        (_write("samples.f32", b""), ""),
        (_cut("index.npy", 5), ""),
        (_write("index.npy", b""), ""),
        (_flip("index.npy", -1), r"index\.npy does not match its checksum"),
        (_write("meta.json", b"{"), ""),
        (_write("meta.json", b"\xff\xfe"), ""),
        (_write("meta.json", b"[]"), "it has format None, this version of respiro reads 1"),
        (_write("meta.json", json.dumps({"format": 99}).encode()), "it has format 99, this version of respiro reads 1"),
    ],
    ids=[
        *("no-meta", "no-index", "no-samples", "samples-short", "samples-ragged", "samples-long", "samples-empty"),
        *("index-short", "index-empty", "index-changed", "meta-broken", "meta-binary", "meta-list", "other-format"),
    ],
)
def test_a_damaged_store_says_what_to_do(
    segments: pd.DataFrame, cache: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = WaveformStore.open(segments, 4000, cache_dir=cache, progress=False).folder
    damage(folder)
    with pytest.raises(StoreError, match=rf"{folder} cannot be used: {message}.*\. Delete that folder; it is rebuilt"):
        WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    shutil.rmtree(folder)
    WaveformStore.open(segments, 4000, cache_dir=cache, progress=False).verify()


@pytest.mark.parametrize(("row", "position"), [(0, 0), (8, -1)], ids=["first-byte", "last-byte"])
def test_verify_finds_one_changed_byte(segments: pd.DataFrame, cache: Path, row: int, position: int) -> None:
    folder = WaveformStore.open(segments, 4000, cache_dir=cache, progress=False).folder
    _flip("samples.f32", position)(folder)
    with pytest.raises(StoreError, match=f"cycle {row} does not match its checksum. Delete that folder"):
        WaveformStore(folder).verify()


def test_a_cache_that_cannot_be_written_names_the_way_out(segments: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = rf"the waveform cache cannot be written to {tmp_path}/file/waveforms: .*RESPIRO_CACHE"
    with pytest.raises(StoreError, match=message):
        WaveformStore.open(segments, 4000, cache_dir=tmp_path / "file", progress=False)


def test_a_disk_without_room_is_found_before_the_work(
    segments: pd.DataFrame, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    with pytest.raises(StoreError, match=r"needs \d+,\d{3} bytes, 1,234 are free\. Make room.*RESPIRO_CACHE"):
        WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    assert left_in(cache) == []


def test_a_file_that_cannot_grow_leaves_nothing(segments: pd.DataFrame, cache: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no file size limits")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=r"needs [\d,]+ bytes, [\d,]+ are free, and writing failed: .*RESPIRO_CACHE"
        ):
            WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(cache) == []


def test_a_disk_that_fills_up_leaves_nothing(
    segments: pd.DataFrame, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    def open_on_full_disk(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "r+b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(StoreError, match=r"writing failed: .*No space left on device.*RESPIRO_CACHE"):
        WaveformStore.open(segments, 4000, cache_dir=cache, progress=False)
    assert left_in(cache) == []
    monkeypatch.undo()
    WaveformStore.open(segments, 4000, cache_dir=cache, progress=False).verify()


@pytest.mark.parametrize("broken", ["missing", "truncated"])
def test_a_bad_recording_stops_the_build(segments: pd.DataFrame, cache: Path, broken: str) -> None:
    path = segments["path"][1]
    if broken == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"b\.flac: (cannot be opened|is (damaged or )?truncated)"):
        WaveformStore.open(segments, 16000, cache_dir=cache, progress=False)
    assert left_in(cache) == []


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
