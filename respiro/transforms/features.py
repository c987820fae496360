"""Log-mel features: waveforms ``(B, S)`` to spectrograms ``(B, T, F)``, batched, differentiable, on any device.

Both front ends compute in float32 even under autocast (float64 stays float64), because the logarithm of a power needs
the range. What they hold is derived from their arguments and is not part of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from respiro.component import Transform
from respiro.errors import check_choice
from respiro.transforms._checks import check_positive, check_waveform, full_precision

__all__ = ["KaldiFbank", "LogMelSpectrogram"]

Normalize = Literal["clip_minmax", "batch_minmax", "none", "standard"]

_PREEMPHASIS = 0.97
_KALDI_FLOOR = torch.finfo(torch.float32).eps
_POWER_FLOOR = 1e-10
_CPU_FRAMES = 1024  # frames worked on at a time on a CPU: what stays in its cache is several times faster
_BAND = 16  # filters multiplied at a time, with the few frequency bins that they weigh


class KaldiFbank(Transform):
    """Kaldi's log-mel filter bank, normalised as the Audio Spectrogram Transformer expects it.

    Frames without padding, each freed of its mean, pre-emphasised (0.97), windowed (symmetric Hann) and transformed to
    a power spectrum; triangular filters equidistant on ``1127 ln(1 + f / 700)``; natural logarithm, floored at
    1.19e-7; then ``(x - mean) / (2 std)``. Silence gives a constant, a filter narrower than a frequency bin too.
    The output equals ``torchaudio.compliance.kaldi.fbank(..., window_type="hanning", dither=0)`` on each clip.

    Args:
        sample_rate: Sampling rate of the waveform in Hz.
        num_mel_bins: Number of filters.
        mean: Mean of the log-mel values; AudioSet's by default. ``None`` leaves the raw log-mel values.
        std: Standard deviation of the log-mel values; unused without a mean.
        f_min: Lower edge of the first filter in Hz.
        f_max: Upper edge of the last filter in Hz; half the sampling rate by default.
        frame_length: Length of a frame in milliseconds.
        frame_shift: Step from frame to frame in milliseconds.

    Shape:
        waveform ``(B, S)``; returns ``(B, T, num_mel_bins)`` with ``T = 1 + (S - frame) // shift`` in samples.

    Raises:
        ValueError: If the band does not fit the sampling rate, or a clip is shorter than one frame.

    Source:
        Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021; Povey et al., "The Kaldi speech
        recognition toolkit", ASRU 2011.

    Example:
        >>> KaldiFbank()(torch.zeros(2, 16000)).shape
        torch.Size([2, 98, 128])
    """

    _window: Tensor
    _filters: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        num_mel_bins: int = 128,
        mean: float | None = -4.2677393,
        std: float = 4.5689974,
        f_min: float = 20.0,
        f_max: float | None = None,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
    ) -> None:
        super().__init__()
        f_max = sample_rate / 2 if f_max is None else f_max
        _check_band(f_min, f_max, sample_rate)
        check_positive(num_mel_bins=num_mel_bins, std=std)
        self.sample_rate = sample_rate
        self.num_features = num_mel_bins
        self.mean = mean
        self.std = std
        self.frame = int(sample_rate * frame_length / 1000)
        self.shift = int(sample_rate * frame_shift / 1000)
        if self.frame < 2 or self.shift < 1:
            raise ValueError(
                f"frame_length {frame_length!r} ms and frame_shift {frame_shift!r} ms make a frame of {self.frame} "
                f"samples and a shift of {self.shift} at {sample_rate} Hz; at least 2 and 1 are needed"
            )
        self.n_fft = 1 << (self.frame - 1).bit_length()
        filters = _kaldi_filters(num_mel_bins, self.n_fft, sample_rate, f_min, f_max)
        self._bands = _bands(filters)
        # The window is 0 at its first sample, which is left out; zeros then extend it to the transform's length.
        window = pad(torch.hann_window(self.frame, periodic=False)[1:], (0, self.n_fft - self.frame + 1))
        self.register_buffer("_window", window, persistent=False)
        self.register_buffer("_filters", torch.from_numpy(filters).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the normalised log-mel spectrogram ``(B, T, F)``."""
        check_waveform(waveform, self.frame, f"one frame of {self.frame} samples")
        with torch.autocast(waveform.device.type, enabled=False):
            frames = 1 + (waveform.shape[1] - self.frame) // self.shift
            logmel = _clip_by_clip(self._log_mel, full_precision(waveform), frames)
        return logmel.to(waveform.dtype)

    def _log_mel(self, waveform: Tensor) -> Tensor:
        # As the first sample is left out, its special pre-emphasis never counts, and the whole clip can be filtered at
        # once; taking the mean m out of a frame then takes m - 0.97 m out of it. In place: memory is what costs here.
        emphasised = torch.sub(waveform[:, 1:], waveform[:, :-1], alpha=_PREEMPHASIS)
        frames = pad(emphasised, (0, self.n_fft - self.frame + 1)).unfold(1, self.n_fft, self.shift)
        means = waveform.unfold(1, self.frame, self.shift).mean(-1, keepdim=True)
        frames = (frames - (1 - _PREEMPHASIS) * means).mul_(self._window.to(waveform.dtype))
        logmel = _mel(_power(torch.fft.rfft(frames)), self._filters, self._bands).clamp_(min=_KALDI_FLOOR).log_()
        return logmel if self.mean is None else logmel.sub_(self.mean).div_(2 * self.std)


