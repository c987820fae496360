from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Generator, Tensor

from respiro.component import Transform, build, describe
from respiro.transforms.waveform_augment import WaveformAugment

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PARTS: dict[str, dict[str, Any]] = {
    "gain": {"gain": (-6, 6)},
    "snr": {"snr": (10, 40)},
    "coloured": {"snr": (10, 40), "noise_color": 1.0},
    "shift": {"shift": 0.5},
    "speed": {"speed": (0.8, 1.2)},
    "band": {"band": ((20, 150), (1000, 4000))},
    "device_response": {"device_response": 10},
}
ALL = {name: value for options in PARTS.values() for name, value in options.items()}
EVERY = [*PARTS.items(), ("all", ALL)]
each_part = pytest.mark.parametrize("options", [options for _, options in EVERY], ids=[name for name, _ in EVERY])


def seeded(seed: int = 0, device: str = "cpu") -> Generator:
    return Generator(device).manual_seed(seed)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=seeded(1), dtype=torch.float64) * 0.1).to(dtype)


def response(augment: WaveformAugment, samples: int, clips: int = 1) -> Tensor:
    """Measure what an augmentation multiplies the spectrum of each clip by."""
    clip = noise(clips, samples, dtype=torch.float64)
    ratio = torch.fft.rfft(augment(clip, generator=seeded())) / torch.fft.rfft(clip)
    assert ratio.imag.abs().max() < 1e-6  # no clip is delayed
    return ratio.real


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return str(request.param)


class TestGain:
    @pytest.mark.parametrize("decibels", [-20.0, 0.0, 6.0])
    def test_is_exact_in_decibels(self, decibels: float) -> None:
        clip = noise(2, 100)
        louder = WaveformAugment(gain=(decibels, decibels), p=1.0)(clip)
        torch.testing.assert_close(louder, clip * 10 ** (decibels / 20), rtol=1e-6, atol=0)

    def test_is_uniform_in_decibels_and_of_its_probability(self) -> None:
        augmented = WaveformAugment(gain=(-6, 12), p=0.3)(torch.ones(20000, 1), generator=seeded())
        decibels = 20 * augmented.log10().flatten().double()
        picked = decibels[augmented.flatten() != 1]
        assert len(picked) / 20000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 20000))
        assert kstest(picked, "uniform", args=(-6, 18)).pvalue > 1e-3

    def test_does_not_clip(self) -> None:
        assert WaveformAugment(gain=(20, 20), p=1.0)(torch.ones(1, 4)).tolist() == [[pytest.approx(10.0)] * 4]


class TestNoise:
    @pytest.mark.parametrize("color", [0.0, 1.0, 2.0], ids=["white", "pink", "brown"])
    @pytest.mark.parametrize("samples", [16000, 15999], ids=["even", "odd"])
    def test_has_the_ratio_and_the_colour(self, color: float, samples: int) -> None:
        clip = noise(8, samples) * torch.logspace(-4, 1, 8)[:, None]
        added = WaveformAugment(snr=(12, 12), p=1.0, noise_color=color)(clip, generator=seeded()) - clip
        ratio = 10 * (clip.square().mean(1) / added.square().mean(1)).log10()
        torch.testing.assert_close(ratio, torch.full((8,), 12.0), rtol=0, atol=0.01)
        added = added / added.std(1, keepdim=True)
        power = torch.fft.rfft(added).abs().square().mean(0)[10:]
        slope, _ = np.polyfit(np.log(np.arange(10, 10 + len(power))), power.log(), 1)
        assert -slope == pytest.approx(color, abs=0.05)
        assert torch.corrcoef(added).fill_diagonal_(0).abs().max() < (0.05 if color == 0 else 0.9)  # each has its own

    def test_ratio_is_uniform(self) -> None:
        clip = noise(2000, 64)
        added = WaveformAugment(snr=(5, 25), p=1.0)(clip, generator=seeded()) - clip
        ratio = 10 * (clip.square().mean(1) / added.square().mean(1)).log10()
        assert kstest(ratio.double(), "uniform", args=(5, 20)).pvalue > 1e-3

    def test_silence_gets_none(self) -> None:
        assert torch.equal(WaveformAugment(snr=(0, 10), p=1.0)(torch.zeros(2, 100)), torch.zeros(2, 100))


