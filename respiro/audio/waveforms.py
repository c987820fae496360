"""Plain waveforms: resample, fade, fit to a length. The only module that imports torchaudio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

from respiro.errors import AudioError, check_choice

__all__ = [
    "Pad",
    "Rounding",
    "band_pass",
    "check_band",
    "check_rates",
    "fade",
    "fit_length",
    "positions",
    "resample",
    "resampled_length",
]

Pad = Literal["repeat", "zero", "reflect"]
Rounding = Literal["truncate", "milliseconds"]
#: A number, or an array of numbers.
Count = TypeVar("Count", int, np.ndarray)

#: Product of the rates, divided by what they share, up to which a filter is built; 282,240 from 11025 to 16000 Hz.
_LARGEST_FILTER = 10_000_000
#: Width of each edge of a band, Hz: narrow beside the bands of devices, and wide enough to ring for 0.1 s at most.
_EDGE = 100.0


def resample(waveform: np.ndarray, orig_rate: int, new_rate: int) -> np.ndarray:
    """Resample by a Hann-windowed sinc: torchaudio's ``Resample`` with its defaults (width 6, rolloff 0.99).

    The result has :func:`resampled_length` samples, exactly: torchaudio computes that number in float32, and by itself
    loses the last sample of some recordings.

    Args:
        waveform: Samples ``(n,)``.
        orig_rate: Rate of *waveform*, Hz.
        new_rate: Rate of the result, Hz.

    Returns:
        ``(resampled_length(n, orig_rate, new_rate),)`` float32; *waveform* itself if the rates are equal.

    Raises:
        ValueError: If a rate is not positive.
        AudioError: If the rates have so little in common that the filter would not fit into memory.
        ImportError: If torchaudio is not installed, or does not fit the installed torch.

    Example:
        >>> resample(np.ones(441, dtype=np.float32), 44100, 16000).shape
        (160,)
    """
    if orig_rate < 1 or new_rate < 1:
        raise ValueError(f"rates must be positive, got {orig_rate!r} and {new_rate!r}")
    if orig_rate == new_rate:
        return waveform
    check_rates(orig_rate, new_rate)
    divisor = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // divisor, new_rate // divisor
    # The filter pads with zeros itself, so zeros at the end change no sample; they give a float32 length room to err.
    padded = np.zeros(len(waveform) + orig, dtype=np.float32)
    padded[: len(waveform)] = waveform
    resampled: np.ndarray = _resampler(orig, new)(torch.from_numpy(padded)).numpy()
    return resampled[: resampled_length(len(waveform), orig, new)]


def check_rates(orig_rate: int, new_rate: int, where: str = "") -> None:
    """Raise an ``AudioError``, which begins with *where*, for rates that have too little in common.

    The filter has a phase for each sample of the new rate, and each phase the length of the old one, after both were
    divided by what they share: 441 × 160 from 44100 to 16000 Hz, but 44101 × 16000 from 44101 Hz.
    """
    if orig_rate * new_rate // math.gcd(orig_rate, new_rate) ** 2 > _LARGEST_FILTER:
        raise AudioError(
            f"{where}cannot be resampled from {orig_rate} to {new_rate} Hz, which share no useful divisor. Check the "
            f"rate in the header of the file, or choose a rounder sampling rate."
        )


def resampled_length(frames: Count, orig_rate: Count, new_rate: Count) -> Count:
    """Return how many samples *frames* become: ``ceil(new_rate * frames / orig_rate)``."""
    length: Count = -(-new_rate * frames // orig_rate)
    return length


def check_band(band: Sequence[float] | None, sample_rate: int) -> tuple[float, float] | None:
    """Return a band (Hz) as two floats, or ``None`` as it is.

    Raises:
        ValueError: If it is anything but two finite numbers with ``0 <= low < high <= sample_rate / 2``.
    """
    if band is None:
        return None
    try:
        low, high = (float(edge) for edge in band)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if isinstance(band, str) or not 0 <= low < high <= sample_rate / 2:  # false for NaN, too
        raise ValueError(
            f"band must be two numbers (low, high) in Hz with 0 <= low < high <= {sample_rate / 2:g}, half the "
            f"sampling rate, got {band!r}"
        )
    return low, high


def band_pass(waveform: np.ndarray, sample_rate: int, band: Sequence[float]) -> np.ndarray:
    """Keep what lies in a band of frequencies; no phase is moved, and the length stays.

    The gain is 1 from *low* to *high*, and outside falls to 0 along half a cosine within 100 Hz, or within what there
    is between the band and 0 Hz or half the sampling rate; a band that begins at 0 or ends at half the rate has no edge
    there. The waveform is followed by silence while it is filtered, so that its end does not reach its begin.

    Args:
        waveform: Samples ``(n,)``.
        sample_rate: Hz.
        band: *low* and *high*, Hz.

    Returns:
        ``(n,)`` float32, a copy.

    Raises:
        ValueError: If *band* has no meaning: see :func:`check_band`.

    Example:
        >>> seconds = np.arange(8000) / 8000
        >>> hum, breath = np.sin(2 * np.pi * 50 * seconds), np.sin(2 * np.pi * 400 * seconds)
        >>> bool(np.allclose(band_pass(hum + breath, 8000, (150, 2000))[800:-800], breath[800:-800], atol=1e-3))
        True
    """
    checked = check_band(band, sample_rate)
    if checked is None:
        raise ValueError("band must be two numbers (low, high) in Hz, got None")
    low, high = checked
    widths = [width for width in (min(_EDGE, low), min(_EDGE, sample_rate / 2 - high)) if width > 0]
    # What an edge of width W leaves at ten times 1 / W is below 1e-5 of its peak; half a minute bounds the memory.
    ringing = max((min(10 / width, 30.0) for width in widths), default=0.0)
    size = _fast_length(2 * len(waveform) + math.ceil(ringing * sample_rate))
    frequencies = np.fft.rfftfreq(size, 1 / sample_rate)
    gain = _rise(frequencies - low, min(_EDGE, low)) * _rise(high - frequencies, min(_EDGE, sample_rate / 2 - high))
    spectrum = np.fft.rfft(waveform.astype(np.float64), size) * gain
    return np.fft.irfft(spectrum, size)[: len(waveform)].astype(np.float32)


def _rise(distance: np.ndarray, width: float) -> np.ndarray:
    """Return 1 inside the band (*distance* from 0 Hz up) and half a cosine down to 0 at ``-width``."""
    if width == 0:  # the band begins or ends with the spectrum
        return np.ones_like(distance)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(1 + distance / width, 0, 1))


def _fast_length(size: int) -> int:
    """Return a length of at least *size* without large prime factors."""
    unit = 1 << max(0, size.bit_length() - 4)
    return -(-size // unit) * unit


def positions(seconds: np.ndarray, rates: np.ndarray | int, rounding: Rounding) -> np.ndarray:
    """Return the sample at each time, int64.

    Args:
        seconds: Times, any shape.
        rates: Hz, of a shape that broadcasts.
        rounding: ``"truncate"`` is ``int(t * rate)`` (the papers on ICBHI), ``"milliseconds"`` the exact
            ``round(t * 1000) * rate // 1000`` (SPRSound, whose times are whole milliseconds).

    Example:
        >>> positions(np.array([0.0, 1.001]), 16000, "truncate")
        array([    0, 16015])
        >>> positions(np.array([0.0, 1.001]), 16000, "milliseconds")
        array([    0, 16016])
    """
    if rounding == "milliseconds":
        return np.asarray(np.rint(seconds * 1000).astype(np.int64) * rates // 1000)
    return np.asarray((seconds * rates).astype(np.int64))


def fade(waveform: np.ndarray, length: int, begin: int = 0, total: int | None = None) -> np.ndarray:
    """Fade a recording in and out linearly, given all of it or a part.

    A part is faded as if the whole recording had been faded before the part was cut out.

    Args:
        waveform: Samples ``(n,)``.
        length: Samples of each fade, at most *total*; the gains are ``linspace(0, 1, length)`` and one minus that,
            and multiply where they overlap.
        begin: Position of *waveform* in its recording.
        total: Samples of the recording; where *waveform* ends by default.

    Returns:
        ``(n,)`` float32, a copy.

    Raises:
        ValueError: If *length* is negative or *waveform* is not a part of the recording.

    Example:
        >>> fade(np.ones(6), 3)
        array([0. , 0.5, 1. , 1. , 0.5, 0. ], dtype=float32)
    """
    size = len(waveform)
    total = begin + size if total is None else total
    if length < 0:
        raise ValueError(f"length must not be negative, got {length!r}")
    if begin < 0 or begin + size > total:
        raise ValueError(f"{size} samples from {begin!r} on do not lie in a recording of {total!r}")
    faded = np.array(waveform, dtype=np.float32)
    ramp = _ramp(min(length, total))
    head = ramp[begin : begin + size]
    faded[: len(head)] *= head
    fade_out = total - len(ramp) - begin  # where the fade-out begins, counted from the begin of the part
    tail, passed = faded[max(fade_out, 0) :], max(-fade_out, 0)
    tail *= 1 - ramp[passed : passed + len(tail)]
    return faded


def fit_length(waveform: np.ndarray, size: int, pad: Pad = "repeat", fade_out: int = 0) -> np.ndarray:
    """Cut or fill a waveform to a fixed length.

    A longer waveform keeps its first *size* samples, not faded.

    Args:
        waveform: Samples ``(n,)``.
        size: Samples of the result.
        pad: How a waveform of at most *size* samples is filled. ``"repeat"``: again and again, then faded out over
            the last *fade_out* samples, also if nothing was missing (Bae et al., 2023; Moummad & Farrugia, 2023).
            ``"zero"``: zeros on both sides, the smaller half first. ``"reflect"``: mirrored at its end again and
            again; the mirror sample itself is not repeated.
        fade_out: Samples of the fade-out of ``"repeat"``.

    Returns:
        ``(size,)`` float32, a copy.

    Raises:
        ValueError: If *waveform* is empty, *size* is not positive, or *pad* is unknown.

    Example:
        >>> fit_length(np.array([1.0, 2.0]), 5)
        array([1., 2., 1., 2., 1.], dtype=float32)
        >>> fit_length(np.array([1.0, 2.0]), 5, pad="zero")
        array([0., 1., 2., 0., 0.], dtype=float32)
    """
    check_choice("pad", pad, get_args(Pad))
    if size < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    missing = size - len(waveform)
    if len(waveform) == 0:
        raise ValueError("an empty waveform cannot be filled")
    if missing < 0:
        return np.array(waveform[:size], dtype=np.float32)
    if pad == "zero":
        return np.pad(waveform, (missing // 2, missing - missing // 2)).astype(np.float32, copy=False)
    if pad == "reflect":
        return np.pad(waveform, (0, missing), mode="reflect").astype(np.float32, copy=False)
    repeated = np.resize(waveform, size).astype(np.float32, copy=False)
    ramp = _ramp(min(fade_out, size))
    repeated[size - len(ramp) :] *= 1 - ramp
    return repeated


def _ramp(length: int) -> np.ndarray:
    return np.linspace(0, 1, length, dtype=np.float32)


@lru_cache(maxsize=16)
def _resampler(orig: int, new: int) -> Any:
    """Build the filter of a pair of rates, once."""
    return _torchaudio().transforms.Resample(orig, new)


def _torchaudio() -> ModuleType:
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError) as error:  # a build that does not fit torch raises any of these
        raise ImportError(
            f"torchaudio cannot be imported beside torch {torch.__version__} ({error}). Install both from the same "
            f"index: pip install 'torch>=2.6,<2.15' 'torchaudio>=2.6'. A CPU-only torch beside the CUDA build of "
            f"torchaudio from PyPI fails: add --index-url https://download.pytorch.org/whl/cpu to get both for CPU."
        ) from error
    return torchaudio  # type: ignore[no-any-return]
