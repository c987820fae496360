"""The order of the train side: shuffled, or in batches of equal classes."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

from respiro.datasets import RespiratoryDataset

__all__ = ["BalancedSampler", "check_samples_per_class", "train_sampler"]


class BalancedSampler(DistributedSampler[int]):
    """Indices that make batches of equal classes.

    A batch has ``batch_size // samples_per_class`` slots, and the classes are dealt to the slots of one batch after the
    other, in a new random order each time all had their turn: of fewer classes than slots some have several, more
    classes than slots take turns. A slot holds ``samples_per_class`` cycles of its class, which are drawn in the same
    way. So no batch holds a cycle twice as long as its class has enough of them, and a rare class is repeated.

    An epoch has as many batches as a shuffled one that keeps its last batch; all are full. Its order depends on the
    labels, the seed and the epoch alone. Processes take turns with its batches. Without :meth:`set_epoch`, every pass
    is an epoch of its own.

    Args:
        labels: Class of each cycle, (N,); those of -1 are left out.
        batch_size: Cycles in a batch of one process.
        samples_per_class: Cycles in a slot; divides *batch_size*.
        num_replicas: Processes.
        rank: Of this process.
        seed: The same on every process.

    Raises:
        ValueError: If *samples_per_class* does not divide *batch_size*, or *rank* is not that of a process.

    Example:
        >>> labels = [0, 0, 0, 0, 0, 0, 1, 1, 2]
        >>> rows = list(BalancedSampler(labels, batch_size=6, samples_per_class=2))
        >>> [sorted(labels[row] for row in batch) for batch in (rows[:6], rows[6:])]
        [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        batch_size: int,
        samples_per_class: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        check_samples_per_class(samples_per_class, batch_size)
        super().__init__(labels, num_replicas, rank, seed=seed)  # type: ignore[arg-type]  # it asks for the length only
        self.labels = np.asarray(labels)
        self.slots = batch_size // samples_per_class
        self.samples_per_class = samples_per_class
        self.num_batches = math.ceil(int((self.labels >= 0).sum()) / (batch_size * num_replicas))
        self.num_samples = self.num_batches * batch_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1  # the next pass is another epoch unless set_epoch says otherwise
        classes = np.unique(self.labels[self.labels >= 0])
        turns = _Deck(classes, rng)
        cycles = {label: _Deck(np.flatnonzero(self.labels == label), rng) for label in classes.tolist()}
        for number in range(self.num_batches * self.num_replicas):
            slots = Counter(turns.deal(self.slots))
            batch = [cycles[label].deal(count * self.samples_per_class) for label, count in slots.items()]
            if number % self.num_replicas == self.rank:
                yield from chain.from_iterable(batch)


class _Deck:
    """Shuffled cards; where too few are left, a shuffled deck is put under them.

    A hand of no more cards than there are holds none twice, and a larger one holds each as often as the others, or once
    more.
    """

    def __init__(self, cards: np.ndarray, rng: np.random.Generator) -> None:
        self.cards = cards
        self.rng = rng
        self.left: deque[int] = deque()

    def deal(self, count: int) -> list[int]:
        """Return the next *count* cards."""
        while len(self.left) < count:
            whole = len(self.left) - len(self.left) % len(self.cards)
            held = set(islice(self.left, whole, None))
            fresh = self.rng.permutation(self.cards).tolist()
            self.left += sorted(fresh, key=held.__contains__)  # a stable sort: those held come last, all else stays
        return [self.left.popleft() for _ in range(count)]


def check_samples_per_class(samples_per_class: int, batch_size: int) -> None:
    """Raise a ``ValueError`` unless batches can be made of so many cycles of each class."""
    if not isinstance(samples_per_class, int | np.integer) or samples_per_class < 1:
        raise ValueError(f"samples_per_class must be a whole number of at least 1, got {samples_per_class!r}")
    if batch_size % samples_per_class:
        raise ValueError(
            f"batch_size must be a multiple of samples_per_class, got {batch_size!r} and {samples_per_class!r}"
        )


def train_sampler(
    data: RespiratoryDataset, trainer: Trainer | None, batch_size: int, samples_per_class: int | None
) -> DistributedSampler[Any] | None:
    """Return what orders the train side, or ``None`` where it is to be shuffled and no trainer counts the epochs.

    Under a trainer the order depends on the seed and the epoch alone. Lightning tells the sampler each epoch, and takes
    it for several processes too, as it is a ``DistributedSampler``.
    """
    world, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
    # Processes must agree on the seed, also where there is none.
    unset = 0 if world > 1 else torch.initial_seed() % 2**32
    seed = int(os.environ.get("PL_GLOBAL_SEED", unset))
    sampler: DistributedSampler[Any] | None = None
    if samples_per_class is not None:
        labels = data.cycles["label"].to_numpy("int64")
        sampler = BalancedSampler(labels, batch_size, samples_per_class, num_replicas=world, rank=rank, seed=seed)
    elif trainer is not None:
        sampler = DistributedSampler(data, world, rank, seed=seed)
    if trainer is not None and sampler is not None:
        # Where a training is resumed, loader processes draw their first batches before Lightning tells the epoch.
        epochs: Any = trainer.fit_loop.epoch_progress.current
        sampler.set_epoch(epochs.processed)
    return sampler
