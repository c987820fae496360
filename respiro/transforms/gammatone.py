"""Gammatone spectrograms: a short-time Fourier transform, weighted as the filters of the cochlea weigh it.

The filters are of fourth order, as wide as the ear's, and equally spaced on the scale of equivalent rectangular
bandwidths (ERB). Their formulas are functions in float64, the front end is a module that computes with them.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from respiro.component import Transform
from respiro.errors import check_choice
from respiro.transforms._checks import check_positive, check_waveform, full_precision
from respiro.transforms._normalise import Normalize, normalise
from respiro.transforms.features import _POWER_FLOOR, _check_band, _clip_by_clip, _power

__all__ = ["GammatoneSpectrogram", "erb_bandwidths", "erb_centres", "gammatone_magnitude"]


def erb_centres(num_bands: int, f_min: float, f_max: float) -> np.ndarray:
    """Return centre frequencies in Hz, equally spaced in ``E(f) = 21.4 log10(1 + 0.00437 f)``, both ends included.

    Example:
        >>> erb_centres(3, 50.0, 2000.0).round(2).tolist()
        [50.0, 559.5, 2000.0]
    """
    low, high = 21.4 * np.log10(1 + 0.00437 * np.array([f_min, f_max], dtype=np.float64))
    centres: np.ndarray = (10 ** (np.linspace(low, high, num_bands) / 21.4) - 1) / 0.00437
    return centres


def erb_bandwidths(centres: np.ndarray) -> np.ndarray:
    """Return the bandwidth ``b`` in Hz of fourth-order gammatone filters: 1.019 times the ERB at their centres.

    Example:
        >>> erb_bandwidths(np.array([1000.0])).round(3).tolist()
        [135.159]
    """
    bandwidths: np.ndarray = 1.019 * 24.7 * (4.37 * np.asarray(centres, dtype=np.float64) / 1000 + 1)
    return bandwidths


def gammatone_magnitude(frequencies: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the magnitude of gammatone filters at some frequencies as a matrix ``(frequencies, centres)``.

    It is ``(1 + ((f - fc) / b)^2)^-2``, 1 at the centre. The cosine's image at ``-fc`` is neglected, which shows where
    a filter reaches down to 0, and in a sampled filter where it reaches up to half the sampling rate.

    Example:
        >>> gammatone_magnitude(np.array([1000.0, 1135.159]), np.array([1000.0])).round(4).tolist()
        [[1.0], [0.25]]
    """
    distance = np.asarray(frequencies, dtype=np.float64)[:, None] - np.asarray(centres, dtype=np.float64)
    magnitude: np.ndarray = (1 + (distance / erb_bandwidths(centres)) ** 2) ** -2
    return magnitude


