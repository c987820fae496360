"""What the contrastive losses ask of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["UNKNOWN", "check_embeddings", "check_labels"]

#: Label of a sample whose label is not known.
UNKNOWN = -1


def check_embeddings(**embeddings: Tensor) -> None:
    """Check the shape and type of each of the *embeddings*, and on a CPU that they are finite.

    Raises:
        ValueError: Which names the one that is not floating point of shape ``(B, D)``, or not finite.

    Example:
        >>> check_embeddings(mixed=torch.zeros(3))
        Traceback (most recent call last):
            ...
        ValueError: mixed must be floating point of shape (B, D), got torch.float32 of shape (3,)
    """
    for name, x in embeddings.items():
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape (B, D), got {x.dtype} of shape {tuple(x.shape)}")
        # Normalising and the softmax would hide which one it was. On a CPU only: on a GPU the check would wait for all
        # that is under way, and a loss scaler expects to see such values in the gradients there.
        if x.device.type == "cpu" and not x.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; look at the features and the learning rate")


def check_labels(labels: Tensor, batch: int) -> None:
    """Check the labels of a batch, their range on a CPU only.

    Raises:
        ValueError: If they are not int64 of shape ``(batch,)``, or one is below -1.

    Example:
        >>> check_labels(torch.tensor([0, -2]), batch=2)
        Traceback (most recent call last):
            ...
        ValueError: labels must be classes from 0 on, or -1 where unknown, got [0, -2]
    """
    if labels.dtype != torch.int64 or labels.shape != (batch,):
        raise ValueError(
            f"labels must be int64 of shape ({batch},), one for each embedding, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}; repeat them for every view"
        )
    if labels.device.type == "cpu" and batch and labels.min() < UNKNOWN:
        raise ValueError(f"labels must be classes from 0 on, or -1 where unknown, got {labels.tolist()}")
