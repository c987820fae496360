"""The audio quality score: golden vectors, the equation frame by frame, and every edge of a clip."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from respiro.component import Transform, build, describe
from respiro.transforms import AudioQuality

RAW = AudioQuality(rms="raw")
VARIANTS: dict[str, dict[str, Any]] = {
    "frame-mean": {},
    "mean-psd": {"entropy": "mean-psd"},
    "band": {"band": (50, 2000)},
    "mean-psd-band": {"entropy": "mean-psd", "band": [50, 2000]},
}
EXACT = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-3)], ids=str)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.1


def tone(samples: int = 16000, hertz: float = 200.0, amplitude: float = 0.5) -> Tensor:
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / 16000)


def entropy_by_loop(clip: np.ndarray, quality: AudioQuality) -> float:
    """``H`` of one clip, frame by frame and bin by bin."""
    settings, rate, n_fft = quality.init_args, quality.sample_rate, quality.n_fft
    size, hop = round(settings["window"] * rate), round(settings["hop"] * rate)
    low, high = settings["band"] or (0, rate / 2)
    bins = [k for k in range(n_fft // 2 + 1) if low <= k * rate / n_fft <= high]
    clip = np.pad(clip, (0, max(0, n_fft - len(clip))))
    before = (n_fft - size) // 2
    powers = []
    for start in range(0, len(clip) - n_fft + 1, hop):
        frame = np.zeros(n_fft)
        for n in range(size):
            frame[before + n] = clip[start + before + n] * (0.5 - 0.5 * math.cos(2 * math.pi * n / size))
        if math.sqrt((frame**2).sum() / size) >= settings["silence"]:
            powers.append((np.abs(np.fft.rfft(frame)) ** 2)[bins])
    if not powers:
        return 1.0
    if settings["entropy"] == "mean-psd":
        powers = [np.mean(powers, axis=0)]
    return float(np.mean([_entropy(power / power.sum()) for power in powers]))


def _entropy(shares: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


class TestGolden:
    @pytest.fixture
    def vectors(self, golden: Path) -> dict[str, np.ndarray]:
        return dict(np.load(golden / "qlung" / "audio_quality.npz"))

    @staticmethod
    def each(vectors: dict[str, np.ndarray], dtype: torch.dtype, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
        waves = [torch.from_numpy(vectors[f"wave_{number:02d}"]).to(dtype) for number in range(len(vectors["name"]))]
        rates = vectors["sample_rate"].tolist()
        return torch.cat([compute(rate, wave[None]) for rate, wave in zip(rates, waves, strict=True)])

    @EXACT
    @pytest.mark.parametrize(
        ("variant", "key"), [("frame-mean", "h_frame"), ("mean-psd", "h_mean_psd"), ("band", "h_frame_band")]
    )
    def test_measures(
        self, vectors: dict[str, np.ndarray], variant: str, key: str, dtype: torch.dtype, tolerance: float
    ) -> None:
        found = self.each(vectors, dtype, lambda rate, wave: AudioQuality(rate, **VARIANTS[variant]).measure(wave))
        assert found.dtype == dtype
        np.testing.assert_allclose(found[:, 0], vectors[key], rtol=0, atol=tolerance)
        np.testing.assert_allclose(found[:, 1], vectors["rms"], rtol=0, atol=tolerance)

    @EXACT
    @pytest.mark.parametrize(
        ("variant", "key"),
        [("frame-mean", "aqs_frame_raw"), ("mean-psd", "aqs_mean_psd_raw"), ("band", "aqs_band_raw")],
    )
    def test_scores_of_the_raw_rms(
        self, vectors: dict[str, np.ndarray], variant: str, key: str, dtype: torch.dtype, tolerance: float
    ) -> None:
        found = self.each(vectors, dtype, lambda rate, wave: AudioQuality(rate, rms="raw", **VARIANTS[variant])(wave))
        np.testing.assert_allclose(found, vectors[key], rtol=0, atol=tolerance)

    @EXACT
    def test_scores_of_the_scaled_rms(
        self, vectors: dict[str, np.ndarray], dtype: torch.dtype, tolerance: float
    ) -> None:
        def score(rate: int, wave: Tensor) -> Tensor:
            quality = AudioQuality(rate, percentiles=(0, 100))
            quality.fit(torch.tensor([float(vectors[key]) for key in ("rms_p5", "rms_p95")]))
            return quality(wave)

        found = self.each(vectors, dtype, score)
        np.testing.assert_allclose(found, vectors["aqs_frame_scaled"], rtol=0, atol=tolerance)

    def test_frames_that_count(self, vectors: dict[str, np.ndarray]) -> None:
        """Of the half-silent clip: what the loud half has by itself."""
        number = vectors["name"].tolist().index("half_silent")
        wave = torch.from_numpy(vectors[f"wave_{number:02d}"]).double()
        active = int(vectors["n_active"][number])
        loud = [start for start in range(47) if wave[start * 160 + 56 : start * 160 + 456].abs().max() > 1e-4]
        assert len(loud) == active < vectors["n_frames"][number]


class TestMeasures:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize(
        ("rate", "framing"),
        [
            (16000, {}),
            (4000, {}),
            (44100, {}),
            (8000, {"window": 0.05, "hop": 0.013, "n_fft": 401}),
            (8000, {"n_fft": 200}),
        ],
        ids=["16k", "4k", "44k-fft-1024", "odd-fft", "fft-of-the-window"],
    )
    def test_the_equation(self, variant: str, rate: int, framing: dict[str, Any]) -> None:
        quality = AudioQuality(rate, **{**VARIANTS[variant], **framing})
        clips = noise(3, round(0.21 * rate), dtype=torch.float64).cumsum(1) * 0.1
        clips[1, : clips.shape[1] // 2] = 0
        clips[2] *= 1e-4  # some frames on either side of the gate
        found = quality.measure(clips)
        for clip, (entropy, rms) in zip(clips.numpy(), found.tolist(), strict=True):
            assert entropy == pytest.approx(entropy_by_loop(clip, quality), abs=1e-12)
            assert rms == pytest.approx(math.sqrt(sum(x * x for x in clip) / len(clip)), rel=1e-12)
        torch.testing.assert_close(quality.measure(clips.float()), found.float(), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("rate", "n_fft"), [(4000, 512), (16000, 512), (20480, 512), (22050, 1024), (44100, 2048)])
    def test_the_transform_holds_the_window(self, rate: int, n_fft: int) -> None:
        quality = AudioQuality(rate)
        assert quality.win_length == round(0.025 * rate)
        assert quality.n_fft == n_fft

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_clip_in_a_batch_measures_as_alone(self, variant: str, dtype: torch.dtype) -> None:
        quality = AudioQuality(**VARIANTS[variant])
        lengths = [1, 55, 56, 57, 320, 511, 512, 513, 671, 672, 673, 4000, 4001, 9000]
        batch = noise(len(lengths), 9000, dtype=dtype)
        batch[3, :] = 0
        alone = torch.cat([quality.measure(clip[None, :n]) for clip, n in zip(batch, lengths, strict=True)])
        for clip, n in zip(batch, lengths, strict=True):
            clip[n:] = math.nan  # what lies beyond the length is nothing
        together = quality.measure(batch, torch.tensor(lengths))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
        assert together.dtype == dtype

    def test_a_batch_shorter_than_a_frame(self) -> None:
        batch = noise(2, 300)
        together = RAW.measure(batch, torch.tensor([300, 200], dtype=torch.int32))
        torch.testing.assert_close(together[0], RAW.measure(batch[:1])[0])
        torch.testing.assert_close(together[1], RAW.measure(batch[1:, :200])[0])

    def test_many_long_clips(self) -> None:
        """Which are worked on in parts."""
        batch = noise(9, 128000)
        alone = torch.cat([RAW.measure(clip[None]) for clip in batch])
        torch.testing.assert_close(RAW.measure(batch), alone, rtol=0, atol=1e-6)

    def test_silence_is_the_worst_entropy(self) -> None:
        assert RAW.measure(torch.zeros(1, 8000)).tolist() == [[1.0, 0.0]]
        assert RAW(torch.zeros(1, 8000)).item() == pytest.approx(0.3)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_silent_frames_do_not_count(self, variant: str) -> None:
        quality = AudioQuality(**VARIANTS[variant])
        clip = torch.cat([tone(8032), torch.zeros(8000)])
        frames = 1 + (8032 - 512) // 160
        entropy = quality.measure(clip[None])[0, 0]
        assert entropy == pytest.approx(entropy_by_loop(clip.double().numpy(), quality), abs=1e-5)
        ends = quality.measure(clip[None, : 512 + frames * 160 + 480])[0, 0]  # a few more, which hold the tone's end
        assert entropy == pytest.approx(float(ends), abs=1e-6)

    @pytest.mark.parametrize(("factor", "silent"), [(0.99, True), (1.01, False)])
    def test_the_gate_lies_at_the_windowed_rms(self, factor: float, silent: bool) -> None:
        """Of a sine under a Hann window: amplitude times sqrt(3 / 16)."""
        clip = tone(4000, 1000.0, factor * 1e-5 / math.sqrt(3 / 16))
        assert (RAW.measure(clip[None])[0, 0] == 1) == silent
        assert AudioQuality(silence=0).measure(clip[None])[0, 0] < 0.3

    @pytest.mark.parametrize("samples", [1, 56])
    def test_a_clip_that_the_window_does_not_reach(self, samples: int) -> None:
        entropy, rms = RAW.measure(torch.full((1, samples), -0.5))[0].tolist()
        assert (entropy, rms) == (1.0, 0.5)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("value", [0.3, -1.0, 1e-3])
    def test_a_constant_clip_has_the_entropy_of_the_window(self, variant: str, value: float) -> None:
        quality = AudioQuality(**VARIANTS[variant])
        entropy, rms = quality.measure(torch.full((1, 4000), value))[0].tolist()
        assert entropy == pytest.approx(entropy_by_loop(np.ones(512), quality), abs=1e-4)
        assert rms == pytest.approx(abs(value))

    def test_what_follows_the_last_whole_frame_counts_for_the_rms_only(self) -> None:
        clip = torch.cat([tone(672), torch.zeros(159)])
        loud = torch.cat([tone(672), torch.full((159,), 0.9)])
        quiet, other = RAW.measure(torch.stack([clip, loud]))
        assert quiet[0] == pytest.approx(float(other[0]), abs=1e-6)
        assert other[1] > quiet[1]

    def test_no_power_in_the_band_is_silence(self) -> None:
        quality = AudioQuality(band=(7000, 8000), silence=0.0)
        assert quality.measure(torch.zeros(2, 4000)).tolist() == [[1.0, 0.0]] * 2

    @pytest.mark.parametrize("shape", [(0, 16000), (0, 1)])
    def test_an_empty_batch(self, shape: tuple[int, int]) -> None:
        assert RAW.measure(torch.zeros(shape)).shape == (0, 2)
        assert RAW(torch.zeros(shape), torch.zeros(0, dtype=torch.int64)).shape == (0,)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_is_measured_in_single(self, dtype: torch.dtype) -> None:
        clip = noise(2, 8000).to(dtype)
        assert torch.equal(RAW.measure(clip), RAW.measure(clip.float()))

    def test_autocast_changes_nothing(self) -> None:
        clip = noise(2, 8000)
        with torch.autocast("cpu", torch.bfloat16):
            found = RAW(clip)
        assert torch.equal(found, RAW(clip))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_a_cast_module_computes_as_before(self, dtype: torch.dtype) -> None:
        cast = AudioQuality(percentiles=(0, 100))
        cast.fit(torch.tensor([0.01, 0.123456789]))
        before = cast(noise(2, 8000))
        assert torch.equal(cast.to(dtype)(noise(2, 8000)), before)

    def test_the_input_is_not_changed_and_no_gradient_flows(self) -> None:
        clip = noise(2, 8000).requires_grad_()
        before = clip.detach().clone()
        score = RAW(clip, torch.tensor([8000, 4000]))
        assert torch.equal(clip, before)
        assert not score.requires_grad

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_samples_that_are_not_finite_name_their_row(self, bad: float) -> None:
        batch = noise(3, 4000)
        batch[1, 3000] = bad
        with pytest.raises(ValueError, match="row 1 of waveform holds a sample that is not finite"):
            RAW(batch)
        RAW(batch, torch.tensor([4000, 3000, 4000]))  # beyond the length

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_on_a_gpu(self, variant: str) -> None:
        quality = AudioQuality(rms="raw", **VARIANTS[variant])
        batch, lengths = noise(5, 9000), torch.tensor([9000, 1, 300, 512, 5000])
        expected = quality(batch, lengths)
        torch.testing.assert_close(quality.cuda()(batch.cuda(), lengths.cuda()).cpu(), expected, rtol=0, atol=1e-5)
        assert torch.equal(quality(batch, lengths), expected)  # what is on the CPU is measured there
        batch[1, 0] = math.nan
        assert quality(batch.cuda(), lengths.cuda()).isnan().tolist() == [False, True, False, False, False]


class TestScore:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 10_000), st.floats(-30, 60), st.sampled_from(list(VARIANTS)))
    def test_a_gain_leaves_the_entropy(self, seed: int, decibels: float, variant: str) -> None:
        quality = AudioQuality(**VARIANTS[variant])
        clip = noise(1, 2000, seed=seed).cumsum(1)
        gain = 10 ** (decibels / 20)
        entropy, rms = quality.measure(clip)[0].tolist()
        louder = quality.measure(gain * clip)[0].tolist()
        assert louder[0] == pytest.approx(entropy, abs=1e-5)
        assert louder[1] == pytest.approx(gain * rms, rel=1e-5)

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=700),
        st.sampled_from(list(VARIANTS)),
        st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
    )
    def test_it_lies_between_0_and_1(self, samples: list[float], variant: str, weights: tuple[float, float]) -> None:
        quality = AudioQuality(rms="raw", alpha=weights[0], beta=weights[1], **VARIANTS[variant])
        entropy, rms = quality.measure(torch.tensor([samples]))[0].tolist()
        assert 0 <= entropy <= 1
        assert rms >= 0
        assert 0 <= quality(torch.tensor([samples])).item() <= 1

    @pytest.mark.parametrize("percentiles", [(5.0, 95.0), (0, 100), (12.5, 50)])
    def test_percentiles_are_those_of_numpy(self, percentiles: tuple[float, float]) -> None:
        rms = noise(301).abs()
        quality = AudioQuality(percentiles=percentiles)
        quality.fit(rms)
        low, high = np.percentile(rms.double().numpy(), percentiles).tolist()
        np.testing.assert_allclose(quality.rms_range, [low, high], rtol=1e-6)
        measures = torch.stack([torch.linspace(0, 1, 301), rms], dim=1)
        for (entropy, loudness), score in zip(measures.tolist(), quality.score(measures).tolist(), strict=True):
            share = min(max((loudness - low) / (high - low), 0), 1)
            assert score == pytest.approx(min(max(1 - 0.7 * entropy + 0.3 * share, 0), 1), abs=1e-5)

    def test_one_rms_for_all_train_clips(self) -> None:
        quality = AudioQuality()
        quality.fit(torch.full((7,), 0.1))
        measures = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
        torch.testing.assert_close(quality.score(measures), torch.tensor([0.3, 0.3, 0.6]))

    def test_fitting_again_replaces_the_range(self) -> None:
        quality = AudioQuality()
        quality.fit(torch.tensor([3.0, 4.0]))
        quality.fit(torch.tensor([1.0, 1.0]))
        assert quality.rms_range.tolist() == [1.0, 1.0]

    @pytest.mark.parametrize(
        "rms", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.1, math.nan]), torch.tensor([-0.1])]
    )
    def test_an_rms_that_makes_no_sense(self, rms: Tensor) -> None:
        with pytest.raises(ValueError, match="rms must hold the RMS of at least one clip"):
            AudioQuality().fit(rms)

    def test_without_a_range_it_says_what_to_do(self) -> None:
        quality = AudioQuality()
        assert quality.measure(noise(1, 4000)).isfinite().all()
        with pytest.raises(RuntimeError, match=r"call fit .*add_quality.*rms='raw'"):
            quality(noise(1, 4000))
        quality.load_state_dict(AudioQuality().state_dict())  # of one that was not fitted either
        with pytest.raises(RuntimeError, match="the range of the RMS is not known"):
            quality(noise(1, 4000))

    def test_the_range_survives_saving(self, tmp_path: Path) -> None:
        model = nn.ModuleDict({"quality": AudioQuality()})
        model["quality"].fit(noise(50).abs())
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = nn.ModuleDict({"quality": AudioQuality()})
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        clip = noise(2, 4000)
        for restored in (
            other["quality"],
            copy.deepcopy(model)["quality"],
            pickle.loads(pickle.dumps(model))["quality"],
        ):
            assert torch.equal(restored(clip), model["quality"](clip))
        assert list(model.state_dict()) == ["quality.rms_range"]

    @pytest.mark.parametrize("measures", [torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 2, dtype=torch.int64)])
    def test_measures_of_another_shape(self, measures: Tensor) -> None:
        with pytest.raises(ValueError, match=r"measures must .*\(B, 2\)"):
            RAW.score(measures)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"entropy": "mean"}, "entropy must be one of 'frame-mean', 'mean-psd', got 'mean'"),
            ({"rms": "batch"}, "rms must be one of 'train-percentile', 'raw', got 'batch'"),
            ({"sample_rate": 0}, "sample_rate must be positive"),
            ({"band": (-1, 2000)}, r"band must be \(low, high\) in Hz with 0 <= low < high <= 8000, .*\(-1, 2000\)"),
            ({"band": (50, 8001)}, "band must be"),
            ({"band": (2000, 50)}, "band must be"),
            ({"band": (50, 50)}, "band must be"),
            ({"band": (50, math.nan)}, "band must be"),
            ({"band": 50}, "band must be"),
            (
                {"band": (50, 63)},
                r"band must hold at least 2 of the frequencies that are 31\.25 Hz apart, got \(50, 63\)",
            ),
            ({"n_fft": 399}, "n_fft must be a whole number, at least the window's 400, got 399"),
            ({"n_fft": 512.5}, "n_fft must be a whole number, .* got 512.5"),
            ({"sample_rate": math.inf}, "must be finite, got 0.025 and 0.01 seconds and inf Hz"),
            ({"window": 0.0}, "window must be positive"),
            ({"hop": -0.01}, "hop must be positive"),
            ({"hop": math.inf}, "window, hop and sample_rate must be finite"),
            ({"hop": 1e-5}, "make a window of 400 samples and a hop of 0 at 16000 Hz; at least 2 and 1 are needed"),
            ({"window": 5e-5}, "make a window of 1 samples"),
            ({"percentiles": (95, 5)}, r"percentiles must be \(low, high\) with 0 <= low < high <= 100, got \(95, 5\)"),
            ({"percentiles": (5, 5)}, "percentiles must be"),
            ({"percentiles": (5, 101)}, "percentiles must be"),
            ({"percentiles": 5}, "percentiles must be"),
            ({"alpha": math.nan}, "alpha must be a finite number, got nan"),
            ({"beta": math.inf}, "beta must be a finite number, got inf"),
            ({"silence": -1e-9}, "silence must be an RMS of at least 0"),
            ({"silence": math.inf}, "silence must be"),
        ],
        ids=lambda value: json.dumps(value, default=str) if isinstance(value, dict) else "",
    )
    def test_what_has_no_meaning_is_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AudioQuality(**arguments)

    @pytest.mark.parametrize(
        ("length", "message"),
        [
            (torch.tensor([4000, 0, 1]), "length must be from 1 to the 4000 samples of a clip, row 1 has 0"),
            (torch.tensor([4000, 1, -3]), "row 2 has -3"),
            (torch.tensor([4001, 1, 1]), "row 0 has 4001"),
            (torch.tensor([4000, 1]), r"length must be integers of shape \(3,\), one for each clip, got .* \(2,\)"),
            (
                torch.tensor([1.0, 2.0, 3.0]),
                r"length must be integers of shape \(3,\), one for each clip, got .*float32",
            ),
        ],
        ids=["zero", "negative", "too-long", "shape", "type"],
    )
    def test_lengths_that_make_no_sense(self, length: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RAW(noise(3, 4000), length)

    @pytest.mark.parametrize("waveform", [torch.zeros(4000), torch.zeros(1, 0), torch.zeros(1, 9, dtype=torch.int16)])
    def test_waveforms_of_another_shape(self, waveform: Tensor) -> None:
        with pytest.raises(ValueError, match=r"waveform (must be floating point|has 0 samples)"):
            RAW(waveform)

    def test_it_remembers_how_it_was_built(self) -> None:
        quality = AudioQuality(8000, "mean-psd", "raw", [50, 2000], percentiles=[1, 99])  # type: ignore[arg-type]
        spec = json.loads(json.dumps(describe(quality)))
        assert spec["class_path"] == "respiro.transforms.AudioQuality"
        clip = noise(2, 4000)
        assert torch.equal(build(spec, Transform, "quality")(clip), quality(clip))  # type: ignore[operator]

    @pytest.mark.parametrize(
        "change", [{"alpha": 0.5}, {"beta": 0.1}, {"rms": "raw"}, {"percentiles": (1, 99)}, {"n_fft": 512}]
    )
    def test_what_does_not_shape_the_measures(self, change: dict[str, Any]) -> None:
        spec = AudioQuality(**change).measure_spec()
        assert spec == AudioQuality().measure_spec()
        assert torch.equal(AudioQuality(**change).measure(noise(1, 4000)), AudioQuality().measure(noise(1, 4000)))
        assert json.loads(json.dumps(spec)) == spec

    @pytest.mark.parametrize(
        "change",
        [
            {"sample_rate": 8000},
            {"entropy": "mean-psd"},
            {"band": (50, 2000)},
            {"window": 0.02},
            {"hop": 0.02},
            {"n_fft": 1024},
            {"silence": 0.1},
        ],
        ids=lambda change: "-".join(change),
    )
    def test_what_shapes_the_measures(self, change: dict[str, Any]) -> None:
        clip = noise(1, 4000).cumsum(1) * 0.1
        assert AudioQuality(**change).measure_spec() != AudioQuality().measure_spec()
        assert not torch.equal(AudioQuality(**change).measure(clip), AudioQuality().measure(clip))
