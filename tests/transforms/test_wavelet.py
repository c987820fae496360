from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from respiro.component import Transform, build, describe
from respiro.transforms import wavelet
from respiro.transforms.wavelet import MorletScalogram

RATE = 8000
PYWT_WAVELET = "cmor2.0-0.954929658551"  # exp(-t ** 2 / 2) exp(6 i t) / sqrt(2 pi)
SMALL = MorletScalogram(num_scales=6, f_min=100.0, f_max=1500.0)
BOUND = 1e-3  # of the peak of a clip: how far the mean over a frame may be from that over all its samples


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * uniform - 1).to(dtype)


def seconds(samples: int) -> Tensor:
    return torch.arange(samples, dtype=torch.float64) / RATE


def tone(frequency: float, samples: int, amplitude: float = 1.0) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency * seconds(samples))


def chirp(samples: int) -> Tensor:
    t = seconds(samples)
    return torch.sin(2 * math.pi * (50 * t + 1950 / 2 * t.square() / t[-1]))


def impulses(samples: int) -> Tensor:
    clip = torch.zeros(samples, dtype=torch.float64)
    clip[[0, samples // 3, samples // 2 + 17, -1]] = 1
    return clip


def breath(samples: int) -> Tensor:
    """Low-passed noise that swells and fades, short crackles, and a wheeze of three harmonics."""
    t = seconds(samples)
    spectrum = torch.fft.rfft(noise(samples, seed=3, dtype=torch.float64))
    hiss = torch.fft.irfft(spectrum / (1 + torch.fft.rfftfreq(samples, 1 / RATE) / 150), n=samples)
    crackles = torch.zeros_like(t)
    for start in torch.linspace(0.05, 0.9, 12, dtype=torch.float64) * t[-1]:
        crackles += (-(t - start).abs() / 4e-3).exp() * torch.sin(2 * math.pi * 350 * (t - start))
    phase = 2 * math.pi * (300 * t + 3 * torch.sin(2 * math.pi * 5 * t))
    wheeze = sum(torch.sin(k * phase) / k for k in (1, 2, 3))
    clip = 3 * hiss * (1.1 - torch.cos(math.pi * t)) + 0.5 * crackles + 0.2 * wheeze
    return clip / clip.abs().max()


SIGNALS: dict[str, Callable[[int], Tensor]] = {
    "noise": lambda samples: noise(samples, seed=1, dtype=torch.float64),
    "chirp": chirp,
    "impulses": impulses,
    "breath": breath,
    "low-tone": lambda samples: tone(100, samples),
    "beats": lambda samples: 0.5 * tone(1000, samples) + 0.5 * tone(1060, samples),
    "step": lambda samples: torch.ones(samples, dtype=torch.float64),
}


def mean_of_frames(features: MorletScalogram, waveform: Tensor) -> Tensor:
    """Average the amplitude at every sample over each frame, in a loop; the frame after the clip is one sample long."""
    hop, samples = features.hop_length, waveform.shape[1]
    amplitude = features.amplitude(pad(waveform, (0, 1)))
    frames = []
    for frame in range(1 + samples // hop):
        start = frame * hop - hop // 2
        stop = min(start + hop, max(samples, start + 1)) if hop == 1 else min(start + hop, samples)
        frames.append(amplitude[:, max(start, 0) : stop].mean(1))
    return torch.stack(frames, dim=1)


def standardised_log(amplitude: Tensor) -> Tensor:
    log = amplitude.clamp(min=1e-5).log()
    return (log - log.mean((1, 2), keepdim=True)) / log.std((1, 2), correction=0, keepdim=True)


def convolved(clip: Tensor, centre: float, rate: int, w0: float) -> list[float]:
    """Amplitude by the definition in the time domain, one sample after the other."""
    scale = w0 / (2 * math.pi) * rate / centre
    result = []
    for n in range(len(clip)):
        total = 0j
        for m, value in enumerate(clip.tolist()):
            u = (n - m) / scale
            total += value * cmath.exp(-u * u / 2 + 1j * w0 * u) / math.sqrt(2 * math.pi)
        result.append(2 * abs(total) / scale)
    return result


class TestAmplitude:
    def test_gives_the_reference(self, golden: Path) -> None:
        expected = np.load(golden / "transforms" / "cwt_8000.npz")
        features = MorletScalogram(int(expected["sample_rate"]), len(expected["frequency"]), 60.0, 2000.0)
        np.testing.assert_allclose(features.centres, expected["frequency"], rtol=1e-12)
        amplitude = features.amplitude(torch.from_numpy(expected["wave"])[None])[0, :: int(expected["step"])].T
        np.testing.assert_allclose(amplitude, expected["amplitude"], rtol=0, atol=1e-4)
        # PyWavelets integrates its wavelet over each sample, which attenuates high frequencies by sinc(f / rate).
        pywt = 2 * expected["pywt_abs"] / np.sqrt(expected["scale"])[:, None]
        self.check_pywt(np.asarray(amplitude), pywt, expected["frequency"])

    def test_agrees_with_pywavelets(self) -> None:
        pywt = pytest.importorskip("pywt")
        features = MorletScalogram(num_scales=20)
        drawn = (50 * 40 ** noise(6, seed=5, dtype=torch.float64).abs()).tolist()
        waveform = torch.stack([tone(frequency, 3001, 1 / 6) for frequency in drawn]).sum(0, keepdim=True)
        scales = [features.w0 / (2 * math.pi) * RATE / centre for centre in features.centres]
        found, _ = pywt.cwt(waveform[0].numpy(), scales, PYWT_WAVELET, precision=14, method="fft")
        expected = 2 * np.abs(found) / np.sqrt(scales)[:, None]
        self.check_pywt(features.amplitude(waveform)[0].T.numpy(), expected, np.array(features.centres))

    def check_pywt(self, amplitude: np.ndarray, pywt: np.ndarray, centres: np.ndarray) -> None:
        np.testing.assert_allclose(pywt[centres <= 600], amplitude[centres <= 600], rtol=0, atol=0.005)
        np.testing.assert_allclose(pywt, amplitude, rtol=0, atol=0.04)
        np.testing.assert_allclose(pywt / np.sinc(centres / RATE)[:, None], amplitude, rtol=0, atol=0.02)

    @pytest.mark.parametrize(
        ("rate", "centre", "w0", "samples"),
        [(8000, 300.0, 6.0, 120), (8000, 1900.0, 6.0, 61), (44100, 900.0, 8.0, 150), (4000, 90.0, 5.5, 1)],
        ids=["low", "high-odd", "44.1kHz", "one-sample"],
    )
    def test_is_the_convolution_with_the_wavelet(self, rate: int, centre: float, w0: float, samples: int) -> None:
        features = MorletScalogram(rate, 1, centre, centre, w0)
        waveform = noise(1, samples, seed=2, dtype=torch.float64)
        expected = convolved(waveform[0], centre, rate, w0)
        np.testing.assert_allclose(features.amplitude(waveform)[0, :, 0], expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("rate", "amplitude"), [(8000, 0.3), (16000, 1.0)])
    def test_of_a_tone_is_its_amplitude(self, rate: int, amplitude: float, dtype: torch.dtype) -> None:
        features = MorletScalogram(rate, 9)
        for index, centre in enumerate(features.centres):
            wave = amplitude * torch.cos(2 * math.pi * centre * torch.arange(rate, dtype=torch.float64) / rate + 1)
            inside = features.amplitude(wave.to(dtype)[None])[0, rate // 4 : -rate // 4, index]
            torch.testing.assert_close(inside, torch.full_like(inside, amplitude), rtol=2e-6, atol=0)

    def test_of_a_tone_at_half_the_sampling_rate(self) -> None:
        features = MorletScalogram(RATE, 1, RATE / 2, RATE / 2)
        wave = 0.7 * (-1.0) ** torch.arange(4000, dtype=torch.float64)
        assert features.amplitude(wave[None])[0, 2000, 0].item() == pytest.approx(0.7, abs=1e-3)

    def test_does_not_wrap_round(self) -> None:
        clip = torch.zeros(1, 4000, dtype=torch.float64)
        clip[0, -1] = 1.0
        amplitude = MorletScalogram(num_scales=9).amplitude(clip)[0]
        assert amplitude[:1000].max() < 1e-7
        assert amplitude[-1].min() > 1e-3

    def test_is_that_of_a_longer_clip(self) -> None:
        clip = noise(1, 1003, dtype=torch.float64)
        longer = SMALL.amplitude(pad(clip, (700, 4001)))[:, 700:1703]
        torch.testing.assert_close(SMALL.amplitude(clip), longer, rtol=0, atol=2e-6)

    def test_of_silence_is_zero(self) -> None:
        torch.testing.assert_close(SMALL.amplitude(torch.zeros(1, 500)), torch.zeros(1, 500, 6), rtol=0, atol=1e-18)


class TestMeanOfFrames:
    @pytest.mark.parametrize("hop", [208, 64, 333, 7], ids=lambda hop: f"hop-{hop}")
    @pytest.mark.parametrize("signal", SIGNALS)
    def test_is_within_the_bound(self, signal: str, hop: int) -> None:
        features = MorletScalogram(num_scales=31, hop_length=hop, normalize="none")
        for samples in (4001, 8320):  # the last frame is whole, or cut somewhere
            waveform = SIGNALS[signal](samples)[None]
            exact = mean_of_frames(features, waveform)
            found = features(waveform)
            deviation = (found.exp() - exact.clamp(min=1e-5)).abs().max()
            assert deviation < BOUND * waveform.abs().max()
            standardised = MorletScalogram(num_scales=31, hop_length=hop)(waveform)
            deviation = (standardised - standardised_log(exact)).abs()
            assert deviation.max() < 0.05
            assert deviation.mean() < 5e-4

    @pytest.mark.parametrize("rate", [4000, 16000, 44100])
    @pytest.mark.parametrize("w0", [5.0, 12.0])
    def test_is_within_the_bound_at_other_settings(self, rate: int, w0: float) -> None:
        features = MorletScalogram(rate, 20, 60.0, rate / 4, w0, hop_length=rate // 40, normalize="none")
        waveform = noise(2, rate // 2 + 3, seed=4, dtype=torch.float64)
        exact = mean_of_frames(features, waveform).clamp(min=1e-5)
        torch.testing.assert_close(features(waveform).exp(), exact, rtol=0, atol=BOUND)

    @pytest.mark.parametrize(
        ("hop", "samples"), [(1, 300), (1, 1), (208, 1), (208, 150), (333, 332)], ids=lambda value: str(value)
    )
    def test_is_exact_at_a_hop_of_one_and_in_short_clips(self, hop: int, samples: int) -> None:
        features = MorletScalogram(num_scales=9, hop_length=hop, normalize="none")
        waveform = noise(2, samples, dtype=torch.float64)
        exact = mean_of_frames(features, waveform).clamp(min=1e-5)
        assert exact.shape == (2, 1 + samples // hop, 9)
        torch.testing.assert_close(features(waveform).exp(), exact, rtol=0, atol=2e-6)

    def test_takes_fewer_points_than_samples(self) -> None:
        scales = [6 / (2 * math.pi) * RATE / centre for centre in MorletScalogram().centres]
        points = [wavelet._points(scale, 208) for scale in scales]
        assert points == sorted(points)
        assert sum(points) < 0.45 * 208 * len(points)
        assert all(wavelet._points(scale, 1) == 1 for scale in scales)

    def test_padding_has_small_prime_factors(self) -> None:
        smooth = sorted(2**i * 3**j * 5**k for i in range(12) for j in range(8) for k in range(6))
        for least in range(1, 2000):
            assert wavelet._smooth(least) == next(number for number in smooth if number >= least)


class TestModule:
    def test_centres_are_log_spaced_with_both_ends(self) -> None:
        features = MorletScalogram()
        assert len(features.centres) == features.num_features == 124
        assert (features.centres[0], features.centres[-1]) == (50.0, 2000.0)
        ratios = np.divide(features.centres[1:], features.centres[:-1])
        np.testing.assert_allclose(ratios, 40 ** (1 / 123), rtol=1e-12)
        assert MorletScalogram(num_scales=1, f_min=80.0).centres == (80.0,)

    @pytest.mark.parametrize(("samples", "frames"), [(32000, 154), (122880, 591), (207, 1), (208, 2), (1, 1)])
    def test_shape(self, samples: int, frames: int) -> None:
        features = MorletScalogram(num_scales=3)
        assert features(noise(2, samples)).shape == (2, frames, 3)
        assert features.amplitude(noise(2, 210)).shape == (2, 210, 3)
        assert (features.sample_rate, features.hop_length) == (8000, 208)

    def test_standardises_each_clip_by_itself(self) -> None:
        waveform = noise(2, 4000, dtype=torch.float64) * torch.tensor([[1.0], [0.1]], dtype=torch.float64)
        log = MorletScalogram(num_scales=9, normalize="none")(waveform)
        expected = [(clip - clip.mean()) / clip.std() for clip in log.numpy()]
        np.testing.assert_allclose(MorletScalogram(num_scales=9)(waveform), np.stack(expected), rtol=0, atol=1e-9)

    def test_logarithm_is_floored(self) -> None:
        features = MorletScalogram(num_scales=3, normalize="none")
        assert features(torch.zeros(1, 500)).unique().item() == pytest.approx(math.log(1e-5), abs=1e-5)

    def test_silence_gives_zeros_and_a_finite_gradient(self) -> None:
        waveform = torch.cat([torch.zeros(1, 2000), noise(1, 2000)]).requires_grad_()
        features = SMALL(waveform)
        assert torch.equal(features[0], torch.zeros_like(features[0]))
        features.square().sum().backward()
        assert waveform.grad is not None
        assert waveform.grad.isfinite().all()
        assert torch.equal(waveform.grad[0], torch.zeros(2000))
        silence = torch.zeros(1, 300, requires_grad=True)
        SMALL.amplitude(silence).sum().backward()
        assert silence.grad is not None
        assert silence.grad.isfinite().all()

    @pytest.mark.parametrize("hop", [16, 25, 1])
    def test_gradient_is_right(self, hop: int) -> None:
        features = MorletScalogram(num_scales=4, f_min=200.0, f_max=1500.0, hop_length=hop)
        waveform = noise(2, 40, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(features, (waveform,), fast_mode=True)
        assert torch.autograd.gradcheck(features.amplitude, (waveform,), fast_mode=True)

    @pytest.mark.parametrize("samples", [1, 150, 9001])
    def test_a_batch_equals_its_clips(self, samples: int) -> None:
        waveform = noise(23, samples)
        each = torch.cat([SMALL(clip[None]) for clip in waveform])
        torch.testing.assert_close(SMALL(waveform), each, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("chunk", [1, 5000, 1 << 30], ids=["scale-by-scale", "some", "all"])
    def test_chunks_do_not_change_the_values(self, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
        features, waveform = MorletScalogram(num_scales=30, normalize="none"), noise(3, 5000, dtype=torch.float64)
        expected = features(waveform).exp(), features.amplitude(waveform)
        monkeypatch.setattr(wavelet, "_CPU_CHUNK", chunk)
        torch.testing.assert_close(
            (features(waveform).exp(), features.amplitude(waveform)), expected, rtol=0, atol=2e-6
        )

    def test_threads_and_gradients_do_not_change_the_values(self) -> None:
        waveform, before = noise(23, 9000), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            serial = SMALL(waveform)
            torch.set_num_threads(3)
            torch.testing.assert_close(SMALL(waveform), serial, rtol=0, atol=1e-4)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(SMALL(waveform.requires_grad_()), serial, rtol=0, atol=1e-4)

    def test_computes_in_float32_under_autocast(self) -> None:
        waveform = noise(2, 3000)
        with torch.autocast("cpu", torch.bfloat16):
            found = SMALL(waveform), SMALL.amplitude(waveform)
        assert torch.equal(found[0], SMALL(waveform))
        assert torch.equal(found[1], SMALL.amplitude(waveform))

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 2e-3), (torch.bfloat16, 0.1), (torch.float16, 0.1)], ids=str
    )
    def test_keeps_the_type(self, dtype: torch.dtype, tolerance: float) -> None:
        found = SMALL(noise(2, 3000).to(dtype))
        assert found.dtype == SMALL.amplitude(noise(2, 300).to(dtype)).dtype == dtype
        torch.testing.assert_close(found.float(), SMALL(noise(2, 3000)), rtol=0, atol=tolerance)

    def test_input_is_not_changed(self) -> None:
        waveform = noise(2, 3000)
        SMALL(waveform).zero_()
        SMALL.amplitude(waveform).zero_()
        assert torch.equal(waveform, noise(2, 3000))

    @pytest.mark.parametrize("normalize", ["clip_standard", "none"])
    def test_describe_build_round_trip(self, normalize: Any) -> None:
        features = MorletScalogram(16000, 5, 70.0, 900.0, 7.0, 160, normalize)
        again = build(describe(features), Transform, "features")
        assert torch.equal(again(noise(2, 3000)), features(noise(2, 3000)))
        assert features.state_dict() == {}

    def test_exports_with_any_batch_size(self) -> None:
        batch = torch.export.Dim("batch")
        exported = torch.export.export(SMALL, (noise(2, 3000),), dynamic_shapes={"waveform": {0: batch}}).module()
        torch.testing.assert_close(exported(noise(5, 3000)), SMALL(noise(5, 3000)), rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("waveform", "message"),
        [
            (noise(3000), r"waveform must be floating point of shape \(B, S\), got torch.float32 of shape \(3000,\)"),
            (noise(1, 1, 3000), r"shape \(B, S\), got torch.float32 of shape \(1, 1, 3000\)"),
            (torch.zeros(1, 3000, dtype=torch.int16), r"floating point of shape \(B, S\), got torch.int16"),
            (torch.zeros(2, 0), "waveform has 0 samples, but a scalogram needs at least 1"),
        ],
        ids=["1d", "3d", "int", "empty"],
    )
    def test_refuses_other_tensors(self, waveform: Tensor, message: str) -> None:
        for compute in (SMALL, SMALL.amplitude):
            with pytest.raises(ValueError, match=message):
                compute(waveform)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"f_max": 4000.5}, "f_max <= 4000 Hz, half of the sampling rate .* got 50.0 and 4000.5"),
            ({"f_min": 0.0}, r"0 < f_min < f_max .* got 0.0 and 2000.0"),
            ({"f_min": -5.0}, r"0 < f_min < f_max .* got -5.0 and 2000.0"),
            ({"f_min": 900.0, "f_max": 800.0}, r"f_min < f_max .* got 900.0 and 800.0"),
            ({"f_min": 500.0, "f_max": 500.0, "num_scales": 2}, "a single scale may .* 500.0 and 500.0 for 2 scales"),
            ({"f_min": math.nan}, "f_min and f_max must satisfy .* got nan"),
            ({"num_scales": 0}, "num_scales must be positive, got 0"),
            ({"w0": 0.0}, "w0 must be positive, got 0.0"),
            ({"hop_length": 0}, "hop_length must be positive, got 0"),
            ({"sample_rate": -8000}, "sample_rate must be positive, got -8000"),
            ({"normalize": "max"}, "normalize must be one of 'clip_standard', 'none', got 'max'"),
        ],
        ids=["nyquist", "zero", "negative", "order", "equal", "nan", "scales", "w0", "hop", "rate", "normalize"],
    )
    def test_bad_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MorletScalogram(**options)
