"""What the feature and the quality cache both do: computed once, kept under what shapes it, looked at when opened."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.errors import StoreError
from respiro.store import FeatureStore, QualityStore

READING = {"store": "0123", "duration": 0.5}
SPEC = {"class_path": "respiro.transforms.Part", "init_args": {"gain": 2.0, "bands": [1, 2]}}

Store = type[FeatureStore | QualityStore]
Opened = Callable[..., FeatureStore | QualityStore]
LeftIn = Callable[[], list[str]]


def clip(row: int) -> np.ndarray:
    return np.full(95, row, dtype="float32")


class Seen:
    """Makes features, or measures, and remembers the rows of the clips it got, call by call; after *calls* it fails."""

    def __init__(self, store: Store, calls: float = math.inf) -> None:
        self.store = store
        self.calls = calls
        self.rows: list[list[int]] = []

    def __call__(self, clips: Tensor) -> Tensor:
        if len(self.rows) >= self.calls:
            raise RuntimeError("out of memory")
        self.rows.append(clips[:, 0].int().tolist())
        return clips.unfold(1, 10, 10) if self.store is FeatureStore else clips[:, :2]


@pytest.fixture(params=[FeatureStore, QualityStore])
def store(request: pytest.FixtureRequest) -> Store:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def opened(store: Store, cache: Path) -> Opened:
    """Open a store of *count* cycles."""

    def opened(count: int = 3, compute: Any = None, reading: Any = READING, spec: Any = SPEC) -> Any:
        names = [f"recording 'r{row}'" for row in range(count)]
        return store.open(clip, names, reading, compute or Seen(store), spec, cache_dir=cache, progress=False)

    return opened


@pytest.mark.parametrize(
    ("reading", "spec"),
    [
        ({**READING, "store": "0124"}, SPEC),
        ({**READING, "duration": 0.6}, SPEC),
        ({**READING, "pad": "zero"}, SPEC),
        (READING, {**SPEC, "class_path": "respiro.transforms.Other"}),
        (READING, {**SPEC, "init_args": {"gain": 2.0, "bands": [2, 1]}}),
        (READING, {**SPEC, "init_args": {"gain": 2.5, "bands": [1, 2]}}),
        (READING, {**SPEC, "init_args": {"gain": 2.0, "bands": None}}),
        (READING, {**SPEC, "init_args": {"gain": 2.0, "bands": [1, 2], "inner": SPEC}}),
    ],
    ids=["waveforms", "duration", "more", "class", "order-of-a-list", "argument", "none", "another-argument"],
)
def test_whatever_shapes_the_content_makes_another_store(
    opened: Opened, left_in: LeftIn, reading: Any, spec: Any
) -> None:
    before = opened()
    after = opened(reading=reading, spec=spec)
    assert sorted(left_in()) == sorted([before.folder.name, after.folder.name])
    assert before.folder != after.folder


def test_the_order_of_arguments_does_not_matter(opened: Opened) -> None:
    spec = {"init_args": {"bands": [1, 2], "gain": 2.0}, "class_path": SPEC["class_path"]}
    assert opened(reading=dict(reversed(READING.items())), spec=spec).folder == opened().folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": {**SPEC, "init_args": {"window": torch.ones(3)}}}, "plain data.*Tensor"),
        ({"reading": {"duration": np.float32(1.0)}}, "plain data.*float32"),
        ({"count": 0}, "there are no cycles to (keep features of|measure)$"),
    ],
    ids=["tensor", "numpy", "empty"],
)
def test_arguments_without_meaning_are_refused(
    opened: Opened, left_in: LeftIn, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(**arguments)
    assert left_in() == []


def test_of_a_finished_store_the_first_and_the_last_cycle_are_computed(store: Store, opened: Opened) -> None:
    folder = opened(70).folder
    compute = Seen(store)
    assert opened(70, compute).folder == folder
    assert compute.rows == ([[0, 69]] if store is FeatureStore else [[0], [69]])


def test_without_room_on_the_disk_no_more_is_computed_than_to_know_so(
    store: Store, opened: Opened, left_in: LeftIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=123))
    compute = Seen(store)
    size = "12,600" if store is FeatureStore else "560"
    with pytest.raises(StoreError, match=rf"needs {size} bytes, 123 are free\. Make room.*RESPIRO_CACHE"):
        opened(70, compute)
    assert compute.rows == ([list(range(32))] if store is FeatureStore else [])  # one batch, to know the shape
    assert left_in() == []


@pytest.mark.parametrize("calls", [0, 2])
def test_a_build_that_fails_leaves_nothing(store: Store, opened: Opened, left_in: LeftIn, calls: int) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        opened(70, Seen(store, calls))
    assert left_in() == []
