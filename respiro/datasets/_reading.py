"""How recordings become waveforms: checks of the arguments, and of what the files are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import pandas as pd

from respiro import audio
from respiro.errors import AudioError, check_choice

Fade = Literal["recording", "cycle", "none"]
#: What the recordings were published as; anything else was converted by somebody.
PUBLISHED_ENCODINGS = frozenset({"PCM_16", "PCM_24"})


def check_reading(
    sample_rate: int, duration: float, pad: str, fade: str, resample: str, band: Sequence[float] | None = None
) -> None:
    """Raise a ``ValueError`` for arguments about reading that have no meaning."""
    if not isinstance(sample_rate, int) or sample_rate < 1000:
        raise ValueError(f"sample_rate must be a whole number of at least 1000 Hz, got {sample_rate!r}")
    if not 0.01 <= duration < float("inf"):
        raise ValueError(f"duration must be at least 0.01 s, got {duration!r}")
    check_choice("pad", pad, get_args(audio.Pad))
    check_choice("fade", fade, get_args(Fade))
    check_choice("resample", resample, ("recording", "cycle"))
    audio.check_band(band, sample_rate)
    if fade == "recording" and resample == "cycle":
        raise ValueError(
            "fade='recording' needs resample='recording': a cycle resampled alone has no recording to fade"
        )


def check_encoding(recordings: pd.DataFrame) -> None:
    """Raise an :class:`AudioError` unless every recording is in the published form."""
    odd = recordings[(recordings["channels"] != 1) | ~recordings["encoding"].isin(PUBLISHED_ENCODINGS)]
    if len(odd):
        first = odd.iloc[0]
        raise AudioError(
            f"{len(odd)} of {len(recordings)} recordings are not mono 16- or 24-bit PCM as published (first: "
            f"{first['path']}, {first['channels']} channels, {first['encoding']}). Fetch the original files, or pass "
            f"any_encoding=True to read them as they are, stereo averaged."
        )
