"""What the losses on mixed batches ask of them."""

from __future__ import annotations

import torch
from torch import Tensor

from respiro.component import check_partners

__all__ = ["check_mixed"]


def check_mixed(index: Tensor, lam: Tensor | float, batch: int) -> None:
    """Check the partners and the shares kept of a mixed batch, their ranges on a CPU only.

    Args:
        index: Partner of each sample ``(B,)``, int64.
        lam: Share of its own that a sample kept, ``()`` or ``(B,)``.
        batch: Number of samples.

    Raises:
        ValueError: If a shape or type does not fit, a partner is not in the batch, or a share not in [0, 1].

    Example:
        >>> check_mixed(torch.tensor([1, 0]), 1.5, batch=2)
        Traceback (most recent call last):
            ...
        ValueError: lam must lie in [0, 1], got 1.5
    """
    check_partners(index, batch)
    shares = torch.as_tensor(lam)
    if shares.shape not in ((), (batch,)):
        raise ValueError(f"lam must be one share, or one for each of {batch} samples, got shape {tuple(shares.shape)}")
    if shares.device.type == "cpu" and not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"lam must lie in [0, 1], got {shares.tolist()}")
