"""The tables of the ICBHI 2017 database, made of its files."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from respiro import audio
from respiro.datasets._icbhi_files import (
    DIAGNOSES,
    SIDE_FILES,
    Listed,
    Patient,
    Tree,
    how_to_get,
    read_annotation,
    read_old_names,
    scan,
)
from respiro.datasets._tables import WAY_OUT, listing
from respiro.errors import AnnotationError, AudioError, DatasetNotFoundError, MetadataError, PartialDatasetError

#: Its file says LittC2SE, the split file Meditron: probably forgotten when 91 recordings were renamed. All released
#: code and all published counts go by the file.
_FORGOTTEN = "226_1b1_Pl_sc"
_BLOCK = 1 << 16


def scan_all(root: Path) -> Tree:
    """Find everything that a data set cannot do without.

    Raises:
        AnnotationError: If sound and annotations do not pair up.
        DatasetNotFoundError: If there is no recording, or a side file is not there.
    """
    tree = scan(root)
    if tree.alone:
        raise AnnotationError(
            f"{len(tree.alone)} files under {root} stand alone, though a recording needs its annotation (.txt) and the "
            f"reverse: {listing(tree.alone)}. Unpack the archive again, or remove them."
        )
    absent = [f"{kind} file ({' or '.join(SIDE_FILES[kind])})" for kind in SIDE_FILES if not tree.side_files[kind]]
    if not tree.recordings:
        absent.append("recordings (.wav or .flac)")
    if absent:
        kaggle = "" if tree.side_files["split"] else " The Kaggle copy comes without the split file."
        raise DatasetNotFoundError(
            f"ICBHI is not complete: no {', no '.join(absent)} under {root}.{kaggle}{how_to_get(root)}"
        )
    return tree


def missing_recordings(tree: Tree, listed: dict[str, Listed], root: Path, partial: bool) -> list[str]:
    """Return the names of recordings that the split file lists and that are not there.

    Raises:
        MetadataError: If there are recordings that the split file does not list.
        PartialDatasetError: If recordings are missing and *partial* is false.
    """
    foreign = [recording.name.recording for key, recording in tree.recordings.items() if key not in listed]
    if foreign:
        raise MetadataError(
            f"{len(foreign)} recordings under {root} are not in {tree.side_files['split'][0]}: {listing(foreign)}. "
            f"Remove them, or fetch the official split file."
        )
    missing = [entry.name.recording for key, entry in listed.items() if key not in tree.recordings]
    if missing and not partial:
        raise PartialDatasetError(
            f"{len(tree.recordings)} of {len(listed)} recordings found under {root} (first missing: {missing[0]}). "
            f"Pass partial=True to go on; every result is then marked partial."
        )
    return missing


def recordings_table(
    tree: Tree, listed: dict[str, Listed], demographics: dict[str, Patient], diagnosis: dict[str, str]
) -> pd.DataFrame:
    """Read every header and join it with what the name and the side files say, sorted by name.

    Raises:
        AudioError: If a sound file cannot be used, or two recordings are the same file.
        MetadataError: If a side file says nothing about a patient.
    """
    devices = _devices(tree, listed)
    rows = []
    for key, (name, sound, _) in tree.recordings.items():
        for kind, table in (("demographics", demographics), ("diagnosis", diagnosis)):
            if name.patient not in table:
                raise MetadataError(
                    f"{tree.side_files[kind][0]} has no line for patient {name.patient} ({sound}). {WAY_OUT}"
                )
        patient = demographics[name.patient]
        header = audio.read_header(sound)
        row: dict[str, Any] = {
            "recording": f"{key}_{devices[key]}",
            "path": str(sound),
            "patient": name.patient,
            "take": f"{name.patient}_{name.number}",
            "location": name.location,
            "mode": name.mode,
            "device": devices[key],
            "split": listed[key].side,
            "age_group": None if patient.age is None else "child" if patient.age < 18 else "adult",
            "diagnosis": diagnosis[name.patient],
            "duration": header.frames / header.sample_rate,
        }
        rows.append(row | patient._asdict() | header._asdict())
    _check_distinct(recording.sound for recording in tree.recordings.values())
    numbers = dict.fromkeys(("age", "bmi", "weight", "height"), float)
    return pd.DataFrame(rows).astype(numbers)


def _devices(tree: Tree, listed: dict[str, Listed]) -> dict[str, str]:
    """Return key to device: that of the file name, but Meditron for the 91 recordings that have old names.

    An old name is known by the split file, which lists Meditron, or by the list of old names, where there is one.
    Where files and split file both have old names and that list is not there, nothing can be known here: the old
    device stays, and ``ICBHI.verify`` finds it by its counts.
    """
    old_names = read_old_names(tree.side_files["old names"])
    devices = {key: recording.name.device for key, recording in tree.recordings.items()}
    old = [
        key
        for key, device in devices.items()
        if tree.recordings[key].name.recording in old_names
        or (device in ("LittC2SE", "AKGC417L") and "Meditron" in listed[key].devices and key != _FORGOTTEN)
    ]
    if old:
        warnings.warn(
            f"{len(old)} recordings lie under an old name (first: {tree.recordings[old[0]].sound}); they are read "
            f"under the new one, with device Meditron",
            UserWarning,
            stacklevel=2,
        )
    differing = [key for key, device in devices.items() if device not in listed[key].devices and key not in old]
    if differing:
        first = differing[0]
        warnings.warn(
            f"{len(differing)} recordings have another device in the split file (first: "
            f"{tree.recordings[first].sound}, there {listed[first].name.recording}); the device is that of the file "
            f"name",
            UserWarning,
            stacklevel=2,
        )
    return devices | dict.fromkeys(old, "Meditron")


def _check_distinct(sounds: Iterable[Path]) -> None:
    """Refuse a sound that is there under two names: one of them would have the wrong patient, or leak into test.

    817 of the originals have one length, so sizes alone tell little, and to read 2 GB would take long: whole files are
    compared only where sizes and a block in the middle agree.

    Raises:
        AudioError: Names two files with the same bytes.
    """
    groups = [list(sounds)]
    for fingerprint in (os.path.getsize, _middle, _digest):
        groups = [alike for group in groups for alike in _alike(group, fingerprint)]
    if groups:
        first, second, *_ = groups[0]
        raise AudioError(
            f"{first} and {second} are two recordings with the same sound, so one of them is not what its name says. "
            f"Fetch the originals again, or remove both and pass partial=True."
        )


def _alike(paths: list[Path], fingerprint: Callable[[Path], Hashable]) -> list[list[Path]]:
    """Return the groups of files that share a fingerprint."""
    groups: dict[Hashable, list[Path]] = {}
    for path in paths:
        groups.setdefault(fingerprint(path), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _middle(path: Path) -> bytes:
    """Return a digest of 64 KiB in the middle of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size // 2 - _BLOCK // 2))
        return hashlib.sha256(file.read(_BLOCK)).digest()


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def cycles_table(recordings: pd.DataFrame, tree: Tree, diagnosis: bool, num_classes: int) -> pd.DataFrame:
    """Read the annotations.

    Args:
        recordings: What :func:`recordings_table` returned for *tree*.
        tree: What lies under the root.
        diagnosis: Label by the patient's diagnosis instead of the sounds.
        num_classes: Two for a label map that takes everything but class 0 together.

    Raises:
        AnnotationError: If an annotation makes no sense.
    """
    rows: list[tuple[Any, ...]] = []
    columns = (recordings["recording"], recordings["diagnosis"], recordings["duration"])
    for file, name, disease, duration in zip(tree.recordings.values(), *columns, strict=True):
        for position, cycle in enumerate(read_annotation(file.annotation, duration)):
            label = DIAGNOSES[disease] if diagnosis else cycle.crackle + 2 * cycle.wheeze
            rows.append((name, position, *cycle, min(label, num_classes - 1)))
    return pd.DataFrame(rows, columns=["recording", "cycle", "start", "end", "crackle", "wheeze", "label"])
