"""Sound files and plain waveforms: read a segment, resample, band-pass, fade, fit to a length."""

from respiro.audio.files import Header, decode, file_stat, read, read_header
from respiro.audio.waveforms import (
    Pad,
    Rounding,
    band_pass,
    check_band,
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
    "band_pass",
    "check_band",
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
