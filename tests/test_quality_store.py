"""The quality cache: content, and what goes wrong with samples and measures."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.errors import StoreError
from respiro.store import QualityStore

READING = {"store": "0123"}
SPEC = {"class_path": "respiro.transforms.Measure", "init_args": {"hop": 0.01, "band": [50, 2000]}}

LeftIn = Callable[[], list[str]]


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


def opened(
    cache: Path,
    measure: Callable[[Tensor], Tensor] | None = None,
    count: int = 70,
    read: Callable[[int], np.ndarray] = samples,
) -> QualityStore:
    measure = Measure() if measure is None else measure
    return QualityStore.open(read, names(count), READING, measure, SPEC, cache_dir=cache, progress=False)


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


def test_a_measure_that_gives_something_else_is_noticed(cache: Path) -> None:
    folder = opened(cache).folder
    with pytest.raises(
        StoreError, match=f"{folder} cannot be used: cycle 0 has .* is measured now.*Delete that folder"
    ):
        opened(cache, Measure(gain=1.1))
    assert opened(cache, Measure(gain=1.0001)).folder == folder  # as another machine would round


@pytest.mark.parametrize(
    ("byte", "why"),
    [(3, r"cycle 0 has .*, but .* is measured now"), (9, "cycle 1 does not match its checksum")],
    ids=["first", "middle"],
)
def test_a_changed_cycle_is_noticed(cache: Path, byte: int, why: str) -> None:
    folder = opened(cache, count=3).folder
    content = bytearray((folder / "measures.f32").read_bytes())
    content[byte] ^= 1
    (folder / "measures.f32").write_bytes(content)
    with pytest.raises(StoreError, match=rf"the quality cache {folder} cannot be used: {why}.*\. Delete that folder"):
        opened(cache, count=3)
    shutil.rmtree(folder)
    opened(cache, count=3).verify()


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("row", [0, 40, 69])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_samples_that_are_not_finite_name_their_cycle_and_leave_nothing(
    cache: Path, left_in: LeftIn, row: int, value: float
) -> None:
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
    assert left_in() == []
    assert torch.get_num_threads() == before
    opened(cache).verify()


@pytest.mark.parametrize("gain", [float("nan"), 1e60], ids=["nan", "beyond-float32"])
def test_measures_that_are_not_finite_name_their_cycle(cache: Path, left_in: LeftIn, gain: float) -> None:
    with pytest.raises(
        StoreError, match=r"^recording 'r0', 0 s to 1 s: the quality measure made of it values that are"
    ):
        opened(cache, Measure(gain))
    assert left_in() == []


@pytest.mark.parametrize("measure", [lambda x: x.mean(1), lambda x: x[0, :2], lambda x: x[:, :3]])
def test_a_measure_of_another_shape_is_refused(cache: Path, left_in: LeftIn, measure: Any) -> None:
    with pytest.raises(ValueError, match=r"one clip must have measures of shape \(1, 2\), got"):
        opened(cache, measure)
    assert left_in() == []
