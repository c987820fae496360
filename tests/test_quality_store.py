"""The quality cache: content, key, builders side by side, and what goes wrong."""

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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.errors import StoreError
from respiro.store import QualityStore

READING = {"store": "0123"}
SPEC = {"class_path": "respiro.transforms.Measure", "init_args": {"hop": 0.01, "band": [50, 2000]}}


class Measure:
    """Mean and RMS of a clip, in float64, and who called it with what."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.seen: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, clips: Tensor) -> Tensor:
        assert clips.dtype == torch.float32
        assert torch.get_num_threads() == 1 or threading.current_thread() is threading.main_thread()
        self.seen.append(clips.shape[1])
        self.threads.add(threading.get_ident())
        clips = self.gain * clips.double()
        return torch.stack([clips.mean(1), clips.square().mean(1).sqrt()], dim=1)


def samples(row: int) -> np.ndarray:
    clip = np.random.default_rng(row).standard_normal(5 + 7 * (row % 9), dtype="float32")
    clip.flags.writeable = False  # as those of the waveform store
    return clip


def expected(row: int) -> list[float]:
    clip = [float(x) for x in samples(row)]
    return [sum(clip) / len(clip), (sum(x * x for x in clip) / len(clip)) ** 0.5]


def names(count: int) -> list[str]:
    return [f"recording 'r{row}', {row} s to {row + 1} s" for row in range(count)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(
    cache: Path,
    measure: Callable[[Tensor], Tensor] | None = None,
    count: int = 70,
    reading: Any = READING,
    spec: Any = SPEC,
    read: Callable[[int], np.ndarray] = samples,
) -> QualityStore:
    measure = Measure() if measure is None else measure
    return QualityStore.open(read, names(count), reading, measure, spec, cache_dir=cache, progress=False)


def left_in(cache: Path) -> list[str]:
    """What lies in the cache, without the locks."""
    return [path.name for path in (cache / "quality").glob("*") if path.suffix != ".lock"]


# ----------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("count", [1, 2, 70])
def test_every_cycle_has_its_measures(cache: Path, count: int) -> None:
    measure = Measure()
    store = opened(cache, measure, count)
    assert len(store) == count
    assert store.values.shape == (count, 2)
    for row, measures in enumerate(store):
        assert measures.dtype == np.float32
        np.testing.assert_allclose(measures, expected(row), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(store[row], measures)
    assert sorted(measure.seen) == sorted(len(samples(row)) for row in range(count))  # each once, by itself
    assert threading.get_ident() not in measure.threads
    store.verify()


def test_the_file_holds_nothing_but_the_measures(cache: Path) -> None:
    store = opened(cache, count=5)
    content = np.frombuffer((store.folder / "measures.f32").read_bytes(), "<f4")
    np.testing.assert_array_equal(content.reshape(5, 2), store.values)
    with pytest.raises(ValueError, match="read-only"):
        store[0][0] = 1
    store.values[0] = 7  # a copy
    store.verify()
    with pytest.raises(IndexError):
        store[5]


def test_torch_keeps_its_threads(cache: Path) -> None:
    before = torch.get_num_threads()
    opened(cache)
    assert torch.get_num_threads() == before


def test_a_finished_store_is_opened_without_writing(cache: Path) -> None:
    """Two cycles are measured, to be compared."""
    first = opened(cache)
    (lock,) = cache.glob("quality/*.lock")
    lock.unlink()
    measure = Measure()
    assert opened(cache, measure).folder == first.folder
    assert not lock.exists()
    assert measure.seen == [len(samples(0)), len(samples(69))]


def test_a_measure_that_gives_something_else_is_noticed(cache: Path) -> None:
    folder = opened(cache).folder
    with pytest.raises(
        StoreError, match=f"{folder} cannot be used: cycle 0 has .* is measured now.*Delete that folder"
    ):
        opened(cache, Measure(gain=1.1))
    assert opened(cache, Measure(gain=1.0001)).folder == folder  # as another machine would round


def test_a_pickled_store_is_small_and_opens_in_a_spawned_process(cache: Path) -> None:
    store = opened(cache)
    assert len(pickle.dumps(store)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measures = pool.apply(operator.getitem, (store, 40))
    np.testing.assert_array_equal(measures, store[40])


# --------------------------------------------------------------------------------------------------------------- key


@pytest.mark.parametrize(
    ("reading", "spec"),
    [
        ({"store": "0124"}, SPEC),
        (READING, {**SPEC, "class_path": "respiro.transforms.Other"}),
        (READING, {**SPEC, "init_args": {"hop": 0.02, "band": [50, 2000]}}),
        (READING, {**SPEC, "init_args": {"hop": 0.01, "band": None}}),
    ],
    ids=["waveforms", "class", "argument", "none"],
)
def test_whatever_shapes_the_content_makes_another_store(cache: Path, reading: Any, spec: Any) -> None:
    before = opened(cache, count=3)
    after = opened(cache, count=3, reading=reading, spec=spec)
    assert sorted(left_in(cache)) == sorted([before.folder.name, after.folder.name])
    assert before.folder != after.folder


def test_the_order_of_arguments_does_not_matter(cache: Path) -> None:
    spec = {"init_args": {"band": [50, 2000], "hop": 0.01}, "class_path": SPEC["class_path"]}
    assert opened(cache, spec=spec).folder == opened(cache).folder


# --------------------------------------------------------------------------------------------- builders, side by side

BUILD = """
import sys, time
import numpy as np
import torch
from respiro.store import QualityStore

