"""The feature cache: content, key, builders side by side, and what goes wrong."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from respiro.errors import StoreError
from respiro.store import FeatureStore

HOP, SIZE = 10, 95  # nine frames of ten samples, five samples left over
READING = {"store": "0123", "duration": 0.5}
SPEC = {"class_path": "respiro.transforms.Frames", "init_args": {"gain": 2.0, "bands": [1, 2]}}


class Frames(nn.Module):
    """Consecutive frames times a gain, kept as they come from a layout with frames last."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.gain: Tensor
        self.register_buffer("gain", torch.tensor(gain), persistent=False)
        self.seen: list[int] = []
        self.drop = nn.Dropout(0.5)

    def forward(self, waveform: Tensor) -> Tensor:
        assert waveform.dtype == torch.float32
        self.seen.append(len(waveform))
        frames = waveform.unfold(1, HOP, HOP).transpose(1, 2).contiguous()
        return self.drop(self.gain * frames).transpose(1, 2)


def waveform(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(SIZE, dtype="float32")


def expected(row: int, gain: float = 2.0) -> np.ndarray:
    return (np.float32(gain) * waveform(row)[:90].reshape(9, HOP)).astype("float16")


def names(count: int) -> list[str]:
    return [f"recording 'r{row}'" for row in range(count)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(
    cache: Path,
    features: Callable[[Tensor], Tensor] | None = None,
    count: int = 70,
    reading: Any = READING,
    spec: Any = SPEC,
    wave: Callable[[int], np.ndarray] = waveform,
) -> FeatureStore:
    front_end = Frames() if features is None else features
    return FeatureStore.open(wave, names(count), reading, front_end, spec, cache_dir=cache, progress=False)


def left_in(cache: Path) -> list[str]:
    """What lies in the cache, without the locks."""
    return [path.name for path in (cache / "features").glob("*") if path.suffix != ".lock"]


# ----------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("count", [1, 31, 32, 33, 70], ids=lambda count: f"{count}-cycles")
def test_every_cycle_has_its_features(cache: Path, count: int) -> None:
    front_end = Frames()
    store = opened(cache, front_end, count)
    assert store.shape == (count, 9, HOP)
    assert len(store) == count
    for row, features in enumerate(store):
        np.testing.assert_array_equal(features, expected(row))
        np.testing.assert_array_equal(store[row], features)
    assert max(front_end.seen) <= 32  # memory does not grow with the data set
    assert sum(front_end.seen) == count
    store.verify()


def test_the_file_holds_nothing_but_the_features(cache: Path) -> None:
    store = opened(cache, count=5)
    assert (store.folder / "features.f16").read_bytes() == b"".join(expected(row).tobytes() for row in range(5))
    assert store[0].dtype == np.float16
    with pytest.raises(ValueError, match="read-only"):
        store[0][0, 0] = 1
    np.testing.assert_array_equal(store[-1], expected(4))
    with pytest.raises(IndexError):
        store[5]


def test_a_finished_store_is_opened_without_writing(cache: Path) -> None:
    """Two cycles are computed, to be compared."""
    first = opened(cache)
    (lock,) = cache.glob("features/*.lock")
    lock.unlink()
    front_end = Frames()
    assert opened(cache, front_end).folder == first.folder
    assert not lock.exists()
    assert front_end.seen == [2]


def test_a_front_end_that_computes_something_else_is_noticed(cache: Path) -> None:
    """Its code has changed, or what its arguments do not tell."""
    folder = opened(cache).folder
    with pytest.raises(StoreError, match=f"{folder} cannot be used: it holds other features.*Delete that folder"):
        opened(cache, Frames(gain=2.1))
    with pytest.raises(StoreError, match="it holds other features"):
        opened(cache, lambda waveforms: waveforms.unfold(1, 5, 5))
    assert opened(cache, Frames(gain=2.001)).folder == folder  # as another device would round


def test_a_function_is_a_front_end_too(cache: Path) -> None:
    store = opened(cache, lambda waveforms: waveforms.unfold(1, HOP, HOP).double(), count=3)
    np.testing.assert_array_equal(store[2], expected(2, gain=1.0))


def test_the_front_end_works_alone_and_is_left_as_it_was(cache: Path) -> None:
    """In eval mode, without gradients, in full precision; a part that was frozen in eval mode stays so."""

    class Watched(Frames):
        def forward(self, waveform: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            assert (waveform @ waveform.T).dtype == torch.float32
            assert not any(part.training for part in self.modules())
            return super().forward(waveform)

    front_end = Watched()
    front_end.frozen = nn.Dropout(0.5).eval()
    with torch.autocast("cpu", torch.bfloat16):
        opened(cache, front_end)
    assert [part.training for part in (front_end, front_end.drop, front_end.frozen)] == [True, True, False]
    assert not torch.is_inference_mode_enabled()


def test_a_pickled_store_is_small_and_opens_in_a_spawned_process(cache: Path) -> None:
    store = opened(cache)
    assert len(pickle.dumps(store)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        features = pool.apply(operator.getitem, (store, 40))
    np.testing.assert_array_equal(features, expected(40))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_features_are_computed_where_the_front_end_is(cache: Path) -> None:
    class OnGPU(Frames):
        def forward(self, waveform: Tensor) -> Tensor:
            assert waveform.is_cuda
            return super().forward(waveform)

    np.testing.assert_array_equal(opened(cache, OnGPU().cuda())[40], expected(40))


# --------------------------------------------------------------------------------------------------------------- key


@pytest.mark.parametrize(
    ("reading", "spec"),
    [
        ({**READING, "store": "0124"}, SPEC),
        ({**READING, "duration": 0.6}, SPEC),
        ({**READING, "pad": "zero"}, SPEC),
        (READING, {**SPEC, "class_path": "respiro.transforms.Other"}),
        (READING, {**SPEC, "init_args": {"gain": 2.0, "bands": [2, 1]}}),
        (READING, {**SPEC, "init_args": {"gain": 2.5, "bands": [1, 2]}}),
        (READING, {**SPEC, "init_args": {"gain": 2.0, "bands": [1, 2], "inner": SPEC}}),
    ],
    ids=["waveforms", "duration", "more", "class", "order-of-a-list", "argument", "another-argument"],
)
def test_whatever_shapes_the_content_makes_another_store(cache: Path, reading: Any, spec: Any) -> None:
    before = opened(cache, count=3)
    after = opened(cache, count=3, reading=reading, spec=spec)
    assert sorted(left_in(cache)) == sorted([before.folder.name, after.folder.name])
    assert before.folder != after.folder


def test_the_order_of_arguments_does_not_matter(cache: Path) -> None:
    spec = {"init_args": {"bands": [1, 2], "gain": 2.0}, "class_path": SPEC["class_path"]}
    store = opened(cache, count=3)
    assert opened(cache, None, 3, dict(reversed(READING.items())), spec).folder == store.folder


# --------------------------------------------------------------------------------------------- builders, side by side

BUILD = """
import sys, time
import numpy as np
from respiro.store import FeatureStore

def features(waveforms):
    time.sleep(0.02)
    return waveforms.reshape(len(waveforms), 10, 100)

print("ready", flush=True)
sys.stdin.readline()
store = FeatureStore.open(lambda row: np.full(1000, row, "float32"), [str(n) for n in range(1600)], {}, features,
                          {"class_path": "a.B", "init_args": {}}, cache_dir=sys.argv[1])
store.verify()
assert all((features == row).all() for row, features in enumerate(store))
print((store.folder / "features.f16").stat().st_ino)
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
    assert sorted("computing features of 1600 cycles: 100%" in errors for _, errors in ends) == [False, True]
    assert len(left_in(cache)) == 1


def test_a_killed_builder_leaves_nothing_that_matters(cache: Path) -> None:
    with start_builder(cache) as builder:
        go(builder)
        deadline = time.monotonic() + 60
        while not list(cache.glob("features/*.partial/features.f16")):
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


def with_value(row: int, value: float) -> Callable[[int], np.ndarray]:
    def changed(position: int) -> np.ndarray:
        samples = waveform(position)
        samples[17] = value if position == row else samples[17]
        return samples

    return changed


@pytest.mark.parametrize("row", [0, 40, 69])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the front end made features that are not finite. Look at the recording"),
        (float("-inf"), "the front end made features that are not finite. Look at the recording"),
        (-40000.0, r"a feature of size 80000 is beyond 65504, the largest .*float16.*\. Scale or normalise"),
    ],
    ids=["nan", "infinite", "beyond-float16"],
)
def test_a_feature_that_cannot_be_kept_names_its_cycle_and_leaves_nothing(
    cache: Path, row: int, value: float, message: str
) -> None:
    front_end = Frames()
    with pytest.raises(StoreError, match=f"^recording 'r{row}': {message}.*leave the feature cache off"):
        opened(cache, front_end, wave=with_value(row, value))
    assert left_in(cache) == []
    assert front_end.training
    assert not torch.is_inference_mode_enabled()
    opened(cache).verify()


def test_a_front_end_that_fails_leaves_nothing(cache: Path) -> None:
    class Failing(Frames):
        def forward(self, waveform: Tensor) -> Tensor:
            if len(self.seen) == 2:
                raise RuntimeError("out of memory")
            return super().forward(waveform)

    with pytest.raises(RuntimeError, match="out of memory"):
        opened(cache, Failing())
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: x, r"must make features \(B, T, F\) of waveforms \(B, S\), it made \(32, 95\) of .*\(32, 95\)"),
        (lambda x: x[None], r"it made \(1, 32, 95\)"),
        (lambda x: x[:, None, : len(x)], r"gave \(1, 32\) features, then \(1, 6\)"),
        (nn.Linear(95, 3), "Linear has parameters.*leave the feature cache off"),
        (nn.BatchNorm1d(95, affine=False), "BatchNorm1d has parameters or another state"),
    ],
    ids=["no-frames", "no-batch", "ragged", "parameters", "state"],
)
def test_a_front_end_that_makes_something_else_is_refused(cache: Path, features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(cache, features)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": {"class_path": "mylab.Foreign"}}, r"features of 'mylab\.Foreign' cannot be told from others"),
        (
            {"spec": {**SPEC, "init_args": {"parts": [SPEC, {"class_path": "mylab.Nested"}]}}},
            r"features of 'mylab\.Nested' cannot be told from others",
        ),
        ({"spec": {**SPEC, "init_args": {"window": torch.ones(3)}}}, "plain data.*Tensor"),
        ({"reading": {"duration": np.float32(1.0)}}, "plain data.*float32"),
        ({"count": 0}, "no cycles"),
    ],
    ids=["foreign", "nested foreign", "tensor", "numpy", "empty"],
)
def test_arguments_without_meaning_are_refused(cache: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(cache, **arguments)


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


def _without_shape(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"shape": []}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "meta.json").unlink(), r"meta\.json is missing"),
        (lambda folder: (folder / "index.npy").unlink(), r"index\.npy is missing"),
        (lambda folder: (folder / "features.f16").unlink(), r"features\.f16 is missing"),
        (_cut("features.f16", 2), r"features\.f16 has 269 features instead of 270"),
        (_cut("features.f16", 1), ""),
        (_cut("features.f16", -180), r"features\.f16 has 360 features instead of 270"),
        (_write("features.f16", b""), ""),
        (_cut("index.npy", 2), ""),
        (_flip("index.npy", -1), r"index\.npy does not match its checksum"),
        (_without_shape, r"features\.f16 has 270 features instead of 3"),
        (_write("meta.json", b"{"), ""),
        (_write("meta.json", json.dumps({"format": 99}).encode()), "it has format 99, this version of respiro reads 1"),
    ],
    ids=[
        *("no-meta", "no-index", "no-features", "short", "ragged", "long", "empty", "index-short", "index-changed"),
        *("no-shape", "meta-broken", "other-format"),
    ],
)
def test_a_damaged_store_says_what_to_do(cache: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = opened(cache, count=3).folder
    damage(folder)
    with pytest.raises(
        StoreError, match=rf"the feature cache {folder} cannot be used: {message}.*\. Delete that folder; it is rebuilt"
    ):
        opened(cache, count=3)
    shutil.rmtree(folder)
    opened(cache, count=3).verify()


@pytest.mark.parametrize(("row", "position"), [(0, 0), (2, -1)], ids=["first-byte", "last-byte"])
def test_verify_finds_one_changed_byte(cache: Path, row: int, position: int) -> None:
    folder = opened(cache, count=3).folder
    _flip("features.f16", position)(folder)
    with pytest.raises(StoreError, match=f"cycle {row} does not match its checksum. Delete that folder"):
        FeatureStore(folder).verify()


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = rf"the feature cache cannot be written to {tmp_path}/file/features: .*RESPIRO_CACHE"
    with pytest.raises(StoreError, match=message):
        opened(tmp_path / "file")


def test_a_disk_without_room_is_found_before_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    front_end = Frames()
    with pytest.raises(StoreError, match=r"needs 12,600 bytes, 1,234 are free\. Make room.*RESPIRO_CACHE"):
        opened(cache, front_end)
    assert front_end.seen == [32]  # one batch, to know the shape
    assert left_in(cache) == []


def test_a_file_that_cannot_grow_leaves_nothing(cache: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no file size limits")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=r"needs 12,600 bytes, [\d,]+ are free, and writing failed: .*RESPIRO_CACHE"
        ):
            opened(cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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
