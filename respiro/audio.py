"""Sound files and plain waveforms: read a segment, resample, fade, fit to a length.

The only module that opens sound files (with libsndfile) and the only one that imports torchaudio.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import soundfile
import torch

from respiro.errors import AudioError

__all__ = [
    "Header",
    "Pad",
    "decode",
    "fade",
    "file_stat",
    "fit_length",
    "read",
    "read_header",
    "resample",
    "resampled_length",
]

Pad = Literal["repeat", "zero", "reflect"]
#: A number, or an array of numbers.
Count = TypeVar("Count", int, np.ndarray)

#: Size of a data chunk whose writer could not go back to fill it in (a stream).
_UNKNOWN_SIZE = 0xFFFFFFFF
#: What libsndfile reports for a FLAC stream that does not state its length.
_UNKNOWN_FRAMES = 2**63 - 1


class Header(NamedTuple):
    """What a sound file says about itself."""

    sample_rate: int  #: Hz
    frames: int  #: samples per channel
    channels: int
    encoding: str  #: libsndfile's name of the sample format, for example ``"PCM_16"``


def file_stat(path: str | Path) -> os.stat_result:
    """Return size and times of a sound file.

    Raises:
        AudioError: If *path* does not exist, is no file, or is empty.
    """
    try:
        info = Path(path).stat()
    except OSError as error:
        raise AudioError(f"{path}: cannot be opened ({error.strerror}). Check the path, or fetch the file.") from error
    if not stat.S_ISREG(info.st_mode):
        raise AudioError(f"{path}: is not a file. Check the path.")
    if info.st_size == 0:
        raise AudioError(f"{path}: has 0 bytes. Fetch it again.")
    return info


def read_header(path: str | Path) -> Header:
    """Read the header of a sound file, and check that the file is as long as it says.

    The rate, the sample format and the length count; other fields of the header may be wrong (every SPRSound file has
    a wrong ``nBlockAlign``).

    Raises:
        AudioError: If the file is missing, empty, not sound, holds no samples, or ends before its data do.
    """
    size = file_stat(path).st_size
    try:
        info = soundfile.info(path)
        with Path(path).open("rb") as file:
            expected = _wav_end(file)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: is not a sound file that libsndfile can read ({_reason(error)}). Fetch it again, or convert it "
            f"to WAV or FLAC."
        ) from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if expected is not None and expected > size:  # libsndfile would silently read what is there
        raise AudioError(
            f"{path}: is truncated, its header promises {expected} bytes and {size} are there. Fetch it again."
        )
    if info.frames == _UNKNOWN_FRAMES:
        raise AudioError(f"{path}: does not state its length (a stream). Write it again with a tool that fills it in.")
    if info.frames == 0:
        raise AudioError(
            f"{path}: holds no samples (only a header, or its length was never filled in). Fetch it again."
        )
    return Header(info.samplerate, info.frames, info.channels, info.subtype)


def read(path: str | Path, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, int]:
    """Read a sound file, or a segment of it, as mono at its own rate.

    Args:
        path: File in any format of libsndfile.
        start: First sample.
        stop: Sample after the last; the end of the file by default.

    Returns:
        Samples ``(n,)`` float32 (integer formats in [-1, 1], float formats as they are), and the rate in Hz. Several
        channels are averaged, with a warning.

    Raises:
        AudioError: As :func:`read_header`, or if samples are missing, damaged, NaN or infinite.
        ValueError: If the segment does not lie in the file.
    """
    samples, header = decode(path, start, stop)
    if header.channels > 1:
        warnings.warn(f"{path}: its {header.channels} channels are averaged", UserWarning, stacklevel=2)
    return samples, header.sample_rate


def decode(path: str | Path, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, Header]:
    """Do what :func:`read` does without a warning, and return the whole header."""
    header = read_header(path)
    stop = header.frames if stop is None else stop
    if not 0 <= start <= stop <= header.frames:
        raise ValueError(f"the segment must lie in the {header.frames} samples of {path}, got {start!r} to {stop!r}")
    try:
        with soundfile.SoundFile(path) as file:
            file.seek(start)
            samples = file.read(stop - start, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: is damaged or truncated ({_reason(error)}). Fetch it again.") from error
    if len(samples) < stop - start:
        raise AudioError(
            f"{path}: is truncated, only {len(samples)} of {stop - start} samples from {start} on are there. "
            f"Fetch it again."
        )
    finite = np.isfinite(samples)
    if not finite.all():
        position = start + int(np.argmin(finite.all(axis=1)))
        raise AudioError(f"{path}: sample {position} is NaN or infinite. Fetch it again, or repair the file.")
    return samples[:, 0] if header.channels == 1 else samples.mean(axis=1), header


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
        ImportError: If torchaudio is not installed, or does not fit the installed torch.

    Example:
        >>> resample(np.ones(441, dtype=np.float32), 44100, 16000).shape
        (160,)
    """
    if orig_rate < 1 or new_rate < 1:
        raise ValueError(f"rates must be positive, got {orig_rate!r} and {new_rate!r}")
    if orig_rate == new_rate:
        return waveform
    divisor = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // divisor, new_rate // divisor
    # The filter pads with zeros itself, so zeros at the end change no sample; they give a float32 length room to err.
    padded = np.zeros(len(waveform) + orig, dtype=np.float32)
    padded[: len(waveform)] = waveform
    resampled: np.ndarray = _resampler(orig, new)(torch.from_numpy(padded)).numpy()
    return resampled[: resampled_length(len(waveform), orig, new)]


def resampled_length(frames: Count, orig_rate: Count, new_rate: Count) -> Count:
    """Return how many samples *frames* become: ``ceil(new_rate * frames / orig_rate)``."""
    length: Count = -(-new_rate * frames // orig_rate)
    return length


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
    if pad not in ("repeat", "zero", "reflect"):
        raise ValueError(f"pad must be one of 'repeat', 'zero', 'reflect', got {pad!r}")
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


def _wav_end(file: BinaryIO) -> int | None:
    """Return the position at which the data chunk of a RIFF file ends; ``None`` where the file does not say."""
    container = file.read(12)
    if container[:4] != b"RIFF" or container[8:] != b"WAVE":
        return None
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            return None if size == _UNKNOWN_SIZE else file.tell() + int(size)
        file.seek(size + size % 2, os.SEEK_CUR)  # chunks begin at even positions
    return None


def _reason(error: Any) -> str:
    return str(error.error_string).rstrip(".")  # str(error) repeats the path


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
