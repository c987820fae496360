"""Optimisers and schedules by name, so that a checkpoint holds them as plain data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from respiro.errors import check_choice

if TYPE_CHECKING:
    from respiro.methods.classifier import SoundClassifier

Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
#: Where the cosine ends, as a share of the peak learning rate.
FLOOR = 0.01


def configure(model: SoundClassifier) -> OptimizerLRScheduler:
    """Return the optimiser of *model* and its schedule, set every step."""
    makers: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if model.optimizer == "sgd" else {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = makers[model.optimizer](parameters, lr=model.lr, weight_decay=model.weight_decay, **extra)
    steps = model.trainer.estimated_stepping_batches
    if steps == float("inf") and (model.schedule != "constant" or model.warmup):
        raise ValueError("the schedule needs to know where training ends; give Trainer max_epochs or max_steps")
    scheduler = LambdaLR(optimizer, lambda step: factor(step, steps, model.schedule, model.warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def factor(step: int, steps: float, schedule: Schedule, warmup: float) -> float:
    """Return the share of the peak learning rate at *step* of *steps*.

    Example:
        >>> [round(factor(step, 4, "cosine", 0.0), 3) for step in range(5)]
        [1.0, 0.855, 0.505, 0.155, 0.01]
        >>> [factor(step, 4, "constant", 0.5) for step in range(4)]
        [0.5, 1.0, 1.0, 1.0]
    """
    rising = math.ceil(steps * warmup) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rising) / max(1, steps - rising))
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def check(optimizer: str, lr: float, weight_decay: float, schedule: str, warmup: float) -> None:
    """Raise a ``ValueError`` for settings without a meaning."""
    check_choice("optimizer", optimizer, get_args(Optimizer))
    check_choice("schedule", schedule, get_args(Schedule))
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be in [0, 1), got {warmup!r}")
