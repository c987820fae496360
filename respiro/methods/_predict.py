"""Predictions as tables: of a batch, a data set, or a sound file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from respiro import audio

if TYPE_CHECKING:
    from respiro.methods.classifier import SoundClassifier

#: How sound is read by a model that was not trained on one of our data sets.
AUDIO: dict[str, Any] = {
    "sample_rate": 16000,
    "duration": 8.0,
    "pad": "repeat",
    "fade": "recording",
    "resample": "recording",
    "rounding": "truncate",
    "band": None,
}
BATCH = 32


def table(probabilities: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """Return one row for each cycle of probabilities ``(N, C)``: ``prediction`` and ``p_<class>``.

    Raises:
        ValueError: If a probability is not a number.
    """
    probabilities = probabilities.cpu()
    if bad := (~probabilities.isfinite()).any(dim=1).nonzero().flatten().tolist():
        raise ValueError(
            f"the probabilities of cycle {bad[0]} ({len(bad)} of {len(probabilities)}) are not finite; "
            f"look for values that are not finite in the waveforms and in the weights"
        )
    columns = {f"p_{name}": probabilities[:, label].numpy() for label, name in enumerate(classes)}
    names = np.array(classes, dtype=object)[probabilities.argmax(dim=1).numpy()]
    return pd.DataFrame({"prediction": names} | columns)


def embed_dataset(model: SoundClassifier, data: Any) -> Tensor:
    """Return the embeddings of every cycle of *data* ``(N, D)``."""
    return torch.cat(
        [model._embeddings({"waveform": batch["waveform"]}) for batch in DataLoader(data, batch_size=BATCH)]
    )


def predict_dataset(model: SoundClassifier, data: Any) -> pd.DataFrame:
    """Return the cycles table of *data* with the predictions beside it."""
    batches = DataLoader(data, batch_size=BATCH)
    probabilities = torch.cat([model._probabilities(batch["waveform"]) for batch in batches])
    predictions = table(probabilities, model.classes).set_index(data.cycles.index)
    joined: pd.DataFrame = pd.concat([data.cycles, predictions], axis=1)
    return joined


def predict_file(
    model: SoundClassifier, path: str | Path, cycles: Sequence[tuple[float, float]] | None
) -> pd.DataFrame:
    """Return one row for each cycle of a sound file, or for each window where no cycles are given."""
    header = audio.read_header(path)
    seconds = header.frames / header.sample_rate
    how = model.audio
    times = _windows(seconds, how["duration"]) if cycles is None else _within(cycles, seconds, path)
    waveforms = read_cycles(path, times, **how)
    probabilities = [model._probabilities(part) for part in torch.split(waveforms, BATCH)]
    span = pd.DataFrame(times, columns=["start", "end"])
    return pd.concat([span, table(torch.cat(probabilities), model.classes)], axis=1)


def read_cycles(
    path: str | Path,
    times: Sequence[tuple[float, float]],
    *,
    sample_rate: int,
    duration: float,
    pad: audio.Pad,
    fade: str,
    resample: str,
    rounding: audio.Rounding,
    band: Sequence[float] | None = None,
) -> Tensor:
    """Return the cycles of one file, read as the data sets read them: ``(N, S)``."""
    samples, rate = audio.read(path)
    if resample == "recording":
        samples, rate = _in_band(audio.resample(samples, rate, sample_rate), sample_rate, band), sample_rate
    length = sample_rate // 16
    if fade == "recording":
        samples = audio.fade(samples, length)
    size = round(duration * sample_rate)
    fitted = []
    for (start, end), (first, last) in zip(times, audio.positions(np.array(times), rate, rounding), strict=True):
        cycle = audio.resample(samples[first:last], rate, sample_rate)
        if not len(cycle):
            raise ValueError(f"the cycle from {start:g} s to {end:g} s holds no samples of {path}")
        if resample == "cycle":
            cycle = _in_band(cycle, sample_rate, band)
        if fade == "cycle":
            cycle = audio.fade(cycle, length)
        fitted.append(audio.fit_length(cycle, size, pad, 0 if fade == "none" else length))
    return torch.from_numpy(np.stack(fitted))


def _in_band(samples: np.ndarray, sample_rate: int, band: Sequence[float] | None) -> np.ndarray:
    return samples if band is None else audio.band_pass(samples, sample_rate, band)


def _windows(seconds: float, duration: float) -> list[tuple[float, float]]:
    """Cut the file into windows of one length; the last ends with the file, so that none is a sliver."""
    last = max(0.0, seconds - duration)
    starts = [*np.arange(0.0, last, duration).tolist(), last]
    return [(start, min(start + duration, seconds)) for start in starts]


def _within(cycles: Sequence[tuple[float, float]], seconds: float, path: str | Path) -> list[tuple[float, float]]:
    if not len(cycles):
        raise ValueError("cycles is empty; leave it out to classify the file window by window")
    for number, (start, end) in enumerate(cycles):
        if not 0 <= start < end <= seconds + 0.01:
            raise ValueError(
                f"cycle {number} ({start:g} s to {end:g} s) does not lie within {path}, which is {seconds:g} s long"
            )
    return [(float(start), float(min(end, seconds))) for start, end in cycles]
