from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from respiro.component import Transform, build, describe
from respiro.errors import CheckpointError
from respiro.transforms import KaldiFbank, LogMelSpectrogram, PatchMix
from respiro.transforms.gammatone import GammatoneSpectrogram
from respiro.transforms.stacked import StackedFeatures

GAMMATONE = GammatoneSpectrogram(num_bands=24)
MEL = LogMelSpectrogram(8000, 512, 208, 16, normalize="clip_minmax")  # as many frames
COARSE = LogMelSpectrogram(8000, 1024, 512, 8)


class Ramp(nn.Module):
    """A front end of somebody else: frames of one bin that count up."""

    num_features = 1

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, waveform: Tensor) -> Tensor:
        return torch.arange(float(self.frames))[None, :, None].expand(len(waveform), -1, -1)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.1


def test_features_stand_side_by_side_in_their_order() -> None:
    waveform = noise(3, 9000)
    stacked = StackedFeatures([MEL, GAMMATONE])
    assert (stacked.bins, stacked.num_features, stacked.sample_rate) == ([16, 24], 40, 8000)
    mel, gammatone = stacked(waveform).split(stacked.bins, dim=2)
    assert torch.equal(mel, MEL(waveform))
    assert torch.equal(gammatone, GAMMATONE(waveform))


def test_one_front_end_is_left_as_it_is() -> None:
    assert torch.equal(StackedFeatures([GAMMATONE])(noise(2, 9000)), GAMMATONE(noise(2, 9000)))


def test_frames_that_fit_are_left_as_they_are() -> None:
    waveform = noise(2, 9000)
    assert torch.equal(
        StackedFeatures([GAMMATONE, MEL], frames=44)(waveform), StackedFeatures([GAMMATONE, MEL])(waveform)
    )


