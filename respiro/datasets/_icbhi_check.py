"""The published numbers of the complete ICBHI 2017 database, and the comparison with what was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from respiro.datasets._icbhi_files import DEVICES, DIAGNOSES, LOCATIONS, Listed, Patient
from respiro.errors import VerificationError

Numbers = dict[str, "int | str"]


class Source(NamedTuple):
    """What the digests are made of."""

    annotations: list[Path]  #: in order of the key
    split: dict[str, Listed]
    demographics: dict[str, Patient]
    diagnosis: dict[str, str]


_PARTIAL = "a partial unpack, or a split file of another copy"
_ANNOTATIONS = "edited annotations"
_FOREIGN = "a diagnosis file with wrong values; fetch ICBHI_Challenge_diagnosis.txt"
_NAMES = "files renamed by hand, or old names that the split file does not list as Meditron"

#: Likeliest cause of a difference, and the numbers it explains.
EXPECTED: tuple[tuple[str, Numbers], ...] = (
    (_PARTIAL, {"recordings": 920, "train recordings": 539, "test recordings": 381}),
    (_PARTIAL, {"patients": 126, "train patients": 79, "test patients": 49}),
    (_PARTIAL, {f"{mode} recordings": number for mode, number in {"mc": 732, "sc": 188}.items()}),
    (
        _PARTIAL,
        {f"{where} recordings": n for where, n in zip(LOCATIONS, (130, 162, 168, 139, 132, 77, 112), strict=True)},
    ),
    (_NAMES, {f"{device} recordings": n for device, n in zip(DEVICES, (127, 87, 60, 646), strict=True)}),
    (_ANNOTATIONS, {"cycles": 6898, "normal": 3642, "crackle": 1864, "wheeze": 886, "both": 506}),
    (
        _ANNOTATIONS,
        {"train cycles": 4142, "train normal": 2063, "train crackle": 1215, "train wheeze": 501, "train both": 363},
    ),
    (
        _ANNOTATIONS,
        {"test cycles": 2756, "test normal": 1579, "test crackle": 649, "test wheeze": 385, "test both": 143},
    ),
    (_FOREIGN, {f"{name} patients": n for name, n in zip(DIAGNOSES, (26, 64, 7, 1, 14, 2, 6, 6), strict=True)}),
    (_FOREIGN, {"healthy cycles": 322, "chronic cycles": 5856, "non-chronic cycles": 720}),
    (_FOREIGN, {"healthy recordings": 35, "chronic recordings": 810, "non-chronic recordings": 75}),
    (
        "an annotation was edited, or its line ends were converted",
        {"annotations SHA-256": "3e20932ad03739ce088ca032b0d9e65a322e866107e27cefc3da5601d30c6eb8"},
    ),
    (
        "a split file that is not the official one",
        {"split SHA-256": "5f76949642262cd30ddd30485f8a6a0f8c1c518939296fbfefefd115be0ed689"},
    ),
    (
        "a demographics file with other values",
        {"demographics SHA-256": "abc062ae528b6325674a02ce0d48e8c9d82fd68aa1f1dfb179427d87f9242e21"},
    ),
    (_FOREIGN, {"diagnosis SHA-256": "7441ccf5bd96ed6c97937cda46de48a20437ff886d3ee0e7af603364863db583"}),
)


def verify(recordings: pd.DataFrame, cycles: pd.DataFrame, source: Source) -> None:
    """Compare with the published numbers.

    Args:
        recordings: All recordings, with ``split`` as published (no recording left out).
        cycles: All cycles, with the columns of *recordings*.
        source: What the digests are made of.

    Raises:
        VerificationError: Names each number that differs, what was expected and found, and the likeliest cause.
    """
    found = dict(_counts(recordings, cycles)) | _digests(source)
    problems = [
        f"{name}: expected {number}, found {found.get(name, 0)} (likeliest cause: {cause})"
        for cause, numbers in EXPECTED
        for name, number in numbers.items()
        if found.get(name, 0) != number
    ]
    if problems:
        raise VerificationError("\n".join(["this is not the ICBHI 2017 database as published:", *problems]))


def _counts(recordings: pd.DataFrame, cycles: pd.DataFrame) -> Iterator[tuple[str, int | str]]:
    sounds = (cycles["crackle"] + 2 * cycles["wheeze"]).map(dict(enumerate(("normal", "crackle", "wheeze", "both"))))
    for side in ("", "train ", "test "):
        here = recordings if not side else recordings[recordings["split"] == side.strip()]
        chosen = sounds if not side else sounds[cycles["split"] == side.strip()]
        yield f"{side}recordings", len(here)
        yield f"{side}patients", here["patient"].nunique()
        yield f"{side}cycles", len(chosen)
        yield from _tally(chosen, side + "{}")
    for column in ("device", "location", "mode"):
        yield from _tally(recordings[column], "{} recordings")
    yield from _tally(recordings.drop_duplicates("patient")["diagnosis"], "{} patients")
    groups = {name: ("healthy", "chronic", "non-chronic")[group] for name, group in DIAGNOSES.items()}
    yield from _tally(recordings["diagnosis"].map(groups), "{} recordings")
    yield from _tally(cycles["diagnosis"].map(groups), "{} cycles")


def _tally(values: pd.Series, form: str) -> Iterator[tuple[str, int]]:
    return ((form.format(value), int(number)) for value, number in values.value_counts().items())


def _digests(source: Source) -> Numbers:
    return {
        "annotations SHA-256": hashlib.sha256(b"".join(path.read_bytes() for path in source.annotations)).hexdigest(),
        "split SHA-256": _digest(f"{key} {listed.side}" for key, listed in source.split.items()),
        "demographics SHA-256": _digest(
            " ".join([patient, *map(_plain, values)]) for patient, values in source.demographics.items()
        ),
        "diagnosis SHA-256": _digest(f"{patient} {name}" for patient, name in source.diagnosis.items()),
    }


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def _plain(value: float | str | None) -> str:
    if value is None:
        return "NA"
    return value if isinstance(value, str) else format(value, "g")
