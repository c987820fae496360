from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.component import Transform, build, describe
from respiro.transforms._normalise import normalise
from respiro.transforms.gammatone import GammatoneSpectrogram, erb_bandwidths, erb_centres, gammatone_magnitude

Arrays = dict[str, np.ndarray]
PRESET = GammatoneSpectrogram()
RATES = [(4000, 1900.0), (8000, 3900.0), (16000, 7000.0), (44100, 16000.0)]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.1


@pytest.fixture
def vectors(golden: Path) -> Callable[[str], Arrays]:
    return lambda name: dict(np.load(golden / "transforms" / f"{name}.npz"))


def like_gram(expected: Arrays, **options: Any) -> GammatoneSpectrogram:
    """The framing and the filters of the gammatonegrams."""
    centres = expected["centre"]
    return GammatoneSpectrogram(
        int(expected["sample_rate"]), len(centres), centres[0], centres[-1], hop_length=128, center=False, **options
    )


def equation(clip: np.ndarray, rate: int, centres: np.ndarray, n_fft: int, hop: int, center: bool) -> np.ndarray:
    """``G[t, k]`` of one clip, frame by frame and band by band."""
    if center:
        clip = np.pad(clip, n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft
    rows = []
    for start in range(0, len(clip) - n_fft + 1, hop):
        power = np.abs(np.fft.rfft(clip[start : start + n_fft] * window)) ** 2
        row = []
        for fc in centres:
            b = 1.019 * 24.7 * (4.37 * fc / 1000 + 1)
            row.append(np.sum((1 + ((frequencies - fc) / b) ** 2) ** -4.0 * power))
        rows.append(row)
    return np.array(rows)


class TestFormulas:
    @pytest.mark.parametrize(("low", "high", "count"), [(50, 3900, 124), (50, 2000, 64)])
    def test_centres(self, vectors: Callable[[str], Arrays], low: int, high: int, count: int) -> None:
        expected = vectors("erb_centres")[f"{low}_{high}_{count}"]
        np.testing.assert_allclose(erb_centres(count, low, high), expected, rtol=1e-9)
        np.testing.assert_allclose(GammatoneSpectrogram(8000, count, low, high).centres, expected, rtol=1e-9)

    def test_centres_include_both_ends_and_are_equally_spaced(self) -> None:
        centres = erb_centres(7, 30.0, 1800.0)
        assert centres[[0, -1]] == pytest.approx([30.0, 1800.0], rel=1e-12)
        np.testing.assert_allclose(np.diff(np.log10(1 + 0.00437 * centres), n=2), 0, atol=1e-12)

    @pytest.mark.parametrize("rate", [8000, 16000])
    def test_bandwidths_and_magnitudes(self, vectors: Callable[[str], Arrays], rate: int) -> None:
        expected = vectors(f"gammatone_{rate}")
        magnitude = gammatone_magnitude(expected["frequency"], expected["centre"])
        np.testing.assert_allclose(erb_bandwidths(expected["centre"]), expected["bandwidth"], rtol=1e-9)
        np.testing.assert_allclose(magnitude.T, expected["weight_magnitude"], rtol=1e-9)

    @pytest.mark.parametrize("rate", [8000, 16000])
    def test_magnitudes_are_those_of_scipy_filters_of_the_golden_files(
        self, vectors: Callable[[str], Arrays], rate: int
    ) -> None:
        expected = vectors(f"gammatone_{rate}")
        magnitude = gammatone_magnitude(expected["frequency"], expected["centre"]).T
        for fc, ours, scipys in zip(expected["centre"], magnitude, expected["iir_magnitude"], strict=True):
            np.testing.assert_allclose(ours, scipys, rtol=0, atol=0.02 if fc <= rate / 4 else 0.05)

    @pytest.mark.parametrize("rate", [8000, 16000])
    @pytest.mark.parametrize(
        ("shares", "tolerance", "flank"),
        [((0.0075, 0.05, 0.1, 0.18, 0.25), 0.02, False), ((0.3, 0.35, 0.4), 0.05, False), ((0.43, 0.47), 0.16, True)],
        ids=["to fs/4", "to .4 fs", "to .47 fs"],
    )
    def test_magnitudes_are_those_of_scipy(
        self, rate: int, shares: tuple[float, ...], tolerance: float, flank: bool
    ) -> None:
        """Of the highest filters up to the centre: beyond it the sampled filter meets its image at half the rate."""
        signal = pytest.importorskip("scipy.signal")
        frequencies = np.arange(257) * rate / 512
        for fc in np.array(shares) * rate:
            b, a = signal.gammatone(fc, "iir", fs=rate)
            scipys = np.abs(signal.freqz(b, a, worN=frequencies, fs=rate)[1])
            compared = frequencies <= (fc if flank else rate / 2)
            ours = gammatone_magnitude(frequencies, np.array([fc]))[:, 0]
            np.testing.assert_allclose(ours[compared], scipys[compared], rtol=0, atol=tolerance)


class TestEnergies:
    @pytest.mark.parametrize("signal", ["tones", "noise"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
    def test_golden_gram(
        self, vectors: Callable[[str], Arrays], signal: str, dtype: torch.dtype, tolerance: float
    ) -> None:
        expected = vectors(f"gammatonegram_{signal}")
        energies = like_gram(expected).energies(torch.from_numpy(expected["wave"])[None].to(dtype))
        assert energies.dtype == dtype
        np.testing.assert_allclose(energies[0].T, expected["gram"], rtol=tolerance)

    @pytest.mark.parametrize("signal", ["tones", "noise"])
    def test_they_are_nearly_the_power_of_filters_in_time(self, vectors: Callable[[str], Arrays], signal: str) -> None:
        expected = vectors(f"gammatonegram_{signal}")
        energies = like_gram(expected).energies(torch.from_numpy(expected["wave"])[None])[0].T.numpy()
        window = np.hanning(513)[:-1]  # periodic
        power = 2 * energies / (512 * np.sum(window**2))  # both halves of the spectrum
        ours, filters = 10 * np.log10(power), 10 * np.log10(expected["time_domain_power"])
        assert np.median(np.abs(ours - filters)) <= 1.0
        assert np.corrcoef(ours.ravel(), filters.ravel())[0, 1] >= 0.93

    @pytest.mark.parametrize(("rate", "f_max"), RATES)
    @pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
    def test_the_equation_at_any_rate(self, rate: int, f_max: float, center: bool) -> None:
        gammatone = GammatoneSpectrogram(rate, 9, 40.0, f_max, n_fft=256, hop_length=100, center=center)
        waveform = noise(2, 1777, dtype=torch.float64)
        expected = [equation(clip, rate, np.array(gammatone.centres), 256, 100, center) for clip in waveform.numpy()]
        np.testing.assert_allclose(gammatone.energies(waveform), expected, rtol=1e-9)
        np.testing.assert_allclose(gammatone.energies(waveform.float()), expected, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_a_cast_module_computes_as_before(self, dtype: torch.dtype) -> None:
        waveform = noise(2, 8000)
        gammatone = GammatoneSpectrogram().to(dtype)
        assert torch.equal(gammatone.energies(waveform), PRESET.energies(waveform))
        assert torch.equal(gammatone.energies(waveform.double()), PRESET.energies(waveform.double()))
        assert torch.equal(gammatone.float()(waveform), PRESET(waveform))

    def test_they_do_not_overflow_in_half_precision(self) -> None:
        tone = torch.sin(2 * torch.pi * 1000 * torch.arange(4000) / 8000)
        energies = GammatoneSpectrogram(n_fft=2048).energies(tone[None].half())
        assert energies.dtype == torch.float32
        assert energies.max() > torch.finfo(torch.float16).max
        assert energies.isfinite().all()

    def test_a_tone_is_loudest_in_its_band(self) -> None:
        band = 60
        tone = torch.sin(2 * torch.pi * PRESET.centres[band] * torch.arange(16000) / 8000)
        assert (PRESET.energies(tone[None])[0].argmax(1) - band).abs().max() <= 1


@pytest.mark.parametrize("normalize", ["clip_standard", "none"])
def test_log_energies(normalize: Any) -> None:
    waveform = noise(2, 9000, dtype=torch.float64) * torch.tensor([[1.0], [4e-6]], dtype=torch.float64)
    logs = np.log(np.maximum(PRESET.energies(waveform).numpy(), 1e-10))
    assert 0.1 < np.mean(logs[1] == np.log(1e-10)) < 0.9  # the floor counts
    if normalize == "clip_standard":
        logs = (logs - logs.mean((1, 2), keepdims=True)) / logs.std((1, 2), keepdims=True)
    np.testing.assert_allclose(GammatoneSpectrogram(normalize=normalize)(waveform), logs, rtol=1e-9, atol=1e-12)


def test_gain_has_no_effect_on_standardised_features() -> None:
    waveform = noise(2, 9000)
    for gain in (0.05, 4.0):
        torch.testing.assert_close(PRESET(waveform * gain), PRESET(waveform), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silence_becomes_zeros_without_a_gradient(dtype: torch.dtype) -> None:
    waveform = torch.cat([noise(1, 4000), torch.zeros(1, 4000)]).to(dtype).requires_grad_()
    features = PRESET(waveform)
    assert features[0].std() > 0.9
    assert not features[1].any()
    features.square().sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.isfinite().all()
    assert waveform.grad[0].any()
    assert not waveform.grad[1].any()


class TestNormalise:
    @pytest.mark.parametrize("value", [-23.025851, 0.0, 0.1, 88.7])
    def test_one_value_becomes_zero_whatever_the_rounding(self, value: float) -> None:
        logs = torch.full((1, 77, 123), value).requires_grad_()
        normalised = normalise(logs, "clip_standard")
        assert not normalised.any()
        normalised.sum().backward()
        assert logs.grad is not None
        assert not logs.grad.any()

    def test_clips_have_mean_0_and_deviation_1(self) -> None:
        logs = noise(3, 50, 20) * torch.tensor([0.01, 1.0, 100.0])[:, None, None] - 20
        normalised = normalise(logs, "clip_standard")
        torch.testing.assert_close(normalised.mean((1, 2)), torch.zeros(3), rtol=0, atol=1e-3)
        torch.testing.assert_close(normalised.std((1, 2), correction=0), torch.ones(3), rtol=1e-3, atol=0)

    def test_not_finite_values_are_not_hidden(self) -> None:
        logs = torch.zeros(2, 3, 4)
        logs[0, 0, 0] = float("nan")
        normalised = normalise(logs, "clip_standard")
        assert normalised[0].isnan().all()
        assert not normalised[1].any()

    @pytest.mark.parametrize("how", ["clip_standard", "none"])
    def test_gradient_is_right(self, how: Any) -> None:
        logs = noise(2, 5, 3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: normalise(x, how), (logs,))

    def test_what_it_refuses(self) -> None:
        with pytest.raises(ValueError, match="normalize must be one of 'clip_standard', 'none', got 'max'"):
            normalise(torch.zeros(1, 2, 3), "max")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"log_values must be floating point of shape \(B, T, F\)"):
            normalise(torch.zeros(2, 3), "clip_standard")


class TestModule:
    @pytest.mark.parametrize("samples", [257, 1000, 32000, 32448, 73728])
    def test_frames_of_centred_windows(self, samples: int) -> None:
        assert PRESET(noise(2, samples)).shape == (2, 1 + samples // 208, 124)

    @pytest.mark.parametrize("samples", [512, 719, 720, 4000])
    def test_frames_without_centring(self, samples: int) -> None:
        features = GammatoneSpectrogram(center=False)(noise(2, samples))
        assert features.shape == (2, 1 + (samples - 512) // 208, 124)

    def test_attributes(self) -> None:
        gammatone = GammatoneSpectrogram(16000, 32, 60.0, 7000.0, hop_length=160)
        assert (gammatone.sample_rate, gammatone.num_features, gammatone.hop_length) == (16000, 32, 160)
        assert len(gammatone.centres) == 32
        assert {type(centre) for centre in gammatone.centres} == {float}

    def test_inner_frames_do_not_depend_on_centring(self) -> None:
        waveform = noise(1, 4096)
        centred = GammatoneSpectrogram(hop_length=256).energies(waveform)
        torch.testing.assert_close(
            GammatoneSpectrogram(hop_length=256, center=False).energies(waveform), centred[:, 1:-1]
        )

    @pytest.mark.parametrize("clips", [1, 5, 23])
    def test_a_batch_equals_its_clips(self, clips: int) -> None:
        waveform = noise(clips, 20000) * torch.logspace(-3, 0, clips)[:, None]
        each = torch.cat([PRESET(clip[None]) for clip in waveform])
        torch.testing.assert_close(PRESET(waveform), each, rtol=0, atol=1e-4)

    def test_input_is_not_changed(self) -> None:
        waveform = noise(2, 8000)
        PRESET(waveform)
        assert torch.equal(waveform, noise(2, 8000))

    def test_computes_in_float32_under_autocast(self) -> None:
        waveform = noise(2, 8000)
        with torch.autocast("cpu", torch.bfloat16):
            features, energies = PRESET(waveform), PRESET.energies(waveform)
        assert torch.equal(features, PRESET(waveform))
        assert torch.equal(energies, PRESET.energies(waveform))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_gives_the_type_it_gets(self, dtype: torch.dtype) -> None:
        waveform = noise(2, 8000).to(dtype)
        assert PRESET(waveform).dtype == dtype
        torch.testing.assert_close(PRESET(waveform).float(), PRESET(waveform.float()), rtol=0.01, atol=0.01)

    def test_does_not_depend_on_strides(self) -> None:
        waveform = noise(2, 8000)
        torch.testing.assert_close(PRESET(waveform.T.contiguous().T), PRESET(waveform), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("normalize", ["clip_standard", "none"])
    @pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
    def test_gradient_is_right(self, normalize: Any, center: bool) -> None:
        gammatone = GammatoneSpectrogram(
            4000, 4, f_max=1500.0, n_fft=32, hop_length=16, center=center, normalize=normalize
        )
        waveform = (noise(2, 50, dtype=torch.float64) * 10).requires_grad_()
        assert torch.autograd.gradcheck(gammatone, (waveform,), atol=1e-5)

    def test_nothing_is_saved(self) -> None:
        assert PRESET.state_dict() == {}
        assert not list(PRESET.parameters())

    def test_describe_build_round_trip(self) -> None:
        gammatone = GammatoneSpectrogram(16000, 32, 60.0, 7000.0, 400, 160, center=False, normalize="none")
        again = build(json.loads(json.dumps(describe(gammatone))), Transform, "features")
        assert torch.equal(again(noise(2, 8000)), gammatone(noise(2, 8000)))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
    def test_copies_compute_the_same(self, clone: Callable[[Transform], Transform]) -> None:
        assert torch.equal(clone(PRESET)(noise(2, 8000)), PRESET(noise(2, 8000)))

    def test_exports_with_any_batch_size(self) -> None:
        batch = torch.export.Dim("batch")
        exported = torch.export.export(PRESET, (noise(2, 9000),), dynamic_shapes={"waveform": {0: batch}}).module()
        torch.testing.assert_close(exported(noise(5, 9000)), PRESET(noise(5, 9000)), rtol=0, atol=1e-4)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_a_gpu_computes_the_same(self) -> None:
        waveform = noise(4, 32000)
        on_gpu = GammatoneSpectrogram().cuda()
        torch.testing.assert_close(on_gpu(waveform.cuda()).cpu(), PRESET(waveform), rtol=0, atol=1e-3)
        double = on_gpu.energies(waveform.double().cuda()).cpu()
        torch.testing.assert_close(double, PRESET.energies(waveform.double()), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("gammatone", "samples"),
    [(GammatoneSpectrogram(), 257), (GammatoneSpectrogram(center=False), 512)],
    ids=["centred", "uncentred"],
)
def test_short_clips_name_the_samples_they_need(gammatone: GammatoneSpectrogram, samples: int) -> None:
    assert gammatone(noise(1, samples)).isfinite().all()
    with pytest.raises(ValueError, match=f"waveform has {samples - 1} samples, but .* needs at least {samples}; pad"):
        gammatone(noise(1, samples - 1))


@pytest.mark.parametrize(
    "waveform", [noise(16000), noise(1, 1, 16000), torch.zeros(1, 16000, dtype=torch.int16)], ids=["1d", "3d", "int"]
)
def test_refuses_other_tensors(waveform: Tensor) -> None:
    with pytest.raises(ValueError, match=r"waveform must be floating point of shape \(B, S\), got torch"):
        PRESET(waveform)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_rate": 4000}, "f_max <= 2000 Hz, half of the sampling rate; got 50.0 and 3900.0"),
        ({"f_min": 500.0, "f_max": 400.0}, r"f_min < f_max .* got 500.0 and 400.0"),
        ({"num_bands": 0}, "num_bands must be positive, got 0"),
        ({"hop_length": 0}, "hop_length must be positive, got 0"),
        ({"n_fft": 0}, "n_fft must be positive, got 0"),
        ({"n_fft": 401}, "n_fft must be even, so that a window has a middle, got 401"),
        ({"normalize": "max"}, "normalize must be one of 'clip_standard', 'none', got 'max'"),
    ],
    ids=["nyquist", "band", "bands", "hop", "window", "odd", "normalize"],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GammatoneSpectrogram(**arguments)
