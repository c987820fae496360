"""The mathematics of supervised contrast: among the samples of all processes and of a memory, a block at a time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from respiro.component import unit
from respiro.losses._embeddings import UNKNOWN, check_embeddings, check_labels
from respiro.losses._gather import gather_with_grad

__all__ = ["Contrast", "Denominator", "Samples", "anchor_losses", "contrast"]

Denominator = Literal["all", "negatives"]

_BLOCK = 2**22  # similarities at a time: 16 MiB


class Samples(NamedTuple):
    """Unit embeddings ``(N, D)`` and their labels ``(N,)``, int64, -1 = unknown."""

    embeddings: Tensor
    labels: Tensor


class Contrast(NamedTuple):
    """What comes of a batch."""

    #: Mean over the anchors, a scalar.
    loss: Tensor
    #: How many anchors of this process have a label but nothing to contrast, a scalar.
    left_out: Tensor
    #: The batch of all processes.
    batch: Samples


def contrast(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float,
    denominator: Denominator,
    gather: bool,
    memory: Samples | None = None,
) -> Contrast:
    """Contrast a batch with itself and with a *memory*, whose samples are no anchors.

    Args:
        embeddings: ``(N, D)``, of any length.
        labels: ``(N,)``, int64, -1 = unknown.
        temperature: Divides the cosine similarities; positive.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Contrast with the batches of all processes.
        memory: Embeddings of the same width.

    Raises:
        ValueError: If embeddings and labels do not fit each other or the memory.
    """
    check_embeddings(embeddings=embeddings)
    check_labels(labels, len(embeddings))
    with torch.autocast(embeddings.device.type, enabled=False):
        z, first = unit(embeddings), 0
        if gather:
            z, first = gather_with_grad(z)
            labels, _ = gather_with_grad(labels)
        batch, own = Samples(z, labels), slice(first, first + len(embeddings))
        losses, usable = anchor_losses(_with(memory, batch), own, temperature, denominator)
    usable = usable[: len(labels)]
    # An equal share of the anchors of all processes, and not the number of its own, so that the mean over the processes
    # is the mean over all anchors.
    anchors = usable.sum().to(losses) * (len(embeddings) / max(len(labels), 1))
    left_out = (~usable & (labels != UNKNOWN))[own].sum()
    return Contrast(losses.sum() / anchors.where(anchors > 0, 1.0), left_out, batch)


def anchor_losses(
    samples: Samples, own: slice, temperature: float, denominator: Denominator, block: int = _BLOCK
) -> tuple[Tensor, Tensor]:
    """Return the loss of each anchor, 0 where there is nothing to contrast, and where there is something.

    Args:
        samples: What to contrast with, *N* unit embeddings.
        own: Which of them are the anchors, *B* rows.
        temperature: Divides the similarities.
        denominator: ``"all"`` or ``"negatives"``.
        block: Similarities to hold at a time.

    Returns:
        Losses ``(B,)``, and for all samples whether they are usable as anchors ``(N,)``.

    Example:
        >>> anchor_losses(Samples(torch.eye(3), torch.tensor([0, 0, 1])), slice(0, 3), 1.0, "all")
        (tensor([0.6931, 0.6931, 0.0000]), tensor([ True,  True, False]))
    """
    z, labels = samples
    anchors = z[own] / temperature
    place, count = _classes(labels)
    positives = count - 1
    known = labels != UNKNOWN
    usable = known & (positives > 0)
    if denominator == "negatives":
        usable &= count < known.sum()
    # The mean similarity to the positives is the similarity to their mean.
    of_class = torch.zeros_like(z).index_add(0, place, z)[place[own]]
    to_positives = (anchors * (of_class - z[own])).sum(1) / positives[own].clamp(min=1)
    # Either a sample is kept apart from itself alone, or from all of its class.
    group = labels if denominator == "negatives" else torch.arange(len(z), device=z.device)
    log_sums: Tensor = _LogSumExp.apply(anchors, z, group[own], group, known, max(block // max(len(z), 1), 1))
    return (log_sums - to_positives).where(usable[own], 0.0), usable


class _LogSumExp(torch.autograd.Function):
    """For each anchor, the logarithm of the sum of the exponentials of its similarities to all of other groups.

    Some anchors at a time, in backward once more, so that no more than their similarities are ever held. Torch's own
    checkpoint takes longer for it, and more memory.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, keys: Tensor, own_group: Tensor, group: Tensor, known: Tensor, at_a_time: int
    ) -> Tensor:
        ctx.parts = [slice(first, first + at_a_time) for first in range(0, len(anchors), at_a_time)]
        log_sums = anchors.new_empty(len(anchors))
        for part in ctx.parts:
            log_sums[part] = _similarities(anchors[part], keys, own_group[part], group, known).logsumexp(1)
        ctx.save_for_backward(anchors, keys, own_group, group, known, log_sums)
        return log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, keys, own_group, group, known, log_sums = ctx.saved_tensors
        grad_anchors, grad_keys = torch.empty_like(anchors), torch.zeros_like(keys)
        with torch.autocast(grad.device.type, enabled=False):
            for part in ctx.parts:
                similarities = _similarities(anchors[part], keys, own_group[part], group, known)
                softmax = similarities.sub_(log_sums[part, None]).exp_().mul_(grad[part, None])
                torch.mm(softmax, keys, out=grad_anchors[part])
                grad_keys.addmm_(softmax.T, anchors[part])
        return grad_anchors, grad_keys, None, None, None, None


def _similarities(anchors: Tensor, keys: Tensor, own_group: Tensor, group: Tensor, known: Tensor) -> Tensor:
    apart = (own_group[:, None] == group).logical_or_(~known)
    # Not minus infinity, which has no softmax where nothing is contrasted.
    return (anchors @ keys.T).masked_fill_(apart, torch.finfo(anchors.dtype).min)


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each label a number below N that all of its class share, and the size of the class.

    By sorting, as torch's unique waits for a GPU to know how many there are.
    """
    ordered = labels.sort().values
    place = torch.searchsorted(ordered, labels)
    return place, torch.searchsorted(ordered, labels, right=True) - place


def _with(memory: Samples | None, batch: Samples) -> Samples:
    if memory is None:
        return batch
    if memory.embeddings.shape[1] != batch.embeddings.shape[1]:
        raise ValueError(
            f"embeddings of {batch.embeddings.shape[1]} numbers cannot be contrasted with a memory of embeddings of "
            f"{memory.embeddings.shape[1]}; use a loss for each projector"
        )
    return Samples(*(torch.cat([new, old.to(new)]) for new, old in zip(batch, memory, strict=True)))
