"""Optimisers and schedules by name, so that a checkpoint holds them as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from respiro.errors import check_choice

if TYPE_CHECKING:
    from respiro.methods.classifier import SoundClassifier

Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["cosine", "epoch-cosine", "cosine-40", "constant"]
#: Schedules that are set once an epoch, and so count whole epochs.
_BY_EPOCH = ("epoch-cosine", "cosine-40")
#: Epochs in which "cosine-40" falls to its floor, and in which it rises again.
_HALF_PERIOD = 40
#: Where the warm-up of "epoch-cosine" begins, as a share of the peak learning rate.
_WARM_FROM = 0.1


def configure(model: SoundClassifier, apart: Sequence[nn.Parameter] = ()) -> OptimizerLRSchedulerConfig:
    """Return the optimiser of *model* and its schedule, set every step.

    Parameters that are kept *apart* get their gradients and no step from it: what moves them is the caller's affair.
    """
    makers: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if model.optimizer == "sgd" else {}
    held = {id(parameter) for parameter in apart}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in held]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if apart:  # in the optimiser all the same, because a gradient scaler looks for gradients there
        groups.append({"params": list(apart), "lr": 0.0, "weight_decay": 0.0})
    optimizer = makers[model.optimizer](groups, lr=model.lr, weight_decay=model.weight_decay, **extra)
    trainer = model.trainer
    steps = trainer.estimated_stepping_batches
    if steps == float("inf") and (model.schedule != "constant" or model.warmup):
        raise ValueError("the schedule needs to know where training ends; give Trainer max_epochs or max_steps")
    endless = trainer.max_epochs in (None, -1)
    limited = trainer.max_steps != -1 and not trainer.fast_dev_run  # type: ignore[attr-defined]  # sets max_steps itself
    if model.schedule in _BY_EPOCH and (endless or limited):
        raise ValueError(f"schedule {model.schedule!r} counts epochs; give Trainer max_epochs, and no max_steps")
    epochs = trainer.max_epochs or 1
    scheduler = LambdaLR(
        optimizer, lambda step: factor(step, steps, model.schedule, model.warmup, model.lr_floor, epochs)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def factor(
    step: int, steps: float, schedule: Schedule, warmup: float = 0.0, floor: float = 0.01, epochs: int = 1
) -> float:
    """Return the share of the peak learning rate at *step* of *steps*, which are *epochs*.

    Example:
        >>> [round(factor(step, 4, "cosine"), 3) for step in range(5)]
        [1.0, 0.855, 0.505, 0.155, 0.01]
        >>> [factor(step, 4, "constant", warmup=0.5) for step in range(4)]
        [0.5, 1.0, 1.0, 1.0]
        >>> [round(factor(step, 4, "epoch-cosine", epochs=2), 3) for step in range(4)]
        [0.505, 0.505, 0.01, 0.01]
        >>> [round(factor(epoch, 400, "cosine-40", epochs=400), 3) for epoch in (0, 20, 40, 80, 399)]
        [1.0, 0.505, 0.01, 1.0, 0.998]
    """
    if schedule == "epoch-cosine":
        return _epoch_cosine(step * epochs / steps, epochs, warmup, floor)
    if schedule == "cosine-40":  # it falls and rises without end (Moummad and Farrugia, 2023, released code)
        return _cosine(_epoch(step * epochs / steps) / _HALF_PERIOD, floor)
    rising = math.ceil(steps * warmup) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return _cosine(min(1.0, (step - rising) / max(1, steps - rising)), floor)


def _cosine(done: float, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def _epoch(elapsed: float) -> int:
    """Return the number of the epoch under way, from 0."""
    # Steps divide into epochs exactly; the small number keeps a rounded-down quotient in its epoch.
    return math.floor(elapsed + 1e-9)


def _epoch_cosine(elapsed: float, epochs: int, warmup: float, floor: float) -> float:
    """Return the cosine at the end of the epoch under way (Bae et al., 2023, released code), *elapsed* in epochs.

    Its first epoch is already below the peak. Its warm-up rises linearly, step by step, to the cosine's value.
    """
    warm = max(1, round(warmup * epochs)) if warmup else 0
    if elapsed < warm:
        return _WARM_FROM + elapsed / warm * (_cosine(warm / epochs, floor) - _WARM_FROM)
    return _cosine(min(1.0, (_epoch(elapsed) + 1) / epochs), floor)


def check(optimizer: str, lr: float, weight_decay: float, schedule: str, warmup: float, lr_floor: float) -> None:
    """Raise a ``ValueError`` for settings without a meaning."""
    check_choice("optimizer", optimizer, get_args(Optimizer))
    check_choice("schedule", schedule, get_args(Schedule))
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be in [0, 1), got {warmup!r}")
    if schedule == "cosine-40" and warmup:
        raise ValueError(f"schedule 'cosine-40' has no warm-up, got warmup={warmup!r}; leave it at 0")
    if not 0 <= lr_floor <= 1:
        raise ValueError(f"lr_floor must be in [0, 1], got {lr_floor!r}")
