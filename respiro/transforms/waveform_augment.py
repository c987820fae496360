"""Augmentation of waveforms ``(B, S)``: batched, a draw of its own for every sample, on any device.

Nothing here asks the device for a value, so a GPU is never waited for.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from respiro.component import Transform
from respiro.transforms._checks import check_positive, check_waveform, full_precision

__all__ = ["WaveformAugment"]

_EDGE = 0.5  # octaves that an edge of the band-limit takes from 1 to 0
_OCTAVES = 7  # below half the sampling rate, over which the knots of the device response lie
_BITS = 20  # of the fraction of a read position, an integer: late in a clip, float32 has no room for a fraction
_LOWEST = 1e-3  # Hz; stands for 0 in a logarithm, and is below every other frequency
_LEAST_POWER = 1e-20  # of the noise, where there is none to divide by


class WaveformAugment(Transform):
    """Speed, shift, device response, band-limit, noise and gain at random, in this order, while training.

    A part that is ``None`` is off. Every other part is applied to every sample by itself with probability *p*, with
    numbers drawn uniformly from its range. In eval mode the input itself is returned; the input is never changed.

    - *speed* reads the clip faster or slower, as a tape: frequencies change by the factor, too. It interpolates
      linearly, and the length stays: as clips are padded by repetition, a faster one goes on from its beginning; of a
      slower one the end is lost.
    - *shift* rotates the clip by up to so many seconds either way; what leaves at one end enters at the other.
    - *device_response* multiplies the spectrum by a smooth response, as another stethoscope would: one level in
      ±*device_response* dB at each of *response_knots* frequencies, evenly spaced over the 7 octaves below half the
      sampling rate, joined by half cosines over log frequency, and constant below.
    - *band* passes what lies between two edges unchanged; over half an octave outside, the amplitude falls to 0 along a
      raised cosine. An edge at 0 Hz or at half the sampling rate cuts nothing.
    - *snr* adds noise, whose mean square is so many dB below that of the clip as it then is. Silence gets none.
    - *gain* makes it louder or softer.

    The result may leave [-1, 1]. It is not clipped, because that would add overtones, and no features of respiro need
    the range. The filters act on the clip as a whole, so it is filtered as if repeated. Everything is computed in
    float32 at least, and is differentiable; the level of the noise is a constant to the gradient.

    Args:
        sample_rate: Sampling rate of the waveform in Hz.
        gain: Range in dB, such as ``(-6, 6)``.
        snr: Range of the signal-to-noise ratio in dB, such as ``(10, 40)``.
        shift: Largest shift in seconds.
        speed: Range of the factor, such as ``(0.9, 1.1)``; positive.
        band: Ranges of the lower and of the upper edge in Hz, such as ``((20, 150), (1000, 4000))``; apart, and at most
            half the sampling rate.
        device_response: Largest deviation of the response in dB.
        p: Probability of every part for every sample, in [0, 1].
        noise_color: Exponent *a* of the noise, whose power falls as ``1 / f ** a``: 0 white, 1 pink, 2 brown.
        response_knots: Number of frequencies at which the device response is drawn; at least 2.

    Shape:
        waveform ``(B, S)``; returns the same. The generator must be on the device of the waveform.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> augment = WaveformAugment(16000, gain=(-6, 6), snr=(10, 40), shift=1.0, band=((20, 150), (1000, 4000)))
        >>> waveform = torch.randn(4, 16000)
        >>> augment(waveform, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 16000])
        >>> augment.eval()(waveform) is waveform
        True
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        gain: tuple[float, float] | None = None,
        snr: tuple[float, float] | None = None,
        shift: float | None = None,
        speed: tuple[float, float] | None = None,
        band: tuple[tuple[float, float], tuple[float, float]] | None = None,
        device_response: float | None = None,
        p: float = 0.5,
        noise_color: float = 0.0,
        response_knots: int = 8,
    ) -> None:
        super().__init__()
        check_positive(sample_rate=sample_rate)
        for name, value, unit in (("gain", gain, "dB"), ("snr", snr, "dB"), ("speed", speed, "factors above 0")):
            if value is not None and not _is_range(value):
                raise ValueError(f"{name} must be a range (low, high) of {unit} with low <= high, got {value!r}")
        if speed is not None:
            check_positive(speed=speed[0])
        for name, most in (("shift", shift), ("device_response", device_response), ("noise_color", noise_color)):
            if most is not None and not 0 <= most < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {most!r}")
        if band is not None:
            _check_band_ranges(band, sample_rate)
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p!r}")
        if not response_knots >= 2:
            raise ValueError(f"response_knots must be at least 2, got {response_knots!r}")
        self.sample_rate = sample_rate
        self.gain = gain
        self.snr = snr
        self.shift = shift
        self.speed = speed
        self.band = band
        self.device_response = device_response
        self.p = p
        self.noise_color = noise_color
        self.response_knots = response_knots

    def forward(self, waveform: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the waveform, augmented while training ``(B, S)``."""
        if not self.training:
            return waveform
        check_waveform(waveform, 1, "augmentation")
        x = full_precision(waveform)
        if self.speed is not None:
            x = _speed(x, self._draw(x, self.speed, 1.0, generator))
        if self.shift is not None:
            x = _shift(x, self._draw(x, (-self.shift, self.shift), 0.0, generator) * self.sample_rate)
        if self.band is not None or self.device_response is not None:
            # Adding what the response changes, instead of multiplying by it, leaves a sample with none bit by bit.
            change = self._response(x, generator) - 1
            x = x + torch.fft.irfft(torch.fft.rfft(x) * change, n=x.shape[1])
        if self.snr is not None:
            decibels = self._draw(x, self.snr, math.inf, generator)
            x = x + _noise(x.detach(), decibels, self.noise_color, generator)
        if self.gain is not None:
            x = x * _amplitude(self._draw(x, self.gain, 0.0, generator))
        return x.to(waveform.dtype)

    def _draw(self, x: Tensor, bounds: tuple[float, float], otherwise: float, generator: Generator | None) -> Tensor:
        """Return a number per sample ``(B, 1)``: *otherwise* unless the part is applied to it."""
        return torch.where(self._applied(x, generator), _uniform(x, bounds, 1, generator), otherwise)

    def _applied(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Return whether a part is applied to each sample ``(B, 1)``."""
        return _uniform(x, (0.0, 1.0), 1, generator) < self.p

    def _response(self, x: Tensor, generator: Generator | None) -> Tensor:
        """Return what the spectrum of every sample is multiplied by ``(B, S // 2 + 1)``."""
        hertz = torch.fft.rfftfreq(x.shape[1], 1 / self.sample_rate, dtype=x.dtype, device=x.device)
        response = torch.ones_like(hertz)
        if self.device_response is not None:
            bounds = (-self.device_response, self.device_response)
            decibels = _uniform(x, bounds, self.response_knots, generator) * self._applied(x, generator)
            response = response * _amplitude(_curve(decibels, hertz / (self.sample_rate / 2)))
        if self.band is not None:
            low, high = (_uniform(x, bounds, 1, generator) for bounds in self.band)
            response = response * torch.where(self._applied(x, generator), _band_pass(hertz, low, high), 1.0)
        return response


def _uniform(x: Tensor, bounds: tuple[float, float], count: int, generator: Generator | None) -> Tensor:
    """Draw *count* numbers per sample ``(B, count)``, in the type of *x* whatever torch's default is."""
    low, high = bounds
    drawn = torch.rand(len(x), count, dtype=x.dtype, device=x.device, generator=generator)
    return low + (high - low) * drawn


def _amplitude(decibels: Tensor) -> Tensor:
    return torch.pow(10.0, decibels / 20)


def _speed(x: Tensor, factor: Tensor) -> Tensor:
    """Read sample ``i`` at ``i * factor``, between its neighbours, and on from the beginning after the end."""
    position = torch.arange(x.shape[1], device=x.device) * (factor * (1 << _BITS)).round().long()
    left = (position >> _BITS) % x.shape[1]
    weight = (position & ((1 << _BITS) - 1)).to(x.dtype) / (1 << _BITS)
    following = torch.roll(x, -1, dims=1)
    return torch.lerp(x.gather(1, left), following.gather(1, left), weight)


def _shift(x: Tensor, samples: Tensor) -> Tensor:
    """Rotate every sample by its own number of samples ``(B, 1)``, rounded."""
    position = torch.arange(x.shape[1], device=x.device) - samples.round().long()
    return x.gather(1, position % x.shape[1])


def _curve(levels: Tensor, frequency: Tensor) -> Tensor:
    """Join levels ``(B, K)``, the last at *frequency* 1 and the first 7 octaves below, by half cosines."""
    knots = levels.shape[1]
    position = (frequency.log2() / _OCTAVES + 1).clamp(min=0) * (knots - 1)
    left = position.long().clamp(max=knots - 2)
    weight = (1 - torch.cos(math.pi * (position - left))) / 2
    return torch.lerp(levels[:, left], levels[:, left + 1], weight)


def _band_pass(hertz: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return 1 from *low* to *high* ``(B, 1)``, falling to 0 over an edge on either side: ``(B, len(hertz))``."""
    octaves = hertz.clamp(min=_LOWEST).log2()
    outside = torch.maximum(low.log2() - octaves, octaves - high.log2())
    return (1 + torch.cos(math.pi * (outside / _EDGE).clamp(0, 1))) / 2


def _noise(x: Tensor, decibels: Tensor, color: float, generator: Generator | None) -> Tensor:
    """Return noise of a power of ``1 / f ** color`` that lies by *decibels* ``(B, 1)`` below *x*: ``(B, S)``."""
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    if color:
        spectrum = torch.fft.rfft(noise)
        frequency = torch.arange(spectrum.shape[1], dtype=x.dtype, device=x.device)
        amplitude = torch.where(frequency > 0, frequency.clamp(min=1) ** (-color / 2), 0.0)
        noise = torch.fft.irfft(spectrum * amplitude, n=x.shape[1])
    ratio = x.square().mean(1, keepdim=True) / noise.square().mean(1, keepdim=True).clamp(min=_LEAST_POWER)
    return noise * ratio.sqrt() * _amplitude(-decibels)


def _is_range(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and -math.inf < value[0] <= value[1] < math.inf


def _check_band_ranges(band: tuple[tuple[float, float], tuple[float, float]], sample_rate: int) -> None:
    nested = isinstance(band, list | tuple) and len(band) == 2 and all(map(_is_range, band))
    if not (nested and band[0][0] >= 0 and band[0][1] < band[1][0] and band[1][1] <= sample_rate / 2):
        raise ValueError(
            f"band must be ((low_min, low_max), (high_min, high_max)) in Hz with 0 <= low_min <= low_max < high_min <= "
            f"high_max <= {sample_rate / 2:g}, half of the sampling rate; got {band!r}"
        )
