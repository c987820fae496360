"""Embeddings of all processes, with gradients that find their way back to the process that made them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["gather_with_grad"]


def gather_with_grad(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes in the order of their ranks, and where this process's own rows begin.

    Every process takes part, and each must run backward if one does: the gradient of a row is the sum of what all
    processes ask of it. If every process takes the mean over its own rows, the mean over the processes, which is what
    DistributedDataParallel makes of the gradients, is then the loss of one process that holds the whole batch.
    Comparing the batch sizes waits for a GPU; to gather unequal ones would hang instead.

    Args:
        x: ``(B, ...)``, of the same shape on every process.

    Returns:
        ``(W * B, ...)`` of *W* processes and the offset ``rank * B``; *x* itself and 0 without other processes.

    Raises:
        ValueError: On every process, if they hold different numbers of rows.

    Example:
        >>> gather_with_grad(torch.tensor([1.0, 2.0]))
        (tensor([1., 2.]), 0)
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x, 0
    rows = _all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    if len(set(rows)) > 1:
        raise ValueError(
            f"the processes hold batches of {rows}, but only equal ones can be gathered; "
            f"give the datamodule drop_last=True, or the loss gather=False"
        )
    gathered: Tensor = _AllGather.apply(x)
    return gathered, dist.get_rank() * len(x)


class _AllGather(torch.autograd.Function):  # torch's own, in torch.distributed.nn, is deprecated
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.own = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        return _all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # reduced in place, and autograd may need it again
        dist.all_reduce(grad)
        return grad[ctx.own]


def _all_gather(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