class TestShift:
    def test_rolls_by_up_to_the_seconds(self) -> None:
        samples, most = 50, 20
        clip = torch.arange(float(samples)).expand(4000, -1)
        shifted = WaveformAugment(1000, shift=most / 1000, p=1.0)(clip, generator=seeded())
        by = (samples - shifted[:, 0].long() + samples // 2) % samples - samples // 2
        for row in range(0, 4000, 100):
            assert torch.equal(shifted[row], torch.roll(clip[row], int(by[row])))
        counts = torch.bincount(by + most).double()
        assert len(counts) == 2 * most + 1
        assert counts[1:-1].std() < 4 * math.sqrt(4000 / (2 * most))  # the two ends have half the probability
        assert by.double().mean().abs() < 1


class TestSpeed:
    @pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
    def test_changes_the_frequency_of_a_sine(self, factor: float) -> None:
        seconds = torch.arange(16000, dtype=torch.float64) / 16000
        sine = torch.sin(2 * math.pi * 100 * seconds)[None].float()
        faster = WaveformAugment(speed=(factor, factor), p=1.0)(sine)
        assert torch.fft.rfft(faster)[0].abs().argmax() == round(100 * factor)  # one bin per Hz
        expected = torch.sin(2 * math.pi * 100 * factor * seconds).float()
        torch.testing.assert_close(faster[0], expected, rtol=0, atol=5e-4 if factor != 1 else 1e-6)

    @pytest.mark.parametrize("factor", [0.9375, 1.125, 3.0], ids=["slower", "faster", "three-times"])
    def test_reads_on_circularly_to_the_end_of_a_long_clip(self, factor: float) -> None:
        clip = noise(1, 128000)
        expected = np.interp(np.arange(128000) * factor, np.arange(128000), clip[0].double(), period=128000)
        np.testing.assert_allclose(WaveformAugment(speed=(factor, factor), p=1.0)(clip)[0], expected, rtol=0, atol=1e-6)

    def test_factor_is_uniform(self) -> None:
        ramp = torch.arange(100.0).expand(2000, -1)
        factor = WaveformAugment(speed=(0.7, 1.3), p=1.0)(ramp, generator=seeded())[:, 50] / 50
        assert kstest(factor.double(), "uniform", args=(0.7, 0.6)).pvalue > 1e-3


class TestBand:
    def test_passes_the_band_and_falls_along_a_raised_cosine(self) -> None:
        measured = response(WaveformAugment(band=((100, 100), (1000, 1000)), p=1.0), 16000)[0]
        for hertz in range(8001):
            octaves = max(math.log2(100 / hertz), math.log2(hertz / 1000), 0.0) if hertz else math.inf
            expected = (1 + math.cos(math.pi * octaves / 0.5)) / 2 if octaves < 0.5 else 0.0
            assert measured[hertz].item() == pytest.approx(expected, abs=1e-4)

    def test_edges_at_the_ends_cut_nothing(self) -> None:
        clip = noise(2, 999) + 0.5
        passed = WaveformAugment(4000, band=((0, 0), (2000, 2000)), p=1.0)(clip)
        torch.testing.assert_close(passed, clip, rtol=0, atol=1e-6)

    def test_edges_are_uniform(self) -> None:
        passed = response(WaveformAugment(band=((500, 1500), (3000, 6000)), p=1.0), 8000, clips=400) > 1 - 1e-6
        low, high = 2 * passed.int().argmax(1), 16000 // 2 - 2 * passed.flip(1).int().argmax(1)
        assert kstest(low.double(), "uniform", args=(500, 1000)).pvalue > 1e-3
        assert kstest(high.double(), "uniform", args=(3000, 3000)).pvalue > 1e-3


class TestDeviceResponse:
    @pytest.mark.parametrize("knots", [2, 8, 15])
    def test_joins_its_knots_by_half_cosines(self, knots: int) -> None:
        augment = WaveformAugment(device_response=12, p=1.0, response_knots=knots)
        decibels = 20 * response(augment, 32000)[0].log10()  # two bins per Hz
        assert decibels.abs().max() <= 12
        frequencies = [8000 * 2 ** (7 * knot / (knots - 1) - 7) for knot in range(knots)]
        levels = [decibels[round(2 * hertz)].item() for hertz in frequencies]
        assert max(levels) - min(levels) > 0.1
        for hertz in [70.0, 100.0, 250.0, 1234.5, 4000.0, 7999.0]:
            right = next(knot for knot in range(knots) if frequencies[knot] >= hertz)
            way = math.log2(hertz / frequencies[right - 1]) * (knots - 1) / 7
            weight = (1 - math.cos(math.pi * way)) / 2
            expected = (1 - weight) * levels[right - 1] + weight * levels[right]
            assert decibels[round(2 * hertz)].item() == pytest.approx(expected, abs=0.03)
        torch.testing.assert_close(decibels[:125], decibels[125].expand(125), rtol=0, atol=1e-3)  # below 62.5 Hz

    def test_levels_are_uniform_and_of_their_probability(self) -> None:
        decibels = 20 * response(WaveformAugment(device_response=6, p=0.5), 16, clips=4000)[:, -1].log10()
        picked = decibels[decibels.abs() > 1e-9]
        assert len(picked) / 4000 == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))
        assert kstest(picked, "uniform", args=(-6, 12)).pvalue > 1e-3

    def test_multiplies_with_the_band(self) -> None:
        band = {"band": ((100, 100), (1000, 1000)), "p": 1.0}
        alone, limit = WaveformAugment(device_response=6, p=1.0), WaveformAugment(**band)
        both = WaveformAugment(device_response=6, **band)
        expected = response(alone, 16000) * response(limit, 16000)  # the device response is drawn first
        torch.testing.assert_close(response(both, 16000), expected, rtol=0, atol=1e-6)


