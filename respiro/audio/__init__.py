"""Sound files and plain waveforms: read a segment, resample, fade, fit to a length."""

from respiro.audio.files import Header, decode, file_stat, read, read_header
from respiro.audio.waveforms import (
    Pad,
    Rounding,
    check_rates,
    fade,
    fit_length,
    positions,
    resample,
    resampled_length,
)

__all__ = [
    "Header",
    "Pad",
    "Rounding",
    "check_rates",
    "decode",
    "fade",
    "file_stat",
    "fit_length",
    "positions",
    "read",
    "read_header",
    "resample",
    "resampled_length",
]
