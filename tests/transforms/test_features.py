from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.component import Transform, build, describe
from respiro.transforms import KaldiFbank, LogMelSpectrogram

FEATURES = [
    pytest.param(KaldiFbank(), (2, 98, 128), id="kaldi"),
    pytest.param(LogMelSpectrogram(), (2, 32, 64), id="clip-minmax"),
    pytest.param(LogMelSpectrogram(normalize="none"), (2, 32, 64), id="decibels"),
    pytest.param(LogMelSpectrogram(normalize="standard"), (2, 32, 64), id="standard"),
]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.1


@pytest.mark.parametrize("signal", ["noise5s", "dcnoise1s", "impulse1s"])
def test_kaldi_gives_the_reference_log_mel(golden: Path, signal: str) -> None:
    expected = np.load(golden / "patchmix" / "fbank.npz")
    raw = KaldiFbank(mean=None)(torch.from_numpy(expected[f"{signal}_wav"])[None])[0]
    np.testing.assert_allclose(raw, expected[f"{signal}_raw"], rtol=0, atol=2e-2)


def test_kaldi_normalises_as_the_reference(golden: Path) -> None:
    expected = np.load(golden / "patchmix" / "fbank.npz")
    normalised = KaldiFbank()(torch.from_numpy(expected["dcnoise1s_wav"])[None])[0]
    np.testing.assert_allclose(normalised, expected["dcnoise1s_norm"], rtol=0, atol=2e-3)


def test_kaldi_gives_the_reference_features_of_a_padded_cycle(shared: Callable[[str], Path]) -> None:
    expected = np.load(shared("golden/patchmix") / "preprocess.npz")
    row = list(expected["r44100_repeat_cycles"]).index(expected["r44100_fbank_cycles"][0])
    features = KaldiFbank()(torch.from_numpy(expected["r44100_repeat"])[row : row + 1])
    np.testing.assert_allclose(features, expected["r44100_fbank"], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("rate", "bins", "band", "frame"),
    [
        (16000, 128, (20.0, 8000.0), (25.0, 10.0)),
        (4000, 64, (50.0, 2000.0), (32.0, 16.0)),
        (44100, 40, (0.0, 9e3), (20.0, 7.0)),
    ],
    ids=["ast", "4kHz", "44.1kHz"],
)
def test_kaldi_equals_torchaudio_on_each_clip(
    rate: int, bins: int, band: tuple[float, float], frame: tuple[float, float]
) -> None:
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    waveform = noise(3, rate) + 0.2
    oracle = partial(kaldi.fbank, sample_frequency=rate, dither=0.0, window_type="hanning", num_mel_bins=bins)
    oracle = partial(oracle, low_freq=band[0], high_freq=band[1], frame_length=frame[0], frame_shift=frame[1])
    clips = [oracle(clip[None]) for clip in waveform]
    features = KaldiFbank(rate, bins, None, f_min=band[0], f_max=band[1], frame_length=frame[0], frame_shift=frame[1])
    torch.testing.assert_close(features(waveform), torch.stack(clips), rtol=0, atol=2e-2)


def test_kaldi_of_silence_is_the_floor() -> None:
    assert KaldiFbank()(torch.zeros(1, 400)).unique().item() == pytest.approx(-1.2775939, abs=1e-6)


@pytest.mark.parametrize(
    ("normalize", "field"),
    [("none", "db"), ("batch_minmax", "standardized"), ("clip_minmax", "standardized_each_alone")],
)
def test_log_mel_gives_the_reference_features(golden: Path, normalize: Any, field: str) -> None:
    expected = np.load(golden / "scl" / "frontend.npz")
    waveform = torch.from_numpy(expected["wave_int16"]) / 32768
    features = LogMelSpectrogram(normalize=normalize)(waveform)
    np.testing.assert_allclose(features, expected[field][:, 0].swapaxes(1, 2), rtol=0, atol=2e-3)


def test_log_mel_gives_the_front_end_of_panns(golden: Path) -> None:
    expected = np.load(golden / "scl" / "panns_frontend.npz")
    features = LogMelSpectrogram(32000, 1024, 320, 64, 50.0, 14000.0, "slaney", "slaney", "none")(
        torch.from_numpy(expected["wave_int16"]) / 32768
    )
    np.testing.assert_allclose(features, expected["logmel"][:, 0], rtol=0, atol=2e-3)


