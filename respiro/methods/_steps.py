"""What every training step rests on: its own random numbers, batches that are large enough, a finite loss."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from respiro.errors import DivergenceError

__all__ = ["base_seed", "check_batches", "check_loss", "seed"]


def base_seed() -> int:
    """Return the seed of ``seed_everything``, or else torch's, which is another one in every run unless set."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


def seed(*place: int) -> None:
    """Seed torch's random numbers with a hash of *place*: seed, process, epoch, batch."""
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))


def check_batches(trainer: Any, smallest: int) -> None:
    """Find out before training, and not at the end of the first epoch, that its last batch is too small.

    Raises:
        ValueError: If the last batch of an epoch has fewer samples than *smallest*.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return
    samples = len(loader.sampler)  # type: ignore[arg-type]  # a loader with a length has a sampler with one
    whole = loader.drop_last or trainer.num_training_batches < len(loader)  # the last batch of an epoch is not met
    last = loader.batch_size if whole else samples % loader.batch_size or loader.batch_size
    if last < smallest:
        raise ValueError(
            f"{samples} train samples in batches of {loader.batch_size} leave a batch of {last}, but the method needs "
            f"at least {smallest}; give the datamodule {'drop_last=True or ' * (loader.batch_size >= smallest)}"
            f"another batch_size"
        )


def check_loss(loss: Tensor, where: str) -> None:
    """Stop a training that cannot recover.

    Raises:
        DivergenceError: If the loss is not a finite number.
    """
    if not torch.isfinite(loss):
        raise DivergenceError(
            f"the training loss is {loss.item()} in {where}; lower lr, look for waveforms that are not finite, or "
            f"train with precision 32-true or bf16-mixed"
        )
