"""Several front ends on the same waveform, their features side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from respiro.component import Transform
from respiro.transforms._checks import check_positive

__all__ = ["StackedFeatures"]


class StackedFeatures(Transform):
    """Features of several front ends side by side, so that one network can see all of them.

    A front end is a transform of respiro or any other module that takes ``(B, S)`` to ``(B, T, num_features)`` and has
    that attribute. The checkpoint of a method rebuilds those of respiro and asks for others.

    Args:
        features: The front ends, one at least, all for one sampling rate.
        frames: Number of frames that each front end's features are brought to: averaged along time where there are more
            (over windows that cover them all), linearly interpolated where there are fewer, left alone where there are
            as many. It fits one duration: longer clips are squeezed into as many frames. By default all front ends must
            give the same number by themselves.

    Shape:
        waveform ``(B, S)``; returns ``(B, T, F1 + F2 + ...)``, with ``T = frames`` if that is given. ``bins`` lists the
        ``F1, F2, ...`` and ``num_features`` is their sum.

    Raises:
        TypeError: If a front end has no ``num_features``.
        ValueError: If there is no front end, their sampling rates differ, or ``frames`` is not positive; when called,
            if their features have other bins than announced, or different numbers of frames without ``frames``.

    Example:
        >>> from respiro.transforms.features import LogMelSpectrogram
        >>> from respiro.transforms.gammatone import GammatoneSpectrogram
        >>> stacked = StackedFeatures([GammatoneSpectrogram(), LogMelSpectrogram(8000)], frames=154)
        >>> stacked(torch.zeros(2, 32000)).shape, stacked.bins
        (torch.Size([2, 154, 188]), [124, 64])
    """

    def __init__(self, features: list[Transform], frames: int | None = None) -> None:
        super().__init__()
        if not features:
            raise ValueError(f"features must hold one front end at least, got {features!r}")
        if frames is not None:
            check_positive(frames=frames)
        self.bins = [_bins(part) for part in features]
        self.num_features = sum(self.bins)
        rates = [getattr(part, "sample_rate", None) for part in features]
        known = [rate for rate in rates if rate is not None]
        if len(set(known)) > 1:
            raise ValueError(f"the front ends must have the same sample_rate, got {_listing(features, rates)}")
        if known:  # absent otherwise, for a method to go by its default
            self.sample_rate = known[0]
        self.frames = frames
        self.parts = nn.ModuleList(features)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the features of all front ends ``(B, T, F1 + F2 + ...)``."""
        spectrograms = [part(waveform) for part in self.parts]
        for part, bins, spectrogram in zip(self.parts, self.bins, spectrograms, strict=True):
            if spectrogram.ndim != 3 or spectrogram.shape[2] != bins:
                raise ValueError(
                    f"{type(part).__name__} must give features of shape (B, T, {bins}), as its num_features says, "
                    f"got {tuple(spectrogram.shape)}"
                )
        frames = [spectrogram.shape[1] for spectrogram in spectrograms]
        if self.frames is not None:
            spectrograms = [_to_frames(spectrogram, self.frames) for spectrogram in spectrograms]
        elif len(set(frames)) > 1:
            raise ValueError(
                f"the front ends give different numbers of frames: {_listing(self.parts, frames)}; give them the same "
                f"hop in samples, or pass frames=... to bring them to one number"
            )
        return torch.cat(spectrograms, dim=2)


def _bins(part: nn.Module) -> int:
    bins: int | None = getattr(part, "num_features", None)
    if bins is None:
        raise TypeError(f"{type(part).__name__} has no num_features, the number of its bins; give it that attribute")
    return bins


def _listing(parts: Iterable[nn.Module], values: Iterable[int | None]) -> str:
    return ", ".join(f"{type(part).__name__} {value!r}" for part, value in zip(parts, values, strict=True))


def _to_frames(features: Tensor, frames: int) -> Tensor:
    """Return features ``(B, T, F)`` averaged or interpolated along time to as many frames."""
    if features.shape[1] == frames:
        return features
    mode = "area" if features.shape[1] > frames else "linear"
    return interpolate(features.transpose(1, 2), frames, mode=mode).transpose(1, 2)
