"""What the transforms ask of their arguments and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_floating", "check_positive", "check_waveform", "full_precision"]


def check_positive(**values: float) -> None:
    """Raise a ``ValueError`` for the first value that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")


def check_floating(name: str, shape: str, x: Tensor) -> None:
    """Raise a ``ValueError`` unless *x* is floating point and has as many dimensions as *shape*, ``"(B, T, F)"``."""
    if x.ndim != shape.count(",") + 1 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating point of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")


def check_waveform(waveform: Tensor, samples: int, what: str) -> None:
    """Raise a ``ValueError`` unless *waveform* is ``(B, S)`` with at least the *samples* that *what* needs."""
    check_floating("waveform", "(B, S)", waveform)
    if waveform.shape[1] < samples:
        raise ValueError(
            f"waveform has {waveform.shape[1]} samples, but {what} needs at least {samples}; pad the clips to that"
        )


def full_precision(x: Tensor) -> Tensor:
    """Return *x* in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
