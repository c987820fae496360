"""What the margins share: the cross-entropy with the cosine of the true class moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.losses._checks import check_positive
from respiro.losses.classification import IGNORED, check_labels

__all__ = ["Moved", "turned", "with_margin"]

#: The cosines that take the place of those of the true class ``(B,)``, and the derivative of each by the cosine it was;
#: ``None`` where that is 1.
Moved = tuple[Tensor, Tensor | None]

#: Cosines are kept so far from 1 and -1, where the angle has no slope.
NEAREST = 1e-6


def turned(
    own: Tensor, margin: Tensor | float, nearest: float = NEAREST, edge: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``cos(theta + margin)``, and its derivative by ``cos(theta)``: ``sin(theta + margin) / sin(theta)``.

    Args:
        own: Cosines of the angles *theta* ``(B,)``; kept *nearest* away from 1 and -1, so that the slope is finite.
        margin: Radians, ``()`` or ``(B,)``.
        nearest: Positive.
        edge: If given, ``theta + margin`` is kept so far from 0 and pi. Where anything is kept, the slope is 0.

    Example:
        >>> turned(torch.tensor([0.0, 1.0]), margin=0.5)
        (tensor([-0.4794,  0.8769]), tensor([0.8776, 0.0000]))
    """
    inside = own.clamp(nearest - 1, 1 - nearest)
    theta = inside.acos()
    free = inside == own
    angle = theta + margin
    if edge is not None:
        wanted, angle = angle, angle.clamp(edge, math.pi - edge)
        free &= angle == wanted
    return angle.cos(), angle.sin() / theta.sin() * free


def with_margin(cosines: Tensor, labels: Tensor, scale: float, move: Callable[[Tensor], Moved]) -> Tensor:
    """Return the mean cross-entropy of the scaled cosines, after *move* has replaced those of the true class.

    In float32 even under autocast (float64 stays), without the labels of -1. It can be differentiated once.

    Args:
        cosines: ``(B, C)``, in [-1, 1].
        labels: ``(B,)``, int64, -1 = ignored.
        scale: Factor on all cosines.
        move: Gets the cosine of each sample and its true class ``(B,)``, without gradient.

    Raises:
        ValueError: If *scale* is not positive, or the cosines are not floating point of shape ``(B, C)`` or, on a CPU,
            lie outside [-1, 1].
        LabelError: If, on a CPU, a label is no class.
    """
    check_positive("scale", scale)
    check_labels(labels, cosines, "cosines")
    _check_cosines(cosines)
    exact = cosines if cosines.dtype == torch.float64 else cosines.float()
    place = labels.clamp(min=0)[:, None]
    moved, slope = move(exact.detach().gather(1, place).squeeze(1))
    loss: Tensor = _CrossEntropy.apply(exact, labels, place, moved, slope, scale)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``scale * cosines``, those at *place* replaced by *moved*.

    One step, where autograd would take several, each of which takes longer than the arithmetic on a small batch.
    """

    @staticmethod
    def forward(
        ctx: Any, cosines: Tensor, labels: Tensor, place: Tensor, moved: Tensor, slope: Tensor | None, scale: float
    ) -> Tensor:
        known = labels != IGNORED
        moved = moved.where(known, 0.0)  # an ignored sample may have no margin, which is NaN, and NaN times 0 is none
        slope = None if slope is None else slope.where(known, 0.0)
        log_p = cosines.scatter(1, place, moved[:, None]).mul_(scale).log_softmax(1)
        count = known.sum().clamp_(min=1)
        ctx.save_for_backward(log_p, known, count, place, slope)
        ctx.scale = scale
        return F.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="sum") / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Torch's once_differentiable would let the second derivative by way of the embeddings pass, without this part.
        if torch.is_grad_enabled():
            raise RuntimeError("a loss with a margin can be differentiated once only; leave create_graph=True out")
        log_p, known, count, place, slope = ctx.saved_tensors
        pull = log_p.gather(1, place).expm1_()  # p - 1 of the true class
        if slope is not None:
            pull *= slope[:, None]
        pulls = log_p.exp().scatter_(1, place, pull)
        return pulls.mul_((grad * ctx.scale / count * known)[:, None]), None, None, None, None, None


def _check_cosines(cosines: Tensor) -> None:
    if not cosines.is_floating_point():
        raise ValueError(f"cosines must be floating point, got {cosines.dtype}")
    # On a CPU only: on a GPU the look would wait for all that is under way.
    if cosines.device.type == "cpu" and cosines.numel():
        lowest, highest = (value.item() for value in cosines.detach().aminmax())
        if not -1.01 <= lowest <= highest <= 1.01:  # bfloat16 rounds by some thousandths
            hint = "look at the embeddings" if math.isnan(lowest) else "give the head's cosines, not its logits"
            raise ValueError(f"cosines must lie in [-1, 1], got {lowest:g} to {highest:g}; {hint}")
