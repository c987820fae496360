"""The files of the ICBHI 2017 database: finding them in any of the circulating layouts, and reading their text."""

from __future__ import annotations

import filecmp
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from respiro.datasets._tables import WAY_OUT, Row, read_rows, unique
from respiro.errors import AnnotationError, AudioError, DatasetNotFoundError, RespiroError

#: Where the challenge page keeps its files.
BASE_URL = "https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database/"
ARCHIVE = "ICBHI_final_database.zip"
DEVICES = ("Meditron", "LittC2SE", "Litt3200", "AKGC417L")
LOCATIONS = ("Tc", "Al", "Ar", "Pl", "Pr", "Ll", "Lr")
#: Diagnosis to class: healthy 0, chronic 1, non-chronic 2 (Bae et al., 2023).
DIAGNOSES = {
    "Healthy": 0,
    "COPD": 1,
    "Bronchiectasis": 1,
    "Asthma": 1,
    "URTI": 2,
    "LRTI": 2,
    "Pneumonia": 2,
    "Bronchiolitis": 2,
}
#: Side files, official name first. The Kaggle copy and Patch-Mix's release have their own names.
SIDE_FILES = {
    "split": ("ICBHI_challenge_train_test.txt", "official_split.txt"),
    "demographics": (
        "ICBHI_Challenge_demographic_information.txt",
        "demographic_info.txt",
        "demographic_info.csv",
        "metadata.txt",
    ),
    "diagnosis": ("ICBHI_Challenge_diagnosis.txt", "patient_diagnosis.csv", "patient_diagnosis.txt"),
}
#: What the folder with the sound is called in the three layouts.
SOUND_FOLDERS = ("ICBHI_final_database", "audio_and_txt_files", "audio_test_data")
SOUND_SUFFIXES = (".wav", ".flac")
#: How far a cycle may reach beyond its recording, in seconds, and is clipped to it.
END_TOLERANCE = 0.010

_STEM = re.compile(r"(\d{3})_(\d[bp]\d)_(Tc|[APL][lr])_(mc|sc)_(AKGC417L|LittC2SE|Litt3200|Meditron)")
_PATIENT = re.compile(r"\d{3}")
_KIND = {name.lower(): kind for kind, names in SIDE_FILES.items() for name in names}
_KIND["filename_differences.txt"] = "old names"


class Name(NamedTuple):
    """The fields of a recording's name. The first four are its key; the device is an attribute."""

    patient: str
    number: str
    location: str
    mode: str
    device: str

    @property
    def key(self) -> str:
        """What identifies the recording, whatever device its name carries."""
        return "_".join(self[:4])

    @property
    def recording(self) -> str:
        """The whole name."""
        return "_".join(self)


class Patient(NamedTuple):
    """Demographics of a patient, ``None`` where unknown."""

    age: float | None  #: years
    sex: str | None
    bmi: float | None  #: adults
    weight: float | None  #: kg, children
    height: float | None  #: cm, children


class Recording(NamedTuple):
    """A recording on disk."""

    name: Name  #: as the file is called
    sound: Path
    annotation: Path


class Listed(NamedTuple):
    """What the split file says about a recording."""

    name: Name  #: the first name it is listed under
    side: str
    devices: frozenset[str]  #: of all names it is listed under


class Cycle(NamedTuple):
    """One line of an annotation: seconds and flags."""

    start: float
    end: float
    crackle: int
    wheeze: int


class Tree(NamedTuple):
    """What lies under the root."""

    recordings: dict[str, Recording]  #: by key, sorted; those that have sound and annotation
    alone: list[Path]  #: sound files without annotation, and the reverse
    side_files: dict[str, list[Path]]  #: split, demographics, diagnosis, old names
    ignored: list[Path]  #: sound files whose name is not one of the database


def parse_name(stem: str) -> Name | None:
    """Return the fields of a file's stem, ``None`` if it is not a name of the database."""
    match = _STEM.fullmatch(stem)
    return Name(*match.groups()) if match else None


def scan(root: Path) -> Tree:
    """Find recordings and side files anywhere under *root*, by name.

    Raises:
        DatasetNotFoundError: If *root* is not a folder.
        AudioError: If one recording is there twice with different content.
        AnnotationError: The same for annotations.
    """
    if not root.is_dir():
        raise DatasetNotFoundError(f"ICBHI not found: {root} is not a folder. {how_to_get(root)}")
    sound: dict[str, list[tuple[Name, Path]]] = {}
    text: dict[str, list[tuple[Name, Path]]] = {}
    side_files: dict[str, list[Path]] = {kind: [] for kind in _KIND.values()}
    ignored: list[Path] = []
    for path in _files(root):
        name, suffix = parse_name(path.stem), path.suffix.lower()
        if name and suffix in (*SOUND_SUFFIXES, ".txt"):
            (text if suffix == ".txt" else sound).setdefault(name.key, []).append((name, path))
        elif path.name.lower() in _KIND:
            side_files[_KIND[path.name.lower()]].append(path)
        elif suffix in SOUND_SUFFIXES:
            ignored.append(path)
    sounds, annotations = _one_each(sound, AudioError), _one_each(text, AnnotationError)
    recordings = {
        key: Recording(*sounds[key], annotations[key][1]) for key in sorted(sounds.keys() & annotations.keys())
    }
    alone = sorted(path for key, (_, path) in [*sounds.items(), *annotations.items()] if key not in recordings)
    return Tree(recordings, alone, side_files, ignored)


def _files(root: Path) -> Iterator[Path]:
    """Every file, in an order that does not depend on the disk. Links are followed, and no folder is read twice."""
    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = Path(folder).resolve()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # Hidden folders hold what is not finished (an archive being unpacked) or not meant (checkpoints of notebooks).
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names))
    # Whoever points at the sound folder itself has the side files beside it.
    if root.resolve().name in SOUND_FOLDERS:
        parent = root.resolve().parent
        yield from sorted(path for path in parent.iterdir() if path.name.lower() in _KIND)