class LogMelSpectrogram(Transform):
    """Log-mel spectrogram in dB, normalised; the front end of the PANNs family.

    Short-time Fourier transform (periodic Hann, centred, reflected at the ends), mel filters on the power, and
    ``10 log10`` with a floor of 1e-10. The defaults are those of Moummad and Farrugia (2022), except for the
    normalisation: theirs is ``"batch_minmax"``, by which a clip's features depend on the clips beside it.
    PANNs (Kong et al., 2020) are ``LogMelSpectrogram(32000, 1024, 320, 64, 50, 14000, "slaney", "slaney", "none")``.

    Args:
        sample_rate: Sampling rate of the waveform in Hz.
        n_fft: Samples per window.
        hop_length: Samples from window to window.
        n_mels: Number of filters.
        f_min: Lower edge of the first filter in Hz.
        f_max: Upper edge of the last filter in Hz.
        mel_scale: Mel scale, ``"htk"`` or ``"slaney"``.
        norm: ``"slaney"`` gives every filter the same area, ``None`` the same height.
        normalize: ``"clip_minmax"`` scales each clip to [0, 1] by itself, ``"batch_minmax"`` the batch as a whole;
            both are then standardised. ``"standard"`` standardises the dB values, ``"none"`` leaves them. A clip (or
            batch) of one constant value is scaled to 0.
        mean: Mean that standardisation subtracts.
        std: Standard deviation it divides by.

    Shape:
        waveform ``(B, S)``; returns ``(B, T, n_mels)`` with ``T = 1 + S // hop_length``.

    Raises:
        ValueError: If an option is unknown, the band does not fit the sampling rate, or a clip has too few samples to
            be reflected (``n_fft // 2 + 1``).

    Example:
        >>> LogMelSpectrogram()(torch.zeros(2, 128000)).shape
        torch.Size([2, 251, 64])
    """

    _window: Tensor
    _filters: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 512,
        n_mels: int = 64,
        f_min: float = 50.0,
        f_max: float = 2000.0,
        mel_scale: Literal["htk", "slaney"] = "htk",
        norm: Literal["slaney"] | None = None,
        normalize: Normalize = "clip_minmax",
        mean: float = 0.3690,
        std: float = 0.0255,
    ) -> None:
        super().__init__()
        _check_band(f_min, f_max, sample_rate)
        check_positive(n_fft=n_fft, hop_length=hop_length, n_mels=n_mels, std=std)
        check_choice("mel_scale", mel_scale, ("htk", "slaney"))
        check_choice("norm", norm, ("slaney", None))
        check_choice("normalize", normalize, get_args(Normalize))
        from librosa.filters import mel

        self.sample_rate = sample_rate
        self.num_features = n_mels
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.normalize = normalize
        self.mean = mean
        self.std = std
        filters = mel(
            sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max, htk=mel_scale == "htk", norm=norm
        )
        self._bands = _bands(filters.T)
        self.register_buffer("_window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("_filters", torch.from_numpy(filters.T.copy()).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the normalised log-mel spectrogram ``(B, T, F)``."""
        check_waveform(waveform, self.n_fft // 2 + 1, f"a reflected window of {self.n_fft} samples")
        with torch.autocast(waveform.device.type, enabled=False):
            frames = 1 + waveform.shape[1] // self.hop_length
            decibels = _clip_by_clip(self._decibels, full_precision(waveform), frames)
            return self._normalise(decibels).to(waveform.dtype)

    def _decibels(self, waveform: Tensor) -> Tensor:
        window = self._window.to(waveform.dtype)
        spectrum = torch.stft(
            waveform, self.n_fft, self.hop_length, window=window, pad_mode="reflect", return_complex=True
        )
        energies = _mel(_power(spectrum.transpose(1, 2)), self._filters, self._bands)
        return energies.clamp_(min=_POWER_FLOOR).log10_().mul_(10)

    def _normalise(self, decibels: Tensor) -> Tensor:
        if self.normalize == "none":
            return decibels
        if self.normalize != "standard":
            over = (1, 2) if self.normalize == "clip_minmax" else (0, 1, 2)
            low, high = decibels.amin(over, keepdim=True), decibels.amax(over, keepdim=True)
            decibels = (decibels - low) / (high - low).clamp(min=torch.finfo(decibels.dtype).eps)
        return (decibels - self.mean) / self.std


def _kaldi_filters(num_mel_bins: int, n_fft: int, sample_rate: int, f_min: float, f_max: float) -> np.ndarray:
    """Return Kaldi's triangles, straight on the mel scale, as a matrix ``(n_fft // 2 + 1, num_mel_bins)``."""

    def mel(hertz: float | np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz, dtype=np.float64) / 700.0)

    edges = np.linspace(mel(f_min), mel(f_max), num_mel_bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(n_fft // 2 + 1) * sample_rate / n_fft)[:, None]
    filters: np.ndarray = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(min=0.0)
    filters[-1] = 0.0  # Kaldi leaves the bin at half the sampling rate out
    return filters


def _bands(filters: np.ndarray) -> list[tuple[int, int]]:
    """Return the range of frequency bins that each ``_BAND`` neighbouring filters weigh."""
    bands = []
    for first in range(0, filters.shape[1], _BAND):
        used = np.flatnonzero(filters[:, first : first + _BAND].any(axis=1))
        bands.append((int(used[0]), int(used[-1]) + 1) if used.size else (0, 1))
    return bands


def _mel(power: Tensor, filters: Tensor, bands: list[tuple[int, int]]) -> Tensor:
    """Return ``power @ filters``, without most of the zeros of the triangular filters."""
    blocks = zip(bands, torch.split(filters.to(power.dtype), _BAND, dim=1), strict=True)
    return torch.cat([power[..., low:high] @ block[low:high] for (low, high), block in blocks], dim=-1)


def _clip_by_clip(compute: Callable[[Tensor], Tensor], waveform: Tensor, frames: int) -> Tensor:
    """Apply *compute* to the batch; on a CPU to as many clips at a time as its cache holds, in parallel."""
    if waveform.device.type != "cpu" or torch.compiler.is_compiling():  # a compiled graph is to take any batch size
        return compute(waveform)
    parts = torch.split(waveform, max(1, _CPU_FRAMES // frames))
    threads = torch.get_num_threads()
    if min(threads, len(parts)) == 1 or (waveform.requires_grad and torch.is_grad_enabled()):  # autograd is per thread
        return torch.cat([compute(clips) for clips in parts])
    # Threads that each do whole clips wait for each other once, not in every operation, so these use one thread each.
    try:
        with ThreadPoolExecutor(min(threads, len(parts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(compute, parts)))
    finally:
        torch.set_num_threads(threads)  # the caller kept its number; this is for threads still to be started


def _power(spectrum: Tensor) -> Tensor:
    # Much faster than abs() ** 2 or a sum over the last dimension, and its gradient is finite at 0.
    parts = torch.view_as_real(spectrum).square_()
    return parts[..., 0] + parts[..., 1]


def _check_band(f_min: float, f_max: float, sample_rate: int) -> None:
    if not 0 <= f_min < f_max <= sample_rate / 2:
        raise ValueError(
            f"f_min and f_max must satisfy 0 <= f_min < f_max <= {sample_rate / 2:g} Hz, half of the sampling rate; "
            f"got {f_min!r} and {f_max!r}"
        )
