"""How good a recording is, from its signal alone: the audio quality score of QLung."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from respiro.component import Spec, Transform, class_path, plain
from respiro.errors import check_choice
from respiro.transforms._checks import check_floating, check_positive, check_waveform, full_precision
from respiro.transforms.features import _clip_by_clip, _power

__all__ = ["AudioQuality"]

Entropy = Literal["frame-mean", "mean-psd"]
Loudness = Literal["train-percentile", "raw"]

_SHORTEST_FFT = 512


class AudioQuality(Transform):
    """Audio quality score: high for a strong recording of a clear spectrum, low for a weak or a noise-like one.

    ``AQS = clip(1 - alpha H + beta R, 0, 1)`` with the normalised spectral entropy ``H`` and the normalised root mean
    square ``R`` of a clip. Both are measured on the raw clip, before it is faded, padded or augmented
    (:meth:`measure`), and then weighed (:meth:`score`); the call does both. Under ``rms="train-percentile"`` the range
    of the RMS must be known first (:meth:`fit`); it is kept in the state dict. No gradient flows through the measures.

    A frame is silent if its windowed RMS ``sqrt(mean (x w)^2)`` is below *silence*, or the band holds no power. A clip
    without another frame has ``H = 1``: digital silence, and a clip so short that the window, centred in its frame,
    does not reach it, such as one sample. A constant clip has the entropy of the window's own spectrum. What follows
    the last whole frame, less than a hop, counts for the RMS only. Above the gate a gain does not change ``H``.
    Computed in float32 whatever the module is cast to and even under autocast; a float64 waveform in float64.

    The published definition leaves *entropy*, *band*, the framing, *silence* and *rms* open. They change values and
    ranking, so name them beside every score.

    Args:
        sample_rate: Sampling rate of the waveform in Hz.
        entropy: ``"frame-mean"``: mean over frames of ``-sum p ln p / ln K``, p the power of a frame's K bins divided
            by their sum. ``"mean-psd"``: the same of the mean power spectrum of the frames, in which loud ones weigh
            more.
        rms: ``"train-percentile"``: ``R = (rms - p5) / (p95 - p5)`` clipped to [0, 1], with *percentiles* of the train
            side; if both are equal, 0 up to them and 1 above. ``"raw"``: ``R = min(rms, 1)``.
        band: Lowest and highest frequency in Hz of the bins that count for the entropy, both included; default all.
        alpha: Weight of the entropy.
        beta: Weight of the RMS.
        percentiles: Which percentiles of the RMS of train clips become 0 and 1.
        window: Length of the periodic Hann window in seconds.
        hop: Step from frame to frame in seconds.
        n_fft: Samples that the window is zero-padded to, half on either side. Default 512, or the next power of two
            that holds the window. Frames do not reach beyond the clip; a clip shorter than one is padded with zeros
            at its end.
        silence: Windowed RMS below which a frame is silent; 1e-5 is -100 dB of full scale.

    Attributes:
        rms_range: The two percentiles of the RMS ``(2,)`` float32, NaN before :meth:`fit`.

    Shape:
        waveform ``(B, S)``, length ``(B,)`` int64 or ``None``; returns ``(B,)``.

    Raises:
        ValueError: If an argument has no meaning.

    Source:
        Kim et al., "Quality adaptive angular margin learning for respiratory sound classification", Interspeech 2026,
        arXiv 2606.11915, equation 2.

    Example:
        >>> quality = AudioQuality(rms="raw")
        >>> tone = 0.5 * torch.sin(2 * torch.pi * 200 * torch.arange(16000) / 16000)
        >>> noise = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
        >>> quality(torch.stack([tone, noise, torch.zeros(16000)]))
        tensor([0.9658, 0.3832, 0.3000])
    """

    rms_range: Tensor
    _window: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        entropy: Entropy = "frame-mean",
        rms: Loudness = "train-percentile",
        band: tuple[float, float] | None = None,
        alpha: float = 0.7,
        beta: float = 0.3,
        percentiles: tuple[float, float] = (5.0, 95.0),
        window: float = 0.025,
        hop: float = 0.010,
        n_fft: int | None = None,
        silence: float = 1e-5,
    ) -> None:
        super().__init__()
        check_positive(sample_rate=sample_rate)
        check_choice("entropy", entropy, get_args(Entropy))
        check_choice("rms", rms, get_args(Loudness))
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not math.isfinite(weight):
                raise ValueError(f"{name} must be a finite number, got {weight!r}")
        if not 0 <= silence < math.inf:
            raise ValueError(f"silence must be an RMS of at least 0, got {silence!r}")
        if not (_is_pair(percentiles) and 0 <= percentiles[0] < percentiles[1] <= 100):
            raise ValueError(f"percentiles must be (low, high) with 0 <= low < high <= 100, got {percentiles!r}")
        self.sample_rate = sample_rate
        self.entropy = entropy
        self.rms = rms
        self.alpha = alpha
        self.beta = beta
        self.percentiles = tuple(percentiles)
        self.silence = silence
        self.win_length, self.hop_length = _framing(window, hop, sample_rate)
        self.n_fft = max(_SHORTEST_FFT, 1 << (self.win_length - 1).bit_length()) if n_fft is None else n_fft
        if not isinstance(self.n_fft, int) or self.n_fft < self.win_length:
            raise ValueError(f"n_fft must be a whole number, at least the window's {self.win_length}, got {n_fft!r}")
        self._bins = _bins_of(band, self.n_fft, sample_rate)
        before = (self.n_fft - self.win_length) // 2
        hann = torch.hann_window(self.win_length, dtype=torch.float64)
        # Kept on the CPU: float64 waveforms are for checks, and some devices have no float64.
        self._exact_window = pad(hann, (before, self.n_fft - self.win_length - before))
        self.register_buffer("_window", self._exact_window.float(), persistent=False)
        self.register_buffer("rms_range", torch.full((2,), math.nan, dtype=torch.float32))
        self._fitted = False  # known here too, because a look at a buffer on a GPU would wait for all that is under way

    def forward(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """Return the score ``(B,)`` of each clip, in [0, 1]; see :meth:`measure` and :meth:`score`."""
        return self.score(self.measure(waveform, length))

    @torch.no_grad()
    def measure(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """Return entropy ``H`` in [0, 1] and RMS of each clip ``(B, 2)``; float32, or float64 of float64.

        Args:
            waveform: Clips ``(B, S)``.
            length: Samples of each clip, 1 to S, that count ``(B,)``; default all. A clip measures as it does alone.

        Raises:
            ValueError: If a shape does not fit or, on a CPU, where a look costs no waiting, a length is not from 1 to S
                or a sample that counts is not finite. Elsewhere the RMS of such a clip is NaN.
        """
        check_waveform(waveform, 1, "a measure")
        with torch.autocast(waveform.device.type, enabled=False):
            x = full_precision(waveform)
            if length is None:
                length = torch.full((len(x),), x.shape[1], device=x.device)
            else:
                length = _checked_length(length, x).to(x.device)
                x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= length[:, None], 0.0)
            if not len(x):
                return x.new_zeros(0, 2)
            peak = _checked_peak(x)
            x = x / peak.where(peak > 0, 1.0)[:, None]  # so that no square leaves the range of the number type
            rms = peak * (x.square().sum(1) / length).sqrt()
            if x.shape[1] < self.n_fft:
                x = pad(x, (0, self.n_fft - x.shape[1]))
            frames = 1 + (x.shape[1] - self.n_fft) // self.hop_length
            clips = torch.arange(len(x), device=x.device)
            entropy = _clip_by_clip(lambda some: self._entropy(x[some], peak[some], length[some]), clips, frames)
            return torch.stack([entropy, rms], dim=1)

    def fit(self, rms: Tensor) -> None:
        """Take the range of the RMS from that of the train clips ``(N,)``, linearly between neighbours.

        Raises:
            ValueError: If there is no clip, or an RMS is negative or not finite.
        """
        if rms.ndim != 1 or not len(rms) or not (rms.isfinite() & (rms >= 0)).all():
            raise ValueError(f"rms must hold the RMS of at least one clip, none negative or not finite, got {rms!r}")
        shares = torch.tensor(self.percentiles, dtype=torch.float64) / 100
        self.rms_range.copy_(torch.quantile(rms.detach().cpu().double(), shares))
        self._fitted = True

    def score(self, measures: Tensor) -> Tensor:
        """Return the score ``(B,)`` of measures ``(B, 2)``.

        Raises:
            RuntimeError: If the range of the RMS is asked for and not known.
            ValueError: If the shape does not fit.
        """
        check_floating("measures", "(B, 2)", measures)
        if measures.shape[1] != 2:
            raise ValueError(f"measures must have shape (B, 2), entropy and RMS, got {tuple(measures.shape)}")
        if self.rms == "train-percentile" and not self._fitted:
            raise RuntimeError(
                "the range of the RMS is not known: call fit with the RMS of the train clips (add_quality of a data "
                "set or datamodule does), load a state dict that has it, or use rms='raw'"
            )
        entropy, rms = full_precision(measures).unbind(1)
        return (1 - self.alpha * entropy + self.beta * self._loudness(rms)).clamp(0, 1)

    def measure_spec(self) -> Spec:
        """Return what shapes the measures, as plain data: not the weights, the percentiles and the choice of *rms*."""
        kept = {name: self.init_args[name] for name in ("sample_rate", "entropy", "band", "window", "hop", "silence")}
        values: dict[str, Any] = plain({**kept, "n_fft": self.n_fft}, type(self).__name__)
        return {"class_path": class_path(type(self)), "init_args": values}

    def _loudness(self, rms: Tensor) -> Tensor:
        """Return ``R`` ``(B,)``."""
        if self.rms == "raw":
            return rms.clamp(max=1)
        low, high = self.rms_range.to(rms).unbind()
        scaled = ((rms - low) / (high - low)).clamp(0, 1)
        return torch.where(high > low, scaled, (rms > low).to(rms.dtype))

    def _entropy(self, x: Tensor, peak: Tensor, length: Tensor) -> Tensor:
        """Return ``H`` ``(B,)`` of clips ``(B, S)`` that are divided by their *peak*."""
        window = self._window if x.dtype == torch.float32 else self._exact_window
        frames = x.unfold(1, self.n_fft, self.hop_length) * window.to(x.device, x.dtype)
        power = _power(torch.fft.rfft(frames))
        # Parseval: the other half of the spectrum mirrors this one, except for its ends.
        ends = power[..., 0] + (power[..., -1] if self.n_fft % 2 == 0 else 0.0)
        total = power.sum(-1)
        energy = (2 * total - ends) / self.n_fft
        loud = peak[:, None] * (energy / self.win_length).sqrt() >= self.silence
        power = power[..., self._bins]
        start = torch.arange(power.shape[1], device=x.device) * self.hop_length
        inside = start + self.n_fft <= length.clamp(min=self.n_fft)[:, None]
        active = loud & inside & (power.sum(-1) > 0)
        count = active.sum(1)
        if self.entropy == "mean-psd":
            # Of the sum, as a factor does not matter.
            entropy = _entropy_of((power * active[..., None]).sum(1))
        else:
            entropy = torch.where(active, _entropy_of(power), 0.0).sum(1) / count
        return torch.where(count > 0, entropy, 1.0).clamp(0, 1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = bool(self.rms_range.isfinite().all())


def _entropy_of(power: Tensor) -> Tensor:
    """Return ``-sum p ln p / ln K`` over the last dimension, NaN where there is no power."""
    share = power / power.sum(-1, keepdim=True)
    logarithm = share.clamp(min=torch.finfo(share.dtype).tiny).log_()  # several times as fast as xlogy
    return logarithm.mul_(share).sum(-1) / -math.log(share.shape[-1])


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _framing(window: float, hop: float, sample_rate: int) -> tuple[int, int]:
    """Return window and hop in samples."""
    check_positive(window=window, hop=hop)
    if not all(map(math.isfinite, (window, hop, sample_rate))):
        raise ValueError(
            f"window, hop and sample_rate must be finite, got {window!r} and {hop!r} seconds and {sample_rate!r} Hz"
        )
    samples = round(window * sample_rate), round(hop * sample_rate)
    if samples[0] < 2 or samples[1] < 1:
        raise ValueError(
            f"window {window!r} s and hop {hop!r} s make a window of {samples[0]} samples and a hop of {samples[1]} at "
            f"{sample_rate} Hz; at least 2 and 1 are needed"
        )
    return samples


def _bins_of(band: tuple[float, float] | None, n_fft: int, sample_rate: int) -> slice:
    """Return the bins of a transform that lie in the band."""
    if band is None:
        return slice(0, n_fft // 2 + 1)
    if not (_is_pair(band) and 0 <= band[0] < band[1] <= sample_rate / 2):
        raise ValueError(
            f"band must be (low, high) in Hz with 0 <= low < high <= {sample_rate / 2:g}, half of the sampling rate, "
            f"got {band!r}"
        )
    first, last = math.ceil(band[0] * n_fft / sample_rate), math.floor(band[1] * n_fft / sample_rate)
    if last - first < 1:
        raise ValueError(
            f"band must hold at least 2 of the frequencies that are {sample_rate / n_fft:g} Hz apart, got {band!r}"
        )
    return slice(first, last + 1)


def _checked_length(length: Tensor, waveform: Tensor) -> Tensor:
    clips, samples = waveform.shape
    if length.shape != (clips,) or length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
        raise ValueError(
            f"length must be integers of shape ({clips},), one for each clip, got {length.dtype} of shape "
            f"{tuple(length.shape)}"
        )
    if length.device.type == "cpu" and len(length) and not 1 <= length.min() <= length.max() <= samples:
        row = int(((length < 1) | (length > samples)).int().argmax())
        raise ValueError(f"length must be from 1 to the {samples} samples of a clip, row {row} has {int(length[row])}")
    return length


def _checked_peak(waveform: Tensor) -> Tensor:
    """Return the largest magnitude ``(B,)`` of each clip, NaN if a sample is."""
    peak: Tensor = torch.linalg.vector_norm(waveform, math.inf, dim=1)
    if peak.device.type == "cpu" and not (finite := peak.isfinite()).all():
        row = int(finite.int().argmin())
        raise ValueError(f"row {row} of waveform holds a sample that is not finite; repair the clip or leave it out")
    return peak
