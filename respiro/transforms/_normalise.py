"""Normalisation that the spectrograms share: each clip by itself."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from respiro.errors import check_choice
from respiro.transforms._checks import check_floating

__all__ = ["Normalize", "normalise"]

Normalize = Literal["clip_standard", "none"]


def normalise(log_values: Tensor, how: Normalize) -> Tensor:
    """Return the log values ``(B, T, F)`` of each clip less their mean and divided by their (population) deviation.

    A clip of one value becomes 0, and no gradient flows back to it; so does one whose values differ by no more than
    rounding, as their variance is below the precision of the number type. ``"none"`` returns the values as they are.

    Raises:
        ValueError: If *how* is unknown, or *log_values* is not floating point with three dimensions.

    Example:
        >>> normalise(torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]]), "clip_standard").tolist()
        [[[-1.0, 1.0]], [[0.0, 0.0]]]
    """
    check_choice("normalize", how, get_args(Normalize))
    check_floating("log_values", "(B, T, F)", log_values)
    if how == "none":
        return log_values
    centred = log_values - log_values.mean((1, 2), keepdim=True)
    variance = centred.square().mean((1, 2), keepdim=True)
    flat = variance < torch.finfo(variance.dtype).eps
    scale = torch.where(flat, 1.0, variance).rsqrt()  # not the deviation: the root has no gradient at 0
    return (centred * scale).masked_fill(flat, 0.0)