def test_standard_normalisation_is_affine() -> None:
    decibels = LogMelSpectrogram(normalize="none")(noise(2, 16000))
    standard = LogMelSpectrogram(normalize="standard", mean=-20.0, std=8.0)(noise(2, 16000))
    torch.testing.assert_close(standard, (decibels + 20) / 8)


@pytest.mark.parametrize("normalize", ["clip_minmax", "batch_minmax"])
def test_constant_input_stays_finite(normalize: Any) -> None:
    features = LogMelSpectrogram(normalize=normalize)(torch.zeros(2, 16000))
    torch.testing.assert_close(features, torch.full_like(features, -0.3690 / 0.0255))


def test_only_the_batch_normalisation_depends_on_the_other_clips() -> None:
    waveform = noise(2, 16000) * torch.tensor([[1.0], [0.01]])
    alone = LogMelSpectrogram(normalize="batch_minmax")(waveform[:1])
    assert not torch.allclose(LogMelSpectrogram(normalize="batch_minmax")(waveform)[:1], alone, atol=0.1)
    torch.testing.assert_close(LogMelSpectrogram()(waveform)[:1], alone)


@pytest.mark.parametrize(("features", "shape"), FEATURES)
class TestEveryFrontEnd:
    def test_shape_and_type(self, features: Any, shape: tuple[int, ...]) -> None:
        out = features(noise(2, 16000))
        assert out.shape == shape
        assert out.dtype == torch.float32
        assert features.num_features == shape[2]
        assert features.sample_rate == 16000

    @pytest.mark.parametrize("clips", [1, 5, 23], ids=["one", "few", "many"])
    def test_a_batch_equals_its_clips(self, features: Any, shape: tuple[int, ...], clips: int) -> None:
        waveform = noise(clips, 9000)
        each = torch.cat([features(clip[None]) for clip in waveform])
        torch.testing.assert_close(features(waveform), each, rtol=0, atol=1e-4)

    def test_threads_change_neither_the_values_nor_the_settings(self, features: Any, shape: tuple[int, ...]) -> None:
        waveform, before = noise(23, 9000), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            serial = features(waveform)
            torch.set_num_threads(3)
            with torch.inference_mode():
                parallel = features(waveform)
            with ThreadPoolExecutor(1) as pool:
                assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 3
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(parallel, serial, rtol=0, atol=1e-4)
        differentiable = features(waveform.requires_grad_())
        assert differentiable.requires_grad
        torch.testing.assert_close(differentiable, serial, rtol=0, atol=1e-4)
        with torch.no_grad():
            assert not features(waveform).requires_grad

    def test_input_is_not_changed(self, features: Any, shape: tuple[int, ...]) -> None:
        waveform = noise(2, 16000)
        features(waveform)
        torch.testing.assert_close(waveform, noise(2, 16000), rtol=0, atol=0)

    def test_computes_in_float32_under_autocast(self, features: Any, shape: tuple[int, ...]) -> None:
        waveform = noise(2, 16000)
        with torch.autocast("cpu", torch.bfloat16):
            out = features(waveform)
        assert torch.equal(out, features(waveform))

    def test_keeps_float64(self, features: Any, shape: tuple[int, ...]) -> None:
        out = features(noise(2, 16000).double())
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), features(noise(2, 16000)), rtol=0, atol=2e-3)

    def test_takes_half_precision(self, features: Any, shape: tuple[int, ...]) -> None:
        out = features(noise(2, 16000).bfloat16())
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()

    def test_does_not_depend_on_strides(self, features: Any, shape: tuple[int, ...]) -> None:
        waveform = noise(2, 16000)
        torch.testing.assert_close(features(waveform.T.contiguous().T), features(waveform), rtol=0, atol=1e-4)

    def test_gradient_reaches_the_waveform_even_in_silence(self, features: Any, shape: tuple[int, ...]) -> None:
        waveform = torch.cat([noise(1, 16000), torch.zeros(1, 16000)]).requires_grad_()
        features(waveform).sum().backward()
        assert waveform.grad is not None
        assert waveform.grad.isfinite().all()

    def test_describe_build_round_trip(self, features: Any, shape: tuple[int, ...]) -> None:
        again = build(describe(features), Transform, "features")
        assert torch.equal(again(noise(2, 16000)), features(noise(2, 16000)))

    def test_exports_with_any_batch_size(self, features: Any, shape: tuple[int, ...]) -> None:
        batch = torch.export.Dim("batch")
        exported = torch.export.export(features, (noise(2, 9000),), dynamic_shapes={"waveform": {0: batch}}).module()
        torch.testing.assert_close(exported(noise(5, 9000)), features(noise(5, 9000)), rtol=0, atol=1e-4)

    def test_state_dict_is_empty(self, features: Any, shape: tuple[int, ...]) -> None:
        assert features.state_dict() == {}

    @pytest.mark.parametrize(
        "waveform",
        [noise(16000), noise(1, 1, 16000), torch.zeros(1, 16000, dtype=torch.int16)],
        ids=["1d", "3d", "int"],
    )
    def test_refuses_other_tensors(self, features: Any, shape: tuple[int, ...], waveform: Tensor) -> None:
        with pytest.raises(ValueError, match=r"waveform must be floating point of shape \(B, S\), got torch"):
            features(waveform)


