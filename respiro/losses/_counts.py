"""Losses that depend on how many train samples each class has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from respiro.component import Loss
from respiro.errors import LabelError

__all__ = ["ClassCounted", "check_counts", "counts_for", "log_prior"]


def check_counts(counts: Sequence[int]) -> list[int]:
    """Return the train samples of each class, every one of which must be positive.

    Raises:
        LabelError: If there are fewer than two classes, a count is not a whole number, or a class has no sample.
    """
    if len(counts) < 2 or any(count % 1 != 0 for count in counts):  # NaN, too, has no remainder of 0
        raise LabelError(
            f"class_counts must hold the whole number of train samples of at least two classes, got {counts!r}"
        )
    found = [int(count) for count in counts]
    for label, count in enumerate(found):
        if count <= 0:
            raise LabelError(
                f"class {label} has {count} train samples, so it has no prior; leave the class out, or train on data "
                f"that has it"
            )
    return found


def counts_for(scores: Tensor, counts: Tensor | Sequence[int]) -> Tensor:
    """Return the class counts ``(C,)`` in float32 or float64, for calculating with the *scores* ``(B, C)``.

    Args:
        scores: Cosines or logits.
        counts: As a tensor, it has been checked by :func:`check_counts`.

    Raises:
        LabelError: If the counts are for another number of classes, or make no sense.
    """
    if not isinstance(counts, Tensor):
        counts = torch.tensor(check_counts(counts))
    if len(counts) != scores.shape[-1]:
        raise LabelError(f"there are {len(counts)} class counts for {scores.shape[-1]} classes")
    return counts.to(scores.device, torch.promote_types(scores.dtype, torch.float32))


def log_prior(counts: Tensor | Sequence[int], scores: Tensor) -> Tensor:
    """Return the logarithm of each class's share of the train samples ``(C,)``; see :func:`counts_for`."""
    exact = counts_for(scores, counts)
    return (exact / exact.sum()).log()


class ClassCounted(Loss):
    """Keeps the class counts of the train split, given by hand or received before training, in the state dict."""

    counts: Tensor | None

    def __init__(self, class_counts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.given = class_counts is not None
        # Whole numbers, which a cast to half precision leaves alone.
        self.register_buffer("counts", None, persistent=False)
        if class_counts is not None:
            self._set(class_counts)

    def use_class_counts(self, counts: Sequence[int]) -> None:
        """Receive the class counts of the train split; counts that were given by hand stay as they are."""
        if not self.given:
            self._set(counts)

    def _set(self, counts: Sequence[int]) -> None:
        place = None if self.counts is None else self.counts.device
        self.counts = torch.tensor(check_counts(counts), device=place)

    def known_counts(self) -> Tensor:
        """Return the counts ``(C,)``.

        Raises:
            RuntimeError: If there are none.
        """
        if self.counts is None:
            raise RuntimeError(
                f"{type(self).__name__} has no class counts yet; pass class_counts=[...], or call "
                f"use_class_counts(counts), with the number of samples per class of the train split"
            )
        return self.counts

    # A list, because a tensor in the state dict would need the number of classes before a strict load.
    def get_extra_state(self) -> list[int] | None:
        """Return the class counts as plain numbers."""
        counts: list[int] | None = None if self.counts is None else self.counts.tolist()
        return counts

    def set_extra_state(self, state: list[int] | None) -> None:
        """Take the class counts from a checkpoint; counts that were given by hand stay as they are."""
        if state is not None:
            self.use_class_counts(state)
