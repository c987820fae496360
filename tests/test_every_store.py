"""What every store must do: be built once, be whole or absent, and say what is wrong with it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import operator
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch import Tensor

from respiro.errors import StoreError
from respiro.store import FeatureStore, QualityStore, WaveformStore

LeftIn = Callable[[], list[str]]


def write_recording(path: Path, rate: int, seconds: float) -> Path:
    soundfile.write(path, 0.1 * np.random.default_rng(rate).standard_normal(round(rate * seconds)), rate, "PCM_16")
    return path


def open_waveforms(cache: Path, count: int = 3, progress: bool = False) -> WaveformStore:
    """Cycles of 2000 samples, of the recordings beside the cache in turn."""
    paths = sorted((cache.parent / "recordings").iterdir())
    segments = pd.DataFrame({"path": [paths[row % len(paths)] for row in range(count)], "start": 0.1, "end": 0.6})
    return WaveformStore.open(segments, 4000, cache_dir=cache, progress=progress)


def clip(row: int) -> np.ndarray:
    return np.full(95, row, dtype="float32")


def frames(clips: Tensor) -> Tensor:
    time.sleep(0.02)  # long enough for others to come while many are computed
    return clips.unfold(1, 10, 10)


def mean_and_peak(clips: Tensor) -> Tensor:
    time.sleep(0.005)
    return torch.stack([clips.mean(1), clips.amax(1)], dim=1)


def open_computed(
    store: type[FeatureStore | QualityStore],
    compute: Callable[[Tensor], Tensor],
    cache: Path,
    count: int = 3,
    progress: bool = False,
) -> FeatureStore | QualityStore:
    names = [f"recording 'r{row}'" for row in range(count)]
    spec = {"class_path": "respiro.transforms.Part", "init_args": {}}
    return store.open(clip, names, {"store": "0123"}, compute, spec, cache_dir=cache, progress=progress)


open_features = partial(open_computed, FeatureStore, frames)
open_quality = partial(open_computed, QualityStore, mean_and_peak)


@dataclass(frozen=True)
class Kind:
    """A kind of store, and what there is to know of it."""

    folder: str  #: in the cache
    open: Callable[..., Any]
    what: str  #: in messages
    file: str
    values: int  #: of a cycle
    item: int  #: bytes of a value
    many: int  #: cycles that keep a builder busy
    work: str  #: over the progress bar


KINDS = {
    kind.folder: kind
    for kind in (
        Kind("waveforms", open_waveforms, "waveform cache", "samples.f32", 2000, 4, 60, "preparing"),
        Kind("features", open_features, "feature cache", "features.f16", 90, 2, 1600, "computing features of"),
        Kind("quality", open_quality, "quality cache", "measures.f32", 2, 4, 300, "measuring"),
    )
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def cache(cache: Path) -> Path:
    """With three recordings at three rates beside it."""
    (cache.parent / "recordings").mkdir()
    for rate in (4000, 16000, 44100):
        write_recording(cache.parent / "recordings" / f"{rate}.wav", rate, 0.7)
    return cache


# ------------------------------------------------------------------------------------------------------------ opening


def test_a_pickled_store_is_small_and_opens_in_a_spawned_process(kind: Kind, cache: Path) -> None:
    store = kind.open(cache, 70)
    assert len(pickle.dumps(store)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        cycle = pool.apply(operator.getitem, (store, 40))
    np.testing.assert_equal(cycle, store[40])


def test_a_finished_store_is_opened_without_writing(kind: Kind, cache: Path) -> None:
    first = kind.open(cache)
    (lock,) = cache.glob(f"{kind.folder}/*.lock")
    lock.unlink()
    assert kind.open(cache).folder == first.folder
    assert not lock.exists()


def test_the_build_gives_torch_its_threads_back(kind: Kind, cache: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        kind.open(cache)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------- builders, side by side


def build(folder: str, cache: str) -> None:
    """What a builder does, in a process of its own."""
    print("ready", flush=True)
    sys.stdin.readline()
    kind = KINDS[folder]
    store = kind.open(Path(cache), kind.many, progress=True)
    store.verify()
    cycles = [cycle.samples if folder == "waveforms" else cycle for cycle in store]
    expected = [cycles[0] if folder == "waveforms" else row for row in range(kind.many)]
    assert all(np.all(cycle == wanted) for cycle, wanted in zip(cycles, expected, strict=True))
    print(store.folder.name, (store.folder / kind.file).stat().st_ino)


def start_builder(kind: Kind, cache: Path) -> subprocess.Popen[str]:
    code = f"import runpy; runpy.run_path({__file__!r})['build']({kind.folder!r}, {str(cache)!r})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def go(builder: subprocess.Popen[str]) -> None:
    assert builder.stdin is not None
    builder.stdin.write("\n")
    builder.stdin.flush()


@pytest.fixture
def busy_cache(cache: Path) -> Path:
    """Beside it enough recordings to be in the middle of: many names of one of 20 s."""
    recordings = cache.parent / "recordings"
    shutil.rmtree(recordings)
    recordings.mkdir()
    first = write_recording(recordings / "0.wav", 44100, 20.0)
    for number in range(1, KINDS["waveforms"].many):
        os.link(first, recordings / f"{number}.wav")
    return cache


def test_two_builders_at_once_build_once(kind: Kind, busy_cache: Path, left_in: LeftIn) -> None:
    builders = [start_builder(kind, busy_cache) for _ in range(2)]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        go(builder)
    ends = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], ends
    assert ends[0][0] == ends[1][0]  # the same file
    assert sorted(f"{kind.work} {kind.many} cycles: 100%" in errors for _, errors in ends) == [False, True]
    assert len(left_in()) == 1


def test_a_killed_builder_leaves_nothing_that_matters(kind: Kind, busy_cache: Path, left_in: LeftIn) -> None:
    begun = "*.partial" if kind.folder == "quality" else f"*.partial/{kind.file}"  # quality is written at the end
    with start_builder(kind, busy_cache) as builder:
        go(builder)
        deadline = time.monotonic() + 60
        while not list(busy_cache.glob(f"{kind.folder}/{begun}")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        builder.kill()
    (partial,) = left_in()
    assert partial.endswith(".partial")
    again = start_builder(kind, busy_cache)
    output, errors = again.communicate("\n", timeout=60)
    assert again.returncode == 0, errors
    assert left_in() == [partial.removesuffix(".partial")] == [output.split()[1]]


# ------------------------------------------------------------------------------------------------------ what goes wrong


def assert_refused(kind: Kind, cache: Path, folder: Path, message: str) -> None:
    """The store says so, and how to go on; and one can."""
    message = rf"the {kind.what} {folder} cannot be used: {message}.*\. Delete that folder; it is rebuilt"
    with pytest.raises(StoreError, match=message):
        kind.open(cache)
    shutil.rmtree(folder)
    kind.open(cache).verify()


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("name", ["meta.json", "index.npy", "array"])
def test_a_missing_file_is_named(kind: Kind, cache: Path, name: str) -> None:
    folder = kind.open(cache).folder
    name = kind.file if name == "array" else name
    (folder / name).unlink()
    assert_refused(kind, cache, folder, f"{name} is missing".replace(".", r"\."))


@pytest.mark.parametrize("more", ["-1 value", "1 value", "1 cycle"])
def test_a_file_of_another_size_is_refused(kind: Kind, cache: Path, more: str) -> None:
    folder = kind.open(cache).folder
    size, values = 3 * kind.values, int(more.split()[0]) * (kind.values if "cycle" in more else 1)
    os.truncate(folder / kind.file, kind.item * (size + values))
    name, unit = kind.file.replace(".", r"\."), kind.file.split(".")[0]
    assert_refused(kind, cache, folder, f"{name} has {size + values} {unit} instead of {size}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("array", lambda content: content[:-1], ""),
        ("array", lambda content: content[:-3], ""),
        ("array", lambda content: b"", ""),
        ("index.npy", lambda content: content[:-2], ""),
        ("index.npy", lambda content: content[:-5], ""),
        ("index.npy", lambda content: b"", ""),
        ("index.npy", lambda content: flipped(content, -1), r"index\.npy does not match its checksum"),
        ("meta.json", lambda content: b"{", ""),
        ("meta.json", lambda content: b"\xff\xfe", ""),
        ("meta.json", lambda content: b"[]", "it has format None, this version of respiro reads 1"),
        (
            "meta.json",
            lambda content: json.dumps({"format": 99}).encode(),
            "it has format 99, this version of respiro reads 1",
        ),
    ],
    ids=[
        *("ragged", "more-ragged", "empty", "index-short", "index-shorter", "index-empty", "index-changed"),
        *("meta-broken", "meta-binary", "meta-list", "other-format"),
    ],
)
def test_a_damaged_store_says_what_to_do(
    kind: Kind, cache: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    folder = kind.open(cache).folder
    file = folder / (kind.file if name == "array" else name)
    file.write_bytes(change(file.read_bytes()))
    assert_refused(kind, cache, folder, message)


@pytest.mark.parametrize(("row", "position"), [(0, 0), (8, -1)], ids=["first-byte", "last-byte"])
def test_verify_finds_one_changed_byte(kind: Kind, cache: Path, row: int, position: int) -> None:
    store = kind.open(cache, 9)
    file = store.folder / kind.file
    file.write_bytes(flipped(file.read_bytes(), position))
    with pytest.raises(StoreError, match=f"cycle {row} does not match its checksum. Delete that folder"):
        type(store)(store.folder).verify()


def test_a_cache_that_cannot_be_written_names_the_way_out(kind: Kind, cache: Path) -> None:
    cache.write_text("in the way")
    message = rf"the {kind.what} cannot be written to {cache}/{kind.folder}: .*RESPIRO_CACHE"
    with pytest.raises(StoreError, match=message):
        kind.open(cache)


def test_a_disk_without_room_is_found_before_the_work(
    kind: Kind, cache: Path, left_in: LeftIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    size = 700 * kind.values * kind.item
    with pytest.raises(StoreError, match=rf"needs {size:,} bytes, 1,234 are free\. Make room.*RESPIRO_CACHE"):
        kind.open(cache, 700)
    assert left_in() == []


def test_a_file_that_cannot_grow_leaves_nothing(kind: Kind, cache: Path, left_in: LeftIn) -> None:
    resource = pytest.importorskip("resource", reason="this system has no file size limits")
    size = 70 * kind.values * kind.item
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    message = rf"needs {size:,} bytes, [\d,]+ are free, and writing failed: .*RESPIRO_CACHE"
    try:
        with pytest.raises(StoreError, match=message):
            kind.open(cache, 70)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in() == []


def test_a_disk_that_fills_up_leaves_nothing(
    kind: Kind, cache: Path, left_in: LeftIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"writing failed: .*No space left on device.*RESPIRO_CACHE"):
        kind.open(cache)
    assert left_in() == []
    monkeypatch.undo()
    kind.open(cache).verify()