@pytest.mark.parametrize(
    "features",
    [
        KaldiFbank(4000, num_mel_bins=4, f_min=100.0, frame_length=8.0, frame_shift=4.0),
        LogMelSpectrogram(4000, n_fft=32, hop_length=16, n_mels=4, normalize="none"),
        LogMelSpectrogram(4000, n_fft=32, hop_length=16, n_mels=4),
        LogMelSpectrogram(4000, n_fft=32, hop_length=16, n_mels=4, normalize="batch_minmax"),
    ],
    ids=["kaldi", "decibels", "clip-minmax", "batch-minmax"],
)
def test_gradient_is_right(features: Transform) -> None:
    waveform = (noise(2, 50, dtype=torch.float64) * 10).requires_grad_()
    assert torch.autograd.gradcheck(features, (waveform,), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    ("features", "samples"), [(KaldiFbank(), 400), (LogMelSpectrogram(), 513)], ids=["kaldi", "log-mel"]
)
def test_short_clips_name_the_samples_they_need(features: Transform, samples: int) -> None:
    assert features(noise(1, samples)).isfinite().all()
    with pytest.raises(ValueError, match=f"waveform has {samples - 1} samples, but .* needs at least {samples}"):
        features(noise(1, samples - 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogMelSpectrogram(sample_rate=4000, f_max=2001.0), "f_max <= 2000 Hz, half of the sampling rate"),
        (lambda: KaldiFbank(f_max=9000.0), "f_max <= 8000 Hz, half of the sampling rate"),
        (lambda: KaldiFbank(f_min=500.0, f_max=400.0), r"f_min < f_max .* got 500.0 and 400.0"),
        (lambda: KaldiFbank(frame_shift=0.0), "shift of 0 at 16000 Hz"),
        (lambda: LogMelSpectrogram(normalize="max"), "normalize must be one of 'clip_minmax', .*, got 'max'"),
        (lambda: LogMelSpectrogram(mel_scale="bark"), "mel_scale must be one of 'htk', 'slaney', got 'bark'"),
        (lambda: LogMelSpectrogram(norm="htk"), "norm must be one of 'slaney', None, got 'htk'"),
        (lambda: LogMelSpectrogram(std=0.0), "std must be positive, got 0.0"),
        (lambda: LogMelSpectrogram(hop_length=0), "hop_length must be positive, got 0"),
        (lambda: KaldiFbank(num_mel_bins=0), "num_mel_bins must be positive, got 0"),
    ],
    ids=["nyquist-log-mel", "nyquist-kaldi", "band", "shift", "normalize", "scale", "norm", "std", "hop", "bins"],
)
def test_bad_arguments(make: Callable[[], Transform], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("front_end", [KaldiFbank, LogMelSpectrogram])
def test_a_cast_leaves_the_constants_as_they_were(front_end: type[Transform], dtype: torch.dtype) -> None:
    """A trainer casts the whole model (``bf16-true``); filters of a few digits would be other filters."""
    waveform = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    cast = front_end().to(dtype)
    assert torch.equal(cast(waveform), front_end()(waveform))
