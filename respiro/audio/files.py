"""Sound files: headers and samples, read with libsndfile. The only module that opens a sound file."""

from __future__ import annotations

import os
import stat
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from respiro.errors import AudioError

__all__ = ["Header", "decode", "file_stat", "read", "read_header"]

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