@pytest.mark.parametrize(("present", "frames"), [(12, 4), (10, 4), (7, 6), (5, 1)])
def test_more_frames_are_averaged(present: int, frames: int) -> None:
    """Each over the frames that its share of the clip touches."""
    values = np.arange(present)
    windows = [(i * present // frames, -(-(i + 1) * present // frames)) for i in range(frames)]
    expected = [values[first:last].mean() for first, last in windows]
    out = StackedFeatures([Ramp(present)], frames=frames)(noise(2, 100))  # type: ignore[list-item]
    assert out.shape == (2, frames, 1)
    np.testing.assert_allclose(out[1, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("present", "frames"), [(4, 12), (4, 5), (1, 3)])
def test_fewer_frames_are_interpolated(present: int, frames: int) -> None:
    """Linearly between the middles of the frames, and constant beyond the first and the last one."""
    middles = (np.arange(frames) + 0.5) * present / frames - 0.5
    expected = np.interp(middles, np.arange(present), np.arange(present))
    out = StackedFeatures([Ramp(present)], frames=frames)(noise(2, 100))  # type: ignore[list-item]
    np.testing.assert_allclose(out[1, :, 0], expected, atol=1e-6)


def test_front_ends_are_brought_to_the_frames() -> None:
    waveform = noise(2, 9000)
    out = StackedFeatures([GAMMATONE, COARSE, KaldiFbank(8000, 10)], frames=44)(waveform)
    assert out.shape == (2, 44, 24 + 8 + 10)
    coarse, kaldi = (StackedFeatures([part], frames=44)(waveform) for part in (COARSE, KaldiFbank(8000, 10)))
    assert torch.equal(out, torch.cat([GAMMATONE(waveform), coarse, kaldi], dim=2))


def test_different_frames_are_refused() -> None:
    message = r"LogMelSpectrogram 18, GammatoneSpectrogram 44; .* pass frames=\.\.\. to bring them to one number"
    with pytest.raises(ValueError, match=message):
        StackedFeatures([COARSE, GAMMATONE])(noise(2, 9000))


def test_a_foreign_module_can_be_a_part() -> None:
    stacked = StackedFeatures([GAMMATONE, Ramp(44)])  # type: ignore[list-item]
    assert stacked.sample_rate == 8000
    out = stacked(noise(2, 9000))
    assert torch.equal(out[0, :, 24], torch.arange(44.0))


def test_without_a_sample_rate_there_is_none() -> None:
    assert not hasattr(StackedFeatures([Ramp(3)]), "sample_rate")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StackedFeatures([]), ValueError, r"features must hold one front end at least, got \[\]"),
        (lambda: StackedFeatures([GAMMATONE], frames=0), ValueError, "frames must be positive, got 0"),
        (
            lambda: StackedFeatures([GAMMATONE, KaldiFbank()]),
            ValueError,
            "same sample_rate, got GammatoneSpectrogram 8000, KaldiFbank 16000",
        ),
        (lambda: StackedFeatures([GAMMATONE, PatchMix()]), TypeError, "PatchMix has no num_features"),
        (lambda: StackedFeatures([nn.Identity()]), TypeError, "Identity has no num_features"),  # type: ignore[list-item]
    ],
    ids=["none", "frames", "rates", "mixing", "foreign"],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("wrong", [lambda x: x.expand(-1, -1, 2), lambda x: x[..., 0]], ids=["bins", "2d"])
def test_a_part_that_gives_something_else_is_named(wrong: Callable[[Tensor], Tensor]) -> None:
    class Liar(Ramp):
        def forward(self, waveform: Tensor) -> Tensor:
            return wrong(super().forward(waveform))

    with pytest.raises(ValueError, match=r"Liar must give features of shape \(B, T, 1\), as its num_features says"):
        StackedFeatures([Liar(44), GAMMATONE])(noise(2, 9000))  # type: ignore[list-item]


@pytest.mark.parametrize("frames", [None, 30])
def test_describe_build_round_trip(frames: int | None) -> None:
    stacked = StackedFeatures([GAMMATONE, StackedFeatures([MEL], frames=44)], frames)
    spec = json.loads(json.dumps(describe(stacked)))
    assert spec["init_args"]["features"][0] == describe(GAMMATONE)
    again = build(spec, Transform, "features")
    assert isinstance(again, StackedFeatures)
    assert describe(again) == spec
    assert torch.equal(again(noise(2, 9000)), stacked(noise(2, 9000)))
    assert torch.equal(copy.deepcopy(stacked)(noise(2, 9000)), stacked(noise(2, 9000)))


def test_a_foreign_part_is_described_by_its_name_and_asked_for() -> None:
    spec = describe(StackedFeatures([GAMMATONE, Ramp(44)]))  # type: ignore[list-item]
    assert spec["init_args"]["features"][1].keys() == {"class_path"}
    with pytest.raises(CheckpointError, match=r"Ramp', which respiro did not write.*features=\.\.\."):
        build(json.loads(json.dumps(spec)), Transform, "features")


def test_computes_in_float32_under_autocast() -> None:
    stacked = StackedFeatures([GAMMATONE, COARSE], frames=30)
    with torch.autocast("cpu", torch.bfloat16):
        out = stacked(noise(2, 9000))
    torch.testing.assert_close(out, stacked(noise(2, 9000)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gives_the_type_it_gets(dtype: torch.dtype) -> None:
    out = StackedFeatures([GAMMATONE, COARSE], frames=30)(noise(2, 9000).to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_input_is_not_changed() -> None:
    waveform = noise(2, 9000)
    StackedFeatures([GAMMATONE, COARSE], frames=30)(waveform)
    assert torch.equal(waveform, noise(2, 9000))


def test_a_batch_equals_its_clips() -> None:
    stacked, waveform = StackedFeatures([GAMMATONE, COARSE], frames=30), noise(5, 9000)
    each = torch.cat([stacked(clip[None]) for clip in waveform])
    torch.testing.assert_close(stacked(waveform), each, rtol=0, atol=1e-4)


def test_gradient_is_right() -> None:
    gammatone = GammatoneSpectrogram(4000, 3, f_max=1500.0, n_fft=32, hop_length=8)
    mel = LogMelSpectrogram(4000, n_fft=32, hop_length=16, n_mels=2, normalize="none")
    waveform = (noise(2, 50, dtype=torch.float64) * 10).requires_grad_()
    assert torch.autograd.gradcheck(StackedFeatures([gammatone, mel], frames=5), (waveform,), atol=1e-4)


def test_exports_with_any_batch_size() -> None:
    stacked, batch = StackedFeatures([GAMMATONE, COARSE], frames=30), torch.export.Dim("batch")
    exported = torch.export.export(stacked, (noise(2, 9000),), dynamic_shapes={"waveform": {0: batch}}).module()
    torch.testing.assert_close(exported(noise(5, 9000)), stacked(noise(5, 9000)), rtol=0, atol=1e-4)