class GammatoneSpectrogram(Transform):
    """Log energies of a gammatone filter bank, each clip standardised by itself.

    Short-time Fourier transform (periodic Hann), its power weighted by the squared magnitude of each filter,
    ``G[k, t] = sum_f W_k(f)^2 |STFT(f, t)|^2``, and the natural logarithm with a floor of 1e-10. A filter bank in the
    time domain gives nearly the same power, at a multiple of the cost; see :func:`gammatone_magnitude` for the filters.
    Computed in float32 whatever the module is cast to and even under autocast; a float64 waveform in float64.

    Args:
        sample_rate: Sampling rate of the waveform in Hz.
        num_bands: Number of filters.
        f_min: Centre of the first filter in Hz.
        f_max: Centre of the last filter in Hz.
        n_fft: Samples per window, an even number.
        hop_length: Samples from window to window.
        center: Whether windows are centred on their sample, the clip reflected at its ends. Without it the first window
            starts with the clip, and the last one ends within it.
        normalize: ``"clip_standard"`` subtracts the mean of a clip's log energies and divides by their standard
            deviation, so that its gain has no effect; a clip of one constant value, such as silence, becomes 0.
            ``"none"`` leaves the log energies.

    Shape:
        waveform ``(B, S)``; returns ``(B, T, num_bands)`` with ``T = 1 + S // hop_length``, or
        ``T = 1 + (S - n_fft) // hop_length`` without ``center``.

    Raises:
        ValueError: If an option is unknown, the band does not fit the sampling rate, ``n_fft`` is odd, or a clip has
            too few samples: ``n_fft // 2 + 1`` to be reflected, or ``n_fft`` without ``center``.

    Source:
        Glasberg and Moore, "Derivation of auditory filter shapes from notched-noise data", Hearing Research 47, 1990
        (bandwidths); Patterson et al., "An efficient auditory filterbank based on the gammatone function", APU report
        2341, 1988 (filters). The defaults are a reconstruction of Ngo, Pham et al., arXiv 2303.04104.

    Example:
        >>> gammatone = GammatoneSpectrogram()
        >>> gammatone(torch.zeros(2, 32000)).shape
        torch.Size([2, 154, 124])
        >>> round(gammatone.centres[0], 3), round(gammatone.centres[-1], 3)
        (50.0, 3900.0)
    """

    _window: Tensor
    _weights: Tensor

    def __init__(
        self,
        sample_rate: int = 8000,
        num_bands: int = 124,
        f_min: float = 50.0,
        f_max: float = 3900.0,
        n_fft: int = 512,
        hop_length: int = 208,
        center: bool = True,
        normalize: Normalize = "clip_standard",
    ) -> None:
        super().__init__()
        _check_band(f_min, f_max, sample_rate)
        check_positive(num_bands=num_bands, n_fft=n_fft, hop_length=hop_length)
        check_choice("normalize", normalize, get_args(Normalize))
        if n_fft % 2:
            raise ValueError(f"n_fft must be even, so that a window has a middle, got {n_fft!r}")
        self.sample_rate = sample_rate
        self.num_features = num_bands
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.center = center
        self.normalize = normalize
        centres = erb_centres(num_bands, f_min, f_max)
        self.centres: tuple[float, ...] = tuple(centres.tolist())
        weights = gammatone_magnitude(np.arange(n_fft // 2 + 1) * sample_rate / n_fft, centres) ** 2
        # Kept on the CPU: float64 waveforms are for checks, and some devices have no float64.
        self._exact = {
            "_window": torch.hann_window(n_fft, dtype=torch.float64),
            "_weights": torch.from_numpy(weights),
        }
        for name, constant in self._exact.items():
            self.register_buffer(name, constant.float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the normalised log energies ``(B, T, F)``."""
        with torch.autocast(waveform.device.type, enabled=False):
            log_energies = self.energies(waveform).clamp_(min=_POWER_FLOOR).log_()
            return normalise(log_energies, self.normalize).to(waveform.dtype)

    def energies(self, waveform: Tensor) -> Tensor:
        """Return the energies ``G`` ``(B, T, F)``; of half-precision waveforms in float32, as half overflows."""
        check_waveform(waveform, *self._needs())
        with torch.autocast(waveform.device.type, enabled=False):
            frames = 1 + waveform.shape[1] // self.hop_length
            return _clip_by_clip(self._energies, full_precision(waveform), frames)

    def _energies(self, waveform: Tensor) -> Tensor:
        window, weights = self._constants(waveform)
        spectrum = torch.stft(
            waveform,
            self.n_fft,
            self.hop_length,
            window=window,
            center=self.center,
            pad_mode="reflect",
            return_complex=True,
        )
        return _power(spectrum.transpose(1, 2)) @ weights

    def _constants(self, like: Tensor) -> list[Tensor]:
        """Return the window and the weights in the precision of *like*."""
        if like.dtype == torch.float32:
            return [self._window, self._weights]
        return [constant.to(like.device, like.dtype) for constant in self._exact.values()]

    def _needs(self) -> tuple[int, str]:
        if self.center:
            return self.n_fft // 2 + 1, f"a reflected window of {self.n_fft} samples"
        return self.n_fft, f"one window of {self.n_fft} samples"