def measure(clips):
    time.sleep(0.005)
    return torch.stack([clips.mean(1), clips.amax(1)], dim=1)

print("ready", flush=True)
sys.stdin.readline()
store = QualityStore.open(lambda row: np.full(10, row, "float32"), [str(n) for n in range(300)], {}, measure,
                          {"class_path": "a.B", "init_args": {}}, cache_dir=sys.argv[1])
store.verify()
assert all((measures == row).all() for row, measures in enumerate(store))
print((store.folder / "measures.f32").stat().st_ino)
"""


def start_builder(cache: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", BUILD, str(cache)], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def go(builder: subprocess.Popen[str]) -> None:
    assert builder.stdin is not None
    builder.stdin.write("\n")
    builder.stdin.flush()


def test_two_builders_at_once_build_once(cache: Path) -> None:
    builders = [start_builder(cache) for _ in range(2)]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        go(builder)
    ends = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], ends
    assert ends[0][0] == ends[1][0]  # the same file
    assert sorted("measuring 300 cycles: 100%" in errors for _, errors in ends) == [False, True]
    assert len(left_in(cache)) == 1


def test_a_killed_builder_leaves_nothing_that_matters(cache: Path) -> None:
    with start_builder(cache) as builder:
        go(builder)
        deadline = time.monotonic() + 60
        while not list(cache.glob("quality/*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        builder.kill()
    (partial,) = left_in(cache)
    assert partial.endswith(".partial")
    again = start_builder(cache)
    _, errors = again.communicate("\n", timeout=60)
    assert again.returncode == 0, errors
    assert left_in(cache) == [partial.removesuffix(".partial")]


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("row", [0, 40, 69])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_samples_that_are_not_finite_name_their_cycle_and_leave_nothing(cache: Path, row: int, value: float) -> None:
    def changed(position: int) -> np.ndarray:
        clip = np.array(samples(position))
        clip[3] = value if position == row else clip[3]
        return clip

    before = torch.get_num_threads()
    message = (
        f"^recording 'r{row}', {row} s to {row + 1} s: it holds samples that are not finite. Look at the recording"
    )
    with pytest.raises(StoreError, match=message):
        opened(cache, read=changed)
    assert left_in(cache) == []
    assert torch.get_num_threads() == before
    opened(cache).verify()


@pytest.mark.parametrize("gain", [float("nan"), 1e60], ids=["nan", "beyond-float32"])
def test_measures_that_are_not_finite_name_their_cycle(cache: Path, gain: float) -> None:
    with pytest.raises(
        StoreError, match=r"^recording 'r0', 0 s to 1 s: the quality measure made of it values that are"
    ):
        opened(cache, Measure(gain))
    assert left_in(cache) == []


def test_a_measure_that_fails_leaves_nothing(cache: Path) -> None:
    def failing(clips: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        opened(cache, failing)
    assert left_in(cache) == []


@pytest.mark.parametrize("measure", [lambda x: x.mean(1), lambda x: x[0, :2], lambda x: x[:, :3]])
def test_a_measure_of_another_shape_is_refused(cache: Path, measure: Any) -> None:
    with pytest.raises(ValueError, match=r"one clip must have measures of shape \(1, 2\), got"):
        opened(cache, measure)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": {**SPEC, "init_args": {"window": torch.ones(3)}}}, "plain data.*Tensor"),
        ({"reading": {"store": np.float32(1.0)}}, "plain data.*float32"),
        ({"count": 0}, "there are no cycles to measure"),
    ],
    ids=["spec", "reading", "nothing"],
)
def test_what_cannot_be_told_from_others_is_refused(cache: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(cache, **arguments)
    assert left_in(cache) == []


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
        (lambda folder: (folder / "measures.f32").unlink(), r"measures\.f32 is missing"),
        (_cut("measures.f32", 4), r"measures\.f32 has 5 measures instead of 6"),
        (_cut("measures.f32", 1), ""),
        (_cut("measures.f32", -8), r"measures\.f32 has 8 measures instead of 6"),
        (_write("measures.f32", b""), ""),
        (_flip("index.npy", -1), r"index\.npy does not match its checksum"),
        (_flip("measures.f32", 3), "cycle 0 has"),  # the exponent of the first
        (_write("meta.json", b"{"), ""),
        (_write("meta.json", json.dumps({"format": 99}).encode()), "it has format 99, this version of respiro reads 1"),
    ],
    ids=[
        *("no-meta", "no-index", "no-measures", "short", "ragged", "long", "empty", "index-changed"),
        *("first-changed", "meta-broken", "other-format"),
    ],
)
def test_a_damaged_store_says_what_to_do(cache: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = opened(cache, count=3).folder
    damage(folder)
    with pytest.raises(
        StoreError, match=rf"the quality cache {folder} cannot be used: {message}.*\. Delete that folder; it is rebuilt"
    ):
        opened(cache, count=3)
    shutil.rmtree(folder)
    opened(cache, count=3).verify()


@pytest.mark.parametrize(("row", "position"), [(0, 0), (2, -1)], ids=["first-byte", "last-byte"])
def test_verify_finds_one_changed_byte(cache: Path, row: int, position: int) -> None:
    folder = opened(cache, count=3).folder
    _flip("measures.f32", position)(folder)
    with pytest.raises(StoreError, match=f"cycle {row} does not match its checksum. Delete that folder"):
        QualityStore(folder).verify()


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = rf"the quality cache cannot be written to {tmp_path}/file/quality: .*RESPIRO_CACHE"
    with pytest.raises(StoreError, match=message):
        opened(tmp_path / "file")


def test_a_disk_without_room_is_found_before_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=123))
    measure = Measure()
    with pytest.raises(StoreError, match=r"needs 560 bytes, 123 are free\. Make room.*RESPIRO_CACHE"):
        opened(cache, measure)
    assert measure.seen == []
    assert left_in(cache) == []


def test_a_disk_that_fills_up_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"writing failed: .*No space left on device.*RESPIRO_CACHE"):
        opened(cache)
    assert left_in(cache) == []
    monkeypatch.undo()
    opened(cache).verify()
