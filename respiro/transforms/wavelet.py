"""Wavelet features: waveforms ``(B, S)`` to Morlet scalograms ``(B, T, F)``, batched, differentiable, on any device.

Computed in float32 even under autocast (float64 stays float64). What the transform holds is derived from its arguments
and is not part of the state dict.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import groupby
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from respiro.component import Transform
from respiro.errors import check_choice
from respiro.transforms._checks import check_positive, check_waveform, full_precision
from respiro.transforms._normalise import Normalize, normalise
from respiro.transforms.features import _clip_by_clip

__all__ = ["MorletScalogram"]

_FLOOR = 1e-5
_REACH = math.sqrt(2 * math.log(1e6))  # the response falls to 1e-6 of its peak at so many standard deviations
_PADDING = 16  # scales of silence after a clip
_COARSENESS = 2e-3  # the most of step ** 2 / (hop * scale), to which the error of a frame's mean is proportional
_CPU_CHUNK = 1 << 18  # complex values worked on at a time on a CPU: what stays in its cache is faster
_CHUNK = 1 << 22  # the same on other devices: 32 MB


class MorletScalogram(Transform):
    r"""Continuous wavelet transform with the analytic Morlet wavelet: log amplitude, averaged over frames.

    A scale of centre frequency fc weighs the spectrum by

    .. math:: H(f) = 2 \exp\big(-\tfrac{1}{2} (w_0 (f / f_c - 1))^2\big), \quad f > 0,

    and 0 for other f, so that a tone of amplitude A at fc has the amplitude A. Centres are equally spaced on a log
    scale, both ends included. A clip is silent outside its ends: it is padded, and never wraps round.

    Frame t is centred at sample ``t * hop_length``: it averages the amplitudes of the samples from
    ``t * hop_length - hop_length // 2`` on, *hop_length* of them, less those outside the clip. (At a hop of 1 sample
    the last frame is the first sample after the clip.) Then the natural logarithm, floored at an amplitude of 1e-5,
    and the normalisation. Silence gives a constant, which ``"clip_standard"`` makes 0.

    Where the amplitude of a scale changes slowly, the mean over a frame is taken at fewer points than it has samples,
    which makes it several times faster. How far that is from the mean over all samples was measured at hops of 64 to
    1000, relative to the clip's peak: up to 3e-4 for noise, 4e-4 for beats, 6e-4 for harmonics, 2e-4 for chirps, tones,
    impulses and simulated breath sounds; at worst 1.2e-3, for square waves in step with the points. Means over a hop of
    1 sample and over a clip shorter than a frame are exact, as :meth:`amplitude` always is.

    Args:
        sample_rate: Sampling rate of the waveform in Hz.
        num_scales: Number of centre frequencies; a single one lies at *f_min*.
        f_min: Lowest centre frequency in Hz.
        f_max: Highest centre frequency in Hz.
        w0: Centre frequency of the wavelet in radians per scale. A scale resolves ``fc / w0`` Hz (one standard
            deviation of its response) and ``w0 / (2 pi fc)`` seconds.
        hop_length: Samples from frame to frame.
        normalize: ``"clip_standard"`` takes the mean of a clip's log values from them and divides by their standard
            deviation, ``"none"`` leaves them.

    Attributes:
        centres: Centre frequencies in Hz, ascending.

    Shape:
        waveform ``(B, S)``, ``S >= 1``; returns ``(B, T, num_scales)`` with ``T = 1 + S // hop_length``.

    Raises:
        ValueError: If an argument is out of range, or the centre frequencies do not fit the sampling rate.

    Source:
        Torrence and Compo, "A practical guide to wavelet analysis", 1998, section 3 (scaled by amplitude here); front
        end of Ngo et al., arXiv 2303.04104, who do not give their wavelet: all defaults are a reconstruction.

    Example:
        >>> features = MorletScalogram(num_scales=3, f_min=100.0, f_max=400.0)
        >>> [round(centre) for centre in features.centres]
        [100, 200, 400]
        >>> tone = 0.5 * torch.sin(2 * math.pi * 200 * torch.arange(8000) / 8000)[None]
        >>> features(tone).shape
        torch.Size([1, 39, 3])
        >>> (1000 * features.amplitude(tone)[0, 4000]).round()  # the response at 400 Hz is exp(-4.5) at 200 Hz
        tensor([  0., 500.,   6.])
    """

    def __init__(
        self,
        sample_rate: int = 8000,
        num_scales: int = 124,
        f_min: float = 50.0,
        f_max: float = 2000.0,
        w0: float = 6.0,
        hop_length: int = 208,
        normalize: Normalize = "clip_standard",
    ) -> None:
        super().__init__()
        check_positive(sample_rate=sample_rate, num_scales=num_scales, w0=w0, hop_length=hop_length)
        if not 0 < f_min <= f_max <= sample_rate / 2 or (f_min == f_max and num_scales > 1):
            raise ValueError(
                f"f_min and f_max must satisfy 0 < f_min < f_max <= {sample_rate / 2:g} Hz, half of the sampling rate "
                f"(a single scale may have f_min == f_max); got {f_min!r} and {f_max!r} for {num_scales} scales"
            )
        check_choice("normalize", normalize, get_args(Normalize))
        self.sample_rate = sample_rate
        self.num_features = num_scales
        self.w0 = w0
        self.hop_length = hop_length
        self.normalize: Normalize = normalize
        self.centres: tuple[float, ...] = tuple(np.geomspace(f_min, f_max, num_scales).tolist())

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the normalised log scalogram ``(B, T, F)``."""
        check_waveform(waveform, 1, "a scalogram")
        with torch.autocast(waveform.device.type, enabled=False):
            amplitude = self._frames(waveform, self.hop_length, 1 + waveform.shape[1] // self.hop_length)
            return normalise(amplitude.clamp(min=_FLOOR).log(), self.normalize).to(waveform.dtype)

    def amplitude(self, waveform: Tensor) -> Tensor:
        """Return the amplitude at every sample ``(B, S, F)``: no averaging, no logarithm, no normalisation.

        Exact at each sample, and large: S times F values a clip.
        """
        check_waveform(waveform, 1, "a scalogram")
        with torch.autocast(waveform.device.type, enabled=False):
            return self._frames(waveform, 1, waveform.shape[1]).to(waveform.dtype)

    def _frames(self, waveform: Tensor, hop: int, frames: int) -> Tensor:
        scales = [self.w0 / (2 * math.pi) * self.sample_rate / centre for centre in self.centres]  # in samples
        compute = partial(_mean_amplitude, scales=scales, w0=self.w0, hop=hop, frames=frames)
        return _clip_by_clip(compute, full_precision(waveform), frames)


def _mean_amplitude(x: Tensor, scales: list[float], w0: float, hop: int, frames: int) -> Tensor:
    """Return the mean amplitude of each frame at each scale ``(B, T, F)``; the scales descend."""
    before, end = hop // 2, hop // 2 + x.shape[1]
    padded = _smooth(max(frames, math.ceil((end + _PADDING * scales[0]) / hop)))  # in frames
    samples = hop * padded
    spectrum = torch.fft.rfft(pad(x, (before, samples - end)))
    clips = 1 if torch.compiler.is_compiling() else len(x)  # a compiled graph is to take any batch size
    chunk = (_CPU_CHUNK if x.device.type == "cpu" else _CHUNK) // clips
    means = []
    # A clip shorter than a frame may have few samples in it: each of them counts.
    for points, group in groupby(scales, key=lambda scale: _points(scale, hop) if x.shape[1] >= hop else hop):
        # Each frame is cut into cells of one step, and a point lies in the middle of each.
        step, length, of_group = hop / points, padded * points, list(group)
        at_points = spectrum * _delay((1 - step) / 2, samples, x)
        weights = _weights(before / step, end / step, frames, points, x)
        count = max(1, chunk // length)
        for first in range(0, len(of_group), count):
            arguments = (at_points, weights, of_group[first : first + count], w0, samples, length)
            # For a gradient each chunk is computed a second time instead of kept: memory is what is scarce here.
            means.append(
                checkpoint(_band_means, *arguments, use_reentrant=False, preserve_rng_state=False)
                if spectrum.requires_grad
                else _band_means(*arguments)
            )
    return torch.cat(means, dim=1).transpose(1, 2).contiguous()


def _band_means(spectrum: Tensor, weights: Tensor, scales: list[float], w0: float, samples: int, length: int) -> Tensor:
    """Return the means ``(B, F, T)``, with *weights* ``(T, points)``, of the amplitudes at *length* points.

    A scale passes a narrow band of the spectrum of *samples*. Moved to frequency 0, which the modulus does not depend
    on, the band is transformed back to the few points that it needs.
    """
    frames, points = weights.shape
    bins = spectrum.shape[1]
    width = min(bins, math.ceil(_REACH * samples / (math.pi * scales[-1])) + 2)
    lowest = [math.floor((w0 - _REACH) * samples / (2 * math.pi * scale)) for scale in scales]
    lowest = [min(max(low, 0), bins - width) for low in lowest]
    slopes = [2 * math.pi * scale / samples for scale in scales]
    offsets = [slope * low - w0 for slope, low in zip(slopes, lowest, strict=True)]
    # Made on the CPU, because making a tensor on a GPU waits for it.
    line = torch.tensor([slopes, offsets], dtype=weights.dtype).to(weights.device, non_blocking=True)
    deviation = line[1, :, None] + line[0, :, None] * torch.arange(width, dtype=weights.dtype, device=weights.device)
    response = 2 * length / samples * torch.exp(-deviation.square() / 2)
    bands = torch.stack([spectrum[:, low : low + width] for low in lowest], dim=1) * response
    parts = torch.view_as_real(torch.fft.ifft(bands, n=length)).square_()  # much faster than abs()
    power = parts[..., 0] + parts[..., 1]
    amplitude = power.clamp_(min=torch.finfo(power.dtype).tiny).sqrt_()  # the root has no gradient at 0
    return (amplitude.view(*power.shape[:2], -1, points)[:, :, :frames] * weights).sum(-1)


def _weights(start: float, end: float, frames: int, points: int, like: Tensor) -> Tensor:
    """Return the weight of each point in its frame ``(T, points)``: how much of its cell lies in the clip.

    The clip extends from *start* to *end*, in cells. The last frame at a hop of 1 sample lies behind it, and is taken
    as it is.
    """
    cells = torch.arange(frames * points, dtype=like.dtype, device=like.device)
    end = max(end, (frames - 1) * points + 1)
    within = ((end - cells).clamp(0, 1) - (start - cells).clamp(0, 1)).view(frames, points)
    return within / within.sum(1, keepdim=True)


def _delay(delay: float, samples: int, like: Tensor) -> Tensor:
    """Return what delays the positive half ``(samples // 2 + 1,)`` of a spectrum by *delay* samples.

    The ends of the half, frequency 0 and half the sampling rate, count half: so the padding has no influence even
    where a response is cut off there.
    """
    bins = torch.arange(samples // 2 + 1, dtype=like.dtype, device=like.device)
    magnitude = torch.where((bins == 0) | (bins == samples / 2), 0.5, 1.0).to(like.dtype)
    return torch.polar(magnitude, bins * (-2 * math.pi * delay / samples))


def _points(scale: float, hop: int) -> int:
    """Return at how many points of a frame the amplitude of a *scale* is taken, at most each of its samples.

    A step of half a scale keeps the whole band, whatever w0; the mean over few steps needs shorter ones. The number is
    rounded up to 5, 6, 7 or 8 eighths of a power of 2, so that scales share it and transforms are fast.
    """
    least = math.ceil(hop / min(scale / 2, math.sqrt(_COARSENESS * hop * scale)))
    unit = max(1, (1 << (least - 1).bit_length()) // 8)
    return min(-(-least // unit) * unit, hop)


def _smooth(least: int) -> int:
    """Return the smallest number of at least *least* that has no prime factor above 5: fast to transform."""
    exponents = range(least.bit_length() + 1)
    odd = [int(3**i * 5**j) for i in exponents for j in exponents]
    return min(factor << (-(-least // factor) - 1).bit_length() for factor in odd)
