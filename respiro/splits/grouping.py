"""Dealing whole patients to parts so that every part gets its share of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

#: Orders that are tried. More buys little: at 256, ICBHI validation parts and folds are within 3 points of every class.
_TRIES = 256


def groups_of(cycles: pd.DataFrame) -> pd.Series[str]:
    """Return what each cycle may not be parted from: its patient, or its recording if the patient is unknown."""
    patient = cycles["patient"].astype(object)
    return patient.where(patient.notna(), cycles["recording"])


def group_counts(cycles: pd.DataFrame) -> pd.DataFrame:
    """Return the number of cycles of each group (sorted rows) and label (sorted columns)."""
    return pd.crosstab(groups_of(cycles).to_numpy(), cycles["label"].to_numpy())


def deal(counts: np.ndarray, shares: Sequence[float], seed: int, kept: np.ndarray | None = None) -> np.ndarray:
    """Deal groups to parts, each of which wants its share of all cycles and of the cycles of every class.

    The groups are shuffled, and one after the other goes to the part that still needs most of what it brings. That is
    the greedy step on the squared error of the shares: adding ``x`` to part ``p`` changes it by ``x * (x - 2 need_p)``.
    A class comes first when a part lacks it and no holder can be spared. Of many shuffles the one that leaves the
    fewest classes missing, then the smallest error, is kept.

    Shuffles, and not the largest group first: since a small part is served last, it would be made of small groups
    only, and the groups of one size share more than that (in ICBHI, the device).

    Args:
        counts: Cycles by group and class, ``(G, C)``.
        shares: Wanted share of each part; they sum to 1.
        seed: Of the shuffles.
        kept: Groups that stay in part 0, ``(G,)`` bool.

    Returns:
        The part of each group, ``(G,)`` int64.
    """
    brings = np.column_stack([counts, counts.sum(axis=1)]).astype(float)  # the last column: all cycles
    brings = brings / brings.sum(axis=0)
    num_groups, num_wants = brings.shape
    orders = np.random.default_rng(seed).random((_TRIES, num_groups)).argsort(axis=1)
    tries = np.arange(_TRIES)
    need = np.tile(np.asarray(shares, dtype=float)[:, None], (_TRIES, 1, num_wants))
    lacks = np.ones(need.shape, dtype=bool)
    holders_left = np.tile((brings > 0).sum(axis=0), (_TRIES, 1))
    part = np.zeros((_TRIES, num_groups), dtype=np.int64)
    for group in orders.T:  # the next group of every try
        x = brings[group]
        urgent = lacks & ((x > 0) & (holders_left <= lacks.sum(axis=1)))[:, None]
        # Rounded: a tie must not be broken by how a processor adds up. A need is below 1, so urgency outweighs it.
        score = np.round((need * x[:, None]).sum(axis=2), 9) + 10 * num_wants * urgent.sum(axis=2)
        if kept is not None:
            score[kept[group], 0] = np.inf
        chosen = score.argmax(axis=1)
        part[tries, group] = chosen
        need[tries, chosen] -= x
        lacks[tries, chosen] &= x == 0
        holders_left -= x > 0
    error = np.round((need**2).sum(axis=(1, 2)), 9)
    missing = np.round(
        lacks.sum(axis=2) @ np.asarray(shares), 9
    )  # worse in a larger part: train comes before validation
    best = int(np.lexsort((error, missing))[0])
    return np.asarray(part[best])
