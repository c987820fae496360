"""Who trains, who validates, who tests: the published protocols, patient folds, and the audit of two sides.

Cycles of one patient resemble each other more than cycles of one class do, so patients, never cycles, are dealt to
the parts. Recordings without a patient are each taken as a patient of their own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from respiro.datasets._tables import listing, mark_clean
from respiro.splits.audit import require_columns, shared_patients
from respiro.splits.grouping import deal, group_counts, groups_of

__all__ = ["PROTOCOLS", "Split", "patient_folds", "split_cycles"]

_NUM_FOLDS = 5
_FOLDS = {f"patient-fold-{fold}": fold for fold in range(_NUM_FOLDS)}
PROTOCOLS = ("official", "official-clean", *_FOLDS, "random-recording")
#: Share of the recordings that trains under "random-recording", as in the released code that draws them so.
_RANDOM_TRAIN_SHARE = 0.6
_Sides = tuple[pd.DataFrame, pd.DataFrame, list[str]]  # train, test, notes


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a cycles table that train, validate and test.

    Attributes:
        name: The protocol.
        train: Row labels of the cycles table, in its order: ``(n,)``.
        val: Like *train*; empty if nothing was held out.
        test: Like *train*.
        leaky: Whether the protocol deals recordings of one patient to both sides by design.
        seed: What the random choices were drawn with; ``None`` if there were none.
        notes: What a reader of a result must know about the parts.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    leaky: bool = False
    seed: int | None = None
    notes: tuple[str, ...] = ()

    def describe(self, cycles: pd.DataFrame) -> dict[str, Any]:
        """Return the split as plain data for a protocol record.

        Args:
            cycles: The table that was split.

        Returns:
            ``name``, ``leaky``, ``seed``, ``notes``; ``train``, ``val`` and ``test``, each with its number of
            ``patients``, ``recordings`` and ``cycles`` and the number of cycles by class (``classes``); and
            ``shared_patients``, sorted, who are in train or val and in test.
        """
        parts = {"train": cycles.loc[self.train], "val": cycles.loc[self.val], "test": cycles.loc[self.test]}
        names = _class_names(pd.concat(parts.values()))
        return {
            "name": self.name,
            "leaky": self.leaky,
            "seed": self.seed,
            "notes": list(self.notes),
            **{part: _describe_part(table, names) for part, table in parts.items()},
            "shared_patients": shared_patients(pd.concat([parts["train"], parts["val"]]), parts["test"]),
        }


def split_cycles(
    cycles: pd.DataFrame,
    protocol: str = "official",
    val_fraction: float = 0.15,
    seed: int = 0,
    test_splits: str | Sequence[str] = ("test",),
    folds: Mapping[str, int] | None = None,
) -> Split:
    """Deal the rows of a cycles table to train, validation and test.

    Validation is held out of train by patient, stratified by class as well as whole patients allow. A class that only
    one patient has stays in train. Neither part depends on the order of the rows.

    Args:
        cycles: One row a cycle, with ``recording``, ``patient``, ``label``, and for the official protocols ``split``.
            Rows that a label map leaves out (label -1) are in no part.
        protocol: ``"official"``: the ``split`` column as published. ``"official-clean"``: without the train cycles of
            patients who are also in test. ``"patient-fold-0"`` to ``"patient-fold-4"``: that fold of five tests, the
            others train, whatever their split. ``"random-recording"``: 60 % of the recordings, drawn at random, train;
            marked leaky, and there only to explain scores that were obtained so.
        val_fraction: Share of the train cycles to hold out, of every class; 0 for none.
        seed: Of every random choice.
        test_splits: Values of ``split`` that form the test part of the official protocols.
        folds: Fold of each patient, for instance RespireNet's; by default :func:`patient_folds` draws them.

    Raises:
        ValueError: If an argument has no meaning for this table.

    Example:
        >>> table = pd.DataFrame({
        ...     "recording": list("abcd"), "patient": list("1123"), "label": 0, "split": ["train"] * 3 + ["test"],
        ... })
        >>> split = split_cycles(table, val_fraction=0.4)
        >>> split.train.tolist(), split.val.tolist(), split.test.tolist()
        ([0, 1], [2], [3])
    """
    _check_arguments(cycles, protocol, val_fraction, folds)
    named = (test_splits,) if isinstance(test_splits, str) else tuple(test_splits)
    if protocol == "official-clean":
        cycles = mark_clean(cycles, named)
    labelled = cycles[cycles["label"] >= 0]
    if protocol == "random-recording":
        train, test, notes = _random_recordings(labelled, seed)
    elif protocol in _FOLDS:
        train, test, notes = _one_fold(labelled, _FOLDS[protocol], folds, seed)
    else:
        train, test, notes = _official(labelled, named)
    if train.empty or test.empty:
        raise ValueError(f"protocol {protocol!r} leaves {len(train)} train and {len(test)} test cycles of this table")
    notes += _notes_on_rows(cycles, train, test)
    train, val, val_notes = _hold_out(train, val_fraction, seed)
    drawn = protocol == "random-recording" or (protocol in _FOLDS and folds is None) or val_fraction > 0
    return Split(
        name=protocol,
        train=train.index.to_numpy(),
        val=val.index.to_numpy(),
        test=test.index.to_numpy(),
        leaky=protocol == "random-recording",
        seed=seed if drawn else None,
        notes=(*notes, *val_notes),
    )


def patient_folds(cycles: pd.DataFrame, num_folds: int = 5, seed: int = 0) -> pd.Series[int]:
    """Deal the patients to folds of equal size and class distribution, as well as whole patients allow.

    Args:
        cycles: One row a cycle, with ``recording``, ``patient`` and ``label``; labels of -1 are left out.
        num_folds: At least 2, at most one a patient.
        seed: Of the order in which patients are dealt.

    Returns:
        Fold (0 to *num_folds* - 1) of each patient, indexed by patient, sorted. A recording without a patient stands
        under its own name.

    Raises:
        ValueError: If there are fewer patients than folds.

    Example:
        >>> table = pd.DataFrame({"recording": list("abcd"), "patient": list("1234"), "label": [0, 0, 1, 1]})
        >>> folds = patient_folds(table, num_folds=2)
        >>> sorted(folds[["1", "2"]]), sorted(folds[["3", "4"]])
        ([0, 1], [0, 1])
    """
    require_columns(cycles, ("recording", "patient", "label"), "cycles")
    counts = group_counts(cycles[cycles["label"] >= 0])
    if not 2 <= num_folds <= len(counts):
        raise ValueError(f"num_folds must be from 2 to the number of patients, {len(counts)}, got {num_folds!r}")
    part = deal(counts.to_numpy(), [1 / num_folds] * num_folds, seed)
    return pd.Series(part, index=pd.Index(counts.index, name="patient"), name="fold")


def _check_arguments(cycles: pd.DataFrame, protocol: str, val_fraction: float, folds: Mapping[str, int] | None) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {_quoted(PROTOCOLS)}, got {protocol!r}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction!r}")
    if folds is not None and protocol not in _FOLDS:
        raise ValueError(f"folds belong to the protocols {_quoted(_FOLDS)}, got protocol {protocol!r}")
    by_split = ("split",) if protocol.startswith("official") else ()
    require_columns(cycles, ("recording", "patient", "label", *by_split), "cycles")
    if not cycles.index.is_unique:
        raise ValueError("cycles has row labels that occur twice; call cycles.reset_index(drop=True) first")


def _official(cycles: pd.DataFrame, test_splits: tuple[str, ...]) -> _Sides:
    found = sorted(cycles["split"].dropna().unique())
    if not test_splits or "train" in test_splits or not {"train", *test_splits} <= set(found):
        raise ValueError(
            f"test_splits must name splits of the table beside 'train', which must have cycles too, got "
            f"{test_splits!r}; this table has {_quoted(found)}"
        )
    train, test = cycles[cycles["split"] == "train"], cycles[cycles["split"].isin(test_splits)]
    both = shared_patients(train, test)
    return train, test, [f"in train and in test: {_patients(both)}"] if both else []


def _one_fold(cycles: pd.DataFrame, fold: int, folds: Mapping[str, int] | None, seed: int) -> _Sides:
    given = patient_folds(cycles, _NUM_FOLDS, seed) if folds is None else folds
    fold_of = groups_of(cycles).map(dict(given.items()))
    if fold_of.isna().any():
        missing = sorted(groups_of(cycles)[fold_of.isna()].unique())
        raise ValueError(f"folds names no fold for {len(missing)} patients of the table (first: {missing[0]!r})")
    in_fold = fold_of == fold
    if in_fold.all() or not in_fold.any():
        raise ValueError(f"fold {fold} must hold some but not all patients; folds has {sorted(set(map(int, fold_of)))}")
    source = f"drawn with seed {seed}" if folds is None else "as given"
    return cycles[~in_fold], cycles[in_fold], [f"patient folds {source}"]


def _random_recordings(cycles: pd.DataFrame, seed: int) -> _Sides:
    recordings = sorted(cycles["recording"].unique())
    # Python's own generator and this order of calls: with seed 1, the released code's 552 of 920 ICBHI recordings.
    random.Random(seed).shuffle(recordings)
    in_train = cycles["recording"].isin(recordings[: int(_RANDOM_TRAIN_SHARE * len(recordings))])
    train, test = cycles[in_train], cycles[~in_train]
    both, of = len(shared_patients(train, test)), test["patient"].nunique()
    why = f"LEAKY: recordings, not patients, were dealt at random; {both} of {of} test patients are also in train"
    return train, test, [why]


def _hold_out(train: pd.DataFrame, fraction: float, seed: int) -> _Sides:
    if fraction == 0:
        return train, train.iloc[:0], []
    counts = group_counts(train)
    held = counts.to_numpy() > 0
    sole = np.asarray(held[:, held.sum(axis=0) == 1].any(axis=1))
    part = deal(counts.to_numpy(), (1 - fraction, fraction), seed, kept=sole)
    in_val = groups_of(train).isin(counts.index[part == 1])
    rest, val, notes = train[~in_val], train[in_val], []
    for label, name in _class_names(train).items():
        for which, table in (("train", rest), ("validation", val)):
            if not (table["label"] == label).any():
                holders = int((counts[label] > 0).sum())
                notes.append(f"no {name!r} in {which}; patients who have it: {holders}")
    if abs(len(val) / len(train) - fraction) > 0.05:
        notes.append(
            f"validation holds {len(val) / len(train):.0%} of the train cycles, not {fraction:.0%}: few patients"
        )
    return rest, val, notes


def _notes_on_rows(cycles: pd.DataFrame, train: pd.DataFrame, test: pd.DataFrame) -> list[str]:
    notes = []
    unlabelled = cycles["label"] < 0
    if unlabelled.any():
        notes.append(f"{unlabelled.sum()} cycles are in no part, the label map leaves them out")
    if "split" in cycles:
        unused = cycles[~unlabelled & ~cycles["split"].isin([*train["split"], *test["split"]])]
        for name, table in unused.groupby("split", dropna=False):
            patients = _patients(sorted(groups_of(table).unique()))
            notes.append(f"{len(table)} cycles are in no part, their split is {name!r}: {patients}")
    lone = cycles.loc[cycles["patient"].isna(), "recording"].nunique()
    if lone:
        notes.append(f"{lone} recordings name no patient; each is taken as a patient of its own")
    return notes


def _describe_part(table: pd.DataFrame, names: dict[int, str]) -> dict[str, Any]:
    return {
        "patients": int(groups_of(table).nunique()),
        "recordings": int(table["recording"].nunique()),
        "cycles": len(table),
        "classes": {name: int((table["label"] == label).sum()) for label, name in names.items()},
    }


def _class_names(cycles: pd.DataFrame) -> dict[int, str]:
    """Return the name of each label that occurs, in the order of the labels."""
    names = cycles["class"] if "class" in cycles else cycles["label"].astype(str)
    pairs = pd.DataFrame({"label": cycles["label"], "name": names}).drop_duplicates("label").sort_values("label")
    return {int(label): str(name) for label, name in zip(pairs["label"], pairs["name"], strict=True)}


def _patients(names: Sequence[str]) -> str:
    return f"patients {listing(names, 5)}"


def _quoted(names: Sequence[str] | Mapping[str, int]) -> str:
    return ", ".join(map(repr, names))
