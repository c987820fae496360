"""Checks of the numbers that losses are built with; each returns the number as a float."""

from __future__ import annotations

import math

__all__ = ["check_angle", "check_cosine_margin", "check_not_negative", "check_positive"]


def check_positive(name: str, value: float) -> float:
    """Return a number that must be positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    """Return a number that must be finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return float(value)


def check_cosine_margin(name: str, value: float) -> float:
    """Return a margin on cosines, which are at most 2 apart: it must lie in [0, 2)."""
    if not 0 <= value < 2:
        raise ValueError(f"{name} is a difference of cosines and must lie in [0, 2), got {value!r}")
    return float(value)


def check_angle(name: str, value: float) -> float:
    """Return an angle that must lie in [0, pi).

    Example:
        >>> check_angle("margin", 28.6)
        Traceback (most recent call last):
            ...
        ValueError: margin must be in radians, in [0, pi), got 28.6 (28.6 degrees are 0.4992 radians)
    """
    if not 0 <= value < math.pi:
        degrees = f" ({value:g} degrees are {math.radians(value):.4g} radians)" if math.pi <= value <= 180 else ""
        raise ValueError(f"{name} must be in radians, in [0, pi), got {value!r}{degrees}")
    return float(value)
