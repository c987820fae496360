"""The feature cache: content, the front end while it works, and what goes wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
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

LeftIn = Callable[[], list[str]]


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


def opened(
    cache: Path,
    features: Callable[[Tensor], Tensor] | None = None,
    count: int = 70,
    spec: Any = SPEC,
    wave: Callable[[int], np.ndarray] = waveform,
) -> FeatureStore:
    front_end = Frames() if features is None else features
    return FeatureStore.open(wave, names(count), READING, front_end, spec, cache_dir=cache, progress=False)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_features_are_computed_where_the_front_end_is(cache: Path) -> None:
    class OnGPU(Frames):
        def forward(self, waveform: Tensor) -> Tensor:
            assert waveform.is_cuda
            return super().forward(waveform)

    np.testing.assert_array_equal(opened(cache, OnGPU().cuda())[40], expected(40))


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
    cache: Path, left_in: LeftIn, row: int, value: float, message: str
) -> None:
    front_end = Frames()
    with pytest.raises(StoreError, match=f"^recording 'r{row}': {message}.*leave the feature cache off"):
        opened(cache, front_end, wave=with_value(row, value))
    assert left_in() == []
    assert front_end.training
    assert not torch.is_inference_mode_enabled()
    opened(cache).verify()


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
def test_a_front_end_that_makes_something_else_is_refused(
    cache: Path, left_in: LeftIn, features: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(cache, features)
    assert left_in() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": {"class_path": "mylab.Foreign"}}, r"features of 'mylab\.Foreign' cannot be told from others"),
        (
            {"spec": {**SPEC, "init_args": {"parts": [SPEC, {"class_path": "mylab.Nested"}]}}},
            r"features of 'mylab\.Nested' cannot be told from others",
        ),
    ],
    ids=["foreign", "nested foreign"],
)
def test_a_front_end_whose_arguments_are_not_known_is_refused(cache: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(cache, **arguments)


def test_a_description_without_a_shape_is_refused(cache: Path) -> None:
    folder = opened(cache, count=3).folder
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"shape": []}))
    problem = r"features\.f16 has 270 features instead of 3\. Delete that folder; it is rebuilt"
    with pytest.raises(StoreError, match=f"the feature cache {folder} cannot be used: {problem}"):
        opened(cache, count=3)
    shutil.rmtree(folder)
    opened(cache, count=3).verify()