def _raise(error: OSError) -> NoReturn:
    raise error


def _one_each(found: dict[str, list[tuple[Name, Path]]], error: type[RespiroError]) -> dict[str, tuple[Name, Path]]:
    twice = [paths for paths in found.values() if len(paths) > 1]
    for (_, first), *others in twice:
        for _, other in others:
            if not filecmp.cmp(first, other, shallow=False):
                raise error(f"{first} and {other} are one recording with different content; remove one of the two")
    if twice:
        warnings.warn(
            f"{len(twice)} files are there more than once with the same bytes, and the first is used (first: "
            f"{twice[0][0][1]}, also {twice[0][1][1]}); remove the copies to load faster",
            UserWarning,
            stacklevel=3,
        )
    return {key: paths[0] for key, paths in found.items()}


def how_to_get(root: Path) -> str:
    """Return the last sentence of a message about missing files."""
    return (
        f"\nTo get the data: pass download=True, or fetch {ARCHIVE} and the side files "
        f"{', '.join(names[0] for names in SIDE_FILES.values())} from {BASE_URL} by hand and put them into {root}."
    )


def read_split(paths: list[Path]) -> dict[str, Listed]:
    """Return key to side of the split; names that differ in the device only are one recording.

    Raises:
        MetadataError: With file, line and text, if a line makes no sense.
    """
    rows = [row for path in paths for row in read_rows(path, _STEM, (2,), ("train", "test"))]
    names = [Name(*row.fields[0].split("_")) for row in rows]
    sides = unique(
        (name.key, row.choice(1, ("train", "test"), "side of the split"), row)
        for name, row in zip(names, rows, strict=True)
    )
    devices: dict[str, list[Name]] = {}
    for name in names:
        devices.setdefault(name.key, []).append(name)
    return {
        key: Listed(devices[key][0], side, frozenset(name.device for name in devices[key]))
        for key, side in sorted(sides.items())
    }


def read_old_names(paths: list[Path]) -> frozenset[str]:
    """Return the names that recordings of the Meditron had at first.

    Raises:
        MetadataError: With file, line and text, if a line is not a name.
    """
    return frozenset(row.fields[0] for path in paths for row in read_rows(path, _STEM, (1,)))


def read_demographics(paths: list[Path]) -> dict[str, Patient]:
    """Return patient to demographics.

    Patch-Mix's form has a seventh column, one chest location a patient. It is wrong for 698 of 920 recordings and never
    read: the location stands in the name.

    Raises:
        MetadataError: With file, line and text, if a line makes no sense.
    """
    rows = [row for path in paths for row in read_rows(path, _PATIENT, (6, 7), ("M", "F"))]
    return unique((row.fields[0], _patient(row), row) for row in rows)


def _patient(row: Row) -> Patient:
    sex = None if row.unknown(2) else row.choice(2, ("M", "F"), "sex")
    return Patient(row.number(1), sex, row.number(3), row.number(4), row.number(5))


def read_diagnosis(paths: list[Path]) -> dict[str, str]:
    """Return patient to diagnosis.

    Raises:
        MetadataError: With file, line and text, if a line makes no sense.
    """
    rows = [row for path in paths for row in read_rows(path, _PATIENT, (2,), DIAGNOSES)]
    return unique((row.fields[0], row.choice(1, DIAGNOSES, "diagnosis"), row) for row in rows)


def read_annotation(path: Path, duration: float) -> list[Cycle]:
    """Read the cycles of one recording of *duration* seconds, in order of time.

    An end at most 10 ms beyond the recording is clipped to it.

    Raises:
        AnnotationError: With file and line, if a line is not a cycle within the recording, or two cycles overlap.
    """
    cycles: list[tuple[Cycle, int]] = []
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise AnnotationError(f"{path} is not text; fetch the file again") from None
    for line, content in enumerate(lines, 1):
        fields = content.split()
        if not fields:
            continue
        try:
            cycles.append((_cycle(fields, duration), line))
        except ValueError as error:
            raise AnnotationError(f"{path}, line {line}: {error}. {WAY_OUT}") from None
    if not cycles:
        raise AnnotationError(f"{path} has no cycle; fetch the file again")
    cycles.sort()
    for (before, _), (cycle, line) in itertools.pairwise(cycles):
        if cycle.start < before.end:
            raise AnnotationError(
                f"{path}, line {line}: cycle starts ({cycle.start:g} s) before the previous one ends "
                f"({before.end:g} s). {WAY_OUT}"
            )
    return [cycle for cycle, _ in cycles]


def _cycle(fields: list[str], duration: float) -> Cycle:
    if len(fields) != 4:
        raise ValueError(f"expected 4 fields (start, end, crackle, wheeze), found {len(fields)}")
    start, end, crackle, wheeze = map(float, fields)
    if not abs(start) + abs(end) < float("inf"):
        raise ValueError(f"times must be finite, got {fields[0]!r} and {fields[1]!r}")
    if crackle not in (0, 1) or wheeze not in (0, 1):
        raise ValueError(f"crackle and wheeze must be 0 or 1, got {fields[2]!r} and {fields[3]!r}")
    if start < 0:
        raise ValueError(f"cycle starts before the recording ({start:g} s)")
    if end > duration + END_TOLERANCE:
        raise ValueError(f"cycle ends ({end:g} s) after the recording ({duration:g} s)")
    end = min(end, duration)
    if end <= start:
        raise ValueError(f"cycle ends ({end:g} s) before it starts ({start:g} s)")
    return Cycle(start, end, int(crackle), int(wheeze))
