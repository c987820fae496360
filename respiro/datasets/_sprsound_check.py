"""The published numbers of SPRSound, and the comparison with what was read."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pandas as pd

from respiro.datasets._sprsound_files import EVENTS, RECORD_LABELS
from respiro.errors import VerificationError

__all__ = ["INTER_EVENT_IDS", "RECORDINGS", "SPLITS_2022", "event_ids_digest", "verify"]


class Counts(NamedTuple):
    """Published numbers of one split."""

    patients: int
    records: tuple[int, ...]  # in the order of RECORD_LABELS
    events: tuple[int, ...]  # in the order of EVENTS


#: Recordings of each split and release; the releases after 2022 are test sets.
RECORDINGS = {
    2022: {"train": 1949, "inter": 355, "intra": 379},
    2023: {"train": 1949, "test": 871},
    2024: {"train": 1949, "test": 1704},
    2025: {"train": 1949, "test": 1309},
}
SPLITS_2022 = {
    "train": Counts(251, (1303, 177, 126, 248, 95), (5159, 39, 452, 15, 49, 912, 30)),
    "inter": Counts(41, (241, 8, 65, 24, 17), (1040, 0, 305, 0, 3, 80, 1)),
    "intra": Counts(162, (241, 2, 42, 75, 19), (688, 14, 108, 2, 14, 175, 3)),
}
#: SHA-256 of the ids of the 1429 inter events, a value that two other projects arrived at as well.
INTER_EVENT_IDS = "81a6b15783a01eb86abe218928884b41e7f975f64eedaefd546e2dbf3deba44b"


def event_ids_digest(events: pd.DataFrame, split: str) -> str:
    """Return the SHA-256 of the sorted ids ``{split}:{recording}:event_{position in its file}``, one a line.

    Example:
        >>> event_ids_digest(pd.DataFrame({"recording": ["a"], "event_position": [0]}), "inter")[:8]
        '729d4646'
    """
    pairs = zip(events["recording"], events["event_position"], strict=True)
    lines = sorted(f"{split}:{recording}:event_{position:03d}\n" for recording, position in pairs)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(recordings: pd.DataFrame, events: pd.DataFrame, year: int) -> None:
    """Compare every published number of the splits that *recordings* has.

    Raises:
        VerificationError: Names each number that differs, what was expected and what was found.
    """
    wrong = []
    for split, expected in RECORDINGS[year].items():
        side = recordings[recordings["split"] == split]
        if split == "train" and year != 2022 and side.empty:
            continue
        numbers = [(f"{split} recordings", str(expected), str(len(side)))]
        if split in SPLITS_2022:
            inside = events[events["recording"].isin(side["recording"])]
            published = SPLITS_2022[split]
            numbers.append((f"{split} patients", str(published.patients), str(side["patient"].nunique())))
            numbers += _by_label(f"{split} records", RECORD_LABELS, published.records, side["record_label"])
            numbers += _by_label(f"{split} events", EVENTS, published.events, inside["event"])
            if split == "inter":
                numbers.append(("digest of the inter event ids", INTER_EVENT_IDS, event_ids_digest(inside, split)))
        wrong += [f"{name}: expected {number}, found {found}" for name, number, found in numbers if number != found]
    if wrong:
        raise VerificationError(
            f"SPRSound {year} differs from what was published in {len(wrong)} numbers: {'; '.join(wrong)}. "
            f"Files may be missing, doubled or edited; fetch the repository again."
        )


def _by_label(
    what: str, labels: tuple[str, ...], published: tuple[int, ...], found: pd.Series[str]
) -> list[tuple[str, str, str]]:
    return [
        (f"{what} {label!r}", str(number), str(int((found == label).sum())))
        for label, number in zip(labels, published, strict=True)
    ]