@each_part
class TestEveryPart:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_shape_type_and_device(self, device: str, options: Any, dtype: torch.dtype) -> None:
        clip = noise(4, 4001, dtype=dtype).to(device)
        augmented = WaveformAugment(**options, p=1.0)(clip, generator=seeded(device=device))
        assert (augmented.shape, augmented.dtype, augmented.device) == (clip.shape, dtype, clip.device)
        assert augmented.isfinite().all()
        assert not torch.equal(augmented, clip)

    def test_leaves_what_it_is_not_applied_to_bit_by_bit(self, options: Any) -> None:
        clip = noise(4, 4001)
        assert torch.equal(WaveformAugment(**options, p=0.0)(clip), clip)

    def test_is_applied_to_each_sample_with_its_probability(self, options: Any) -> None:
        clip = noise(400, 4001)
        unchanged = (WaveformAugment(**options, p=0.4)(clip, generator=seeded()) == clip).all(1).float().mean().item()
        expected = 0.6 ** len(options.keys() - {"noise_color"})  # every part has its own draw
        assert unchanged == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 400))

    def test_eval_returns_the_input(self, options: Any) -> None:
        clip = noise(2, 100)
        assert WaveformAugment(**options, p=1.0).eval()(clip) is clip

    def test_never_changes_its_input(self, options: Any) -> None:
        clip = noise(4, 4000)
        WaveformAugment(**options, p=1.0)(clip)
        assert torch.equal(clip, noise(4, 4000))

    def test_every_sample_has_its_own(self, options: Any) -> None:
        augmented = WaveformAugment(**options, p=1.0)(noise(1, 4000).expand(6, -1), generator=seeded())
        assert len(augmented.unique(dim=0)) == 6

    def test_the_same_seed_gives_the_same(self, device: str, options: Any) -> None:
        augment, clip = WaveformAugment(**options, p=1.0), noise(4, 4000).to(device)
        first, again, other = (augment(clip, generator=seeded(seed, device)) for seed in (7, 7, 8))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_without_a_generator_it_draws_from_torch(self, options: Any) -> None:
        first, again = [(torch.manual_seed(3), WaveformAugment(**options)(noise(4, 500)))[1] for _ in range(2)]
        assert torch.equal(first, again)

    @pytest.mark.parametrize("samples", [1, 2, 4001])
    def test_silence_stays_silent(self, options: Any, samples: int) -> None:
        silence = torch.zeros(3, samples)
        assert torch.equal(WaveformAugment(**options, p=1.0)(silence), silence)

    def test_computes_in_float32_under_autocast(self, options: Any) -> None:
        augment, clip = WaveformAugment(**options, p=1.0), noise(3, 1000)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = augment(clip, generator=seeded())
        assert torch.equal(under_autocast, augment(clip, generator=seeded()))

    @pytest.mark.usefixtures("bfloat16_by_default")
    def test_draws_are_as_fine_when_bfloat16_is_the_default(self, options: Any) -> None:
        augment = WaveformAugment(**options, p=1.0)
        found = augment(noise(3, 1000), generator=seeded())
        torch.set_default_dtype(torch.float32)
        assert torch.equal(found, augment(noise(3, 1000), generator=seeded()))

    def test_gradient_reaches_the_waveform_even_in_silence(self, options: Any) -> None:
        clip = torch.cat([noise(2, 500), torch.zeros(1, 500)]).requires_grad_()
        WaveformAugment(**options, p=1.0)(clip).square().sum().backward()
        assert clip.grad is not None
        assert clip.grad.isfinite().all()

    def test_asks_the_device_for_no_value(self, options: Any) -> None:
        clip = torch.empty(3, 500, device="meta")  # has none to give
        assert WaveformAugment(**options)(clip).shape == (3, 500)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_never_waits_for_the_gpu(self, options: Any) -> None:
        clip = noise(3, 4000).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            augmented = WaveformAugment(**options)(clip, generator=seeded(device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert augmented.isfinite().all()

    def test_comes_back_from_its_description(self, options: Any) -> None:
        augment = WaveformAugment(**options)
        description = describe(augment)  # holds lists where there were tuples
        again = build(description, Transform, "augment")
        assert describe(again) == description
        assert torch.equal(again(noise(4, 500), generator=seeded()), augment(noise(4, 500), generator=seeded()))


def test_all_parts_off_changes_nothing() -> None:
    assert torch.equal(WaveformAugment()(noise(2, 100)), noise(2, 100))


@pytest.mark.parametrize("part", ["gain", "shift", "speed", "band", "device_response"])
def test_gradient_is_right(part: str) -> None:
    augment = WaveformAugment(**PARTS[part], p=1.0)
    clip = noise(2, 40, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda clip: augment(clip, generator=seeded()), (clip,), fast_mode=True)


@pytest.mark.parametrize("shape", [(100,), (1, 1, 100)], ids=["1d", "3d"])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"waveform must be floating point of shape \(B, S\)"):
        WaveformAugment(gain=(0, 1))(noise(*shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be positive, got 0"),
        ({"gain": (6, -6)}, r"gain must be a range \(low, high\) of dB with low <= high, got \(6, -6\)"),
        ({"gain": 6}, r"gain must be a range \(low, high\) of dB with low <= high, got 6"),
        ({"snr": [10, math.inf]}, r"snr must be a range \(low, high\) of dB with low <= high, got \[10, inf\]"),
        ({"snr": (math.nan, 10)}, r"snr must be a range .*, got \(nan, 10\)"),
        ({"speed": (0, 1)}, "speed must be positive, got 0"),
        ({"shift": -1}, "shift must be a finite number of at least 0, got -1"),
        ({"device_response": math.inf}, "device_response must be a finite number of at least 0, got inf"),
        ({"noise_color": -1.0}, "noise_color must be a finite number of at least 0, got -1.0"),
        ({"response_knots": 1}, "response_knots must be at least 2, got 1"),
        ({"p": 1.1}, r"p must lie in \[0, 1\], got 1.1"),
        ({"band": ((20, 150), (1000, 9000))}, "high_max <= 8000, half of the sampling rate; got .*9000"),
        ({"band": ((20, 1500), (1000, 4000))}, "low_max < high_min"),
        ({"band": ((-1, 150), (1000, 4000))}, "0 <= low_min"),
        ({"band": (100, 1000)}, r"band must be \(\(low_min, low_max\), .*got \(100, 1000\)"),
    ],
    ids=str,
)
def test_refuses_arguments_without_a_meaning(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveformAugment(**options)
