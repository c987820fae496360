"""Find and read the files of SPRSound: folder layouts, file names, annotations."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from respiro.audio import read_header
from respiro.datasets._tables import WAY_OUT, listing
from respiro.errors import AnnotationError

__all__ = ["EVENTS", "RECORD_LABELS", "Part", "find_commit", "find_parts", "folders_looked_for", "read_parts"]

#: Event and record labels in the order of the official ids of tasks 1-2 and 2-2.
EVENTS = ("Normal", "Rhonchi", "Wheeze", "Stridor", "Coarse Crackle", "Fine Crackle", "Wheeze+Crackle")
RECORD_LABELS = ("Normal", "Poor Quality", "CAS", "DAS", "CAS & DAS")
#: Event labels that make a recording one of continuous, and of discontinuous, adventitious sounds.
_CONTINUOUS = frozenset({"Rhonchi", "Wheeze", "Stridor", "Wheeze+Crackle"})
_DISCONTINUOUS = frozenset({"Coarse Crackle", "Fine Crackle", "Wheeze+Crackle"})
#: How far an event may reach beyond the end of its recording, seconds; it is then cut there.
_OVERHANG = 0.010 + 1e-9  # 10 ms itself is within
SOUND_SUFFIXES = (".wav", ".flac")
_FETCH_OR_REMOVE = "Fetch the repository again, or remove what is too much."
_NAME = re.compile(r"(?P<patient>\d*)_(?P<age>\d+(?:\.\d+)?)_(?P<gender>[01])_(?P<location>p[1-8])_\d+")


class Part(NamedTuple):
    """The two folders of one split."""

    split: str
    annotations: Path
    sounds: Path


def _folders(split: str, year: int) -> list[tuple[str, str]]:
    """Return the pairs of annotation and sound folder that a split has had in the repository, newest first."""
    if split == "train":
        names = ["train2022_{}", "train_classification_{}", "train_{}"]
        return [(name.format("json"), name.format("wav")) for name in names]
    names = [f"test{year}_{{}}", f"valid_classification_{{}}/{year}", f"test_classification_{{}}/{year}"]
    names += ["test_{}"] if year == 2022 else []
    below = f"/{split}_test_json" if split in {"inter", "intra"} else ""
    return [(name.format("json") + below, name.format("wav")) for name in names]


def folders_looked_for(split: str, year: int) -> str:
    """Return the names of the folders that may hold the annotations of a split."""
    return ", ".join(annotations for annotations, _ in _folders(split, year))


def _bases(root: Path, year: int) -> list[Path]:
    """Return the folders to look in; *root* may be the repository, its parent, or a folder of a release in it."""
    root = home = root.absolute()
    if re.fullmatch(r"BioCAS20\d\d|Classification", home.name):
        home = home.parent
    release = f"BioCAS{year}"
    homes = [home, *sorted(path for path in home.glob("SPRSound*") if path.is_dir())]
    below = ("", release, f"releases/{release}", "Classification")
    return [root, *(home / name for home in homes for name in below)]


def find_parts(root: Path, year: int) -> dict[str, Part]:
    """Return the splits found below *root*, whichever layout they have; ``Detection/`` is never looked at."""
    parts: dict[str, Part] = {}
    for split in ("train", "inter", "intra") if year == 2022 else ("train", "test"):
        for base in _bases(root, 2022 if split == "train" else year):
            found = [pair for pair in _folders(split, year) if next((base / pair[0]).rglob("*.json"), None)]
            if found:
                parts[split] = Part(split, base / found[0][0], base / found[0][1])
                break
    return parts


def find_commit(folder: Path) -> str | None:
    """Return the commit of the repository that *folder* is in, if its archive's name or its clone tells."""
    for parent in (folder, *folder.parents):
        if match := re.fullmatch(r"SPRSound-([0-9a-f]{40})", parent.name):
            return match[1]
        git = parent / ".git"
        # The folder may as well lie in the repository of somebody's project.
        if (git / "config").is_file() and "SPRSound" in (git / "config").read_text(encoding="utf-8", errors="replace"):
            head = (git / "HEAD").read_text(encoding="utf-8").strip()
            branch = git / head.removeprefix("ref: ")
            commit = branch.read_text(encoding="utf-8").strip() if branch.is_file() else head
            return commit if re.fullmatch("[0-9a-f]{40}", commit) else None
    return None


def read_parts(parts: dict[str, Part]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Read the recordings and the events of all splits.

    Returns:
        The recordings, sorted by name; the events, by recording and time, times in seconds; and what a user should
        know about the files though they can be used.

    Raises:
        AnnotationError: If an annotation makes no sense, or a recording or its annotation is missing.
        AudioError: If a sound file cannot be read.
    """
    recordings: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    notes = _Notes()
    for split, annotation, sound in sorted(_pairs(parts), key=lambda pair: pair[1].stem):
        recording = _recording(split, annotation, sound)
        content = _load(annotation)
        found = _events(content, annotation, recording, notes, overlaps_known=split == "test")
        recording["record_label"] = _record_label(content, annotation, [event["event"] for event in found], notes)
        recordings.append(recording)
        events += found
    columns = ["recording", "cycle", "start", "end", "event", "event_position"]
    return pd.DataFrame(recordings), pd.DataFrame(events, columns=columns), notes.told()


class _Notes:
    """Collects oddities that are accepted, to tell of each kind once."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, where: str) -> None:
        self.found.setdefault(kind, []).append(where)

    def told(self) -> list[str]:
        return [f"{len(where)} {kind}: {listing(where)}" for kind, where in self.found.items()]


def _pairs(parts: dict[str, Part]) -> list[tuple[str, Path, Path]]:
    """Return split, annotation and sound of every recording; only the folder of its annotation tells its split."""
    pairs = []
    annotated: dict[Path, set[str]] = {}
    sounds = {part.sounds: _by_stem(part.sounds, *SOUND_SUFFIXES) for part in parts.values()}
    without_sound = []
    for part in parts.values():
        annotations = _by_stem(part.annotations, ".json")
        annotated.setdefault(part.sounds, set()).update(annotations)
        without_sound += [str(path) for stem, path in annotations.items() if stem not in sounds[part.sounds]]
        pairs += [(part.split, path, sounds[part.sounds].get(stem, path)) for stem, path in annotations.items()]
    if without_sound:
        raise AnnotationError(
            f"{len(without_sound)} annotations have no {' or '.join(SOUND_SUFFIXES)} of their name: "
            f"{listing(without_sound)}. {_FETCH_OR_REMOVE}"
        )
    if ("inter" in parts) != ("intra" in parts):  # they share one folder of sounds: half of it is not annotated here
        annotated.pop(parts["inter" if "inter" in parts else "intra"].sounds)
    silent = [
        str(path) for folder, stems in annotated.items() for stem, path in sounds[folder].items() if stem not in stems
    ]
    if silent:
        raise AnnotationError(
            f"{len(silent)} recordings have no .json of their name: {listing(silent)}. {_FETCH_OR_REMOVE}"
        )
    twice = [stem for stem, count in Counter(path.stem for _, path, _ in pairs).items() if count > 1]
    if twice:
        raise AnnotationError(
            f"{len(twice)} recordings are in more than one split: {listing(twice)}. {_FETCH_OR_REMOVE}"
        )
    return pairs


def _by_stem(folder: Path, *suffixes: str) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in paths:
            raise AnnotationError(f"{path} and {paths[path.stem]} have the same name; keep one of them")
        paths[path.stem] = path
    return paths


def _recording(split: str, annotation: Path, sound: Path) -> dict[str, Any]:
    name = _NAME.fullmatch(annotation.stem)
    if name is None:
        raise AnnotationError(
            f"{annotation}: its name is not patient_age_gender_location_number. Give it its published name, or remove "
            f"it and its sound."
        )
    header = read_header(sound)
    return {
        "recording": annotation.stem,
        "path": str(sound),
        "patient": name["patient"] or None,
        "device": "Yunting II",
        "location": name["location"],
        "take": annotation.stem,
        "sex": "MF"[int(name["gender"])],
        "age": float(name["age"]),
        "age_group": "child" if float(name["age"]) < 18 else "adult",
        "split": split,
        "sample_rate": header.sample_rate,
        "frames": header.frames,
        "channels": header.channels,
        "encoding": header.encoding,
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise AnnotationError(f"{path} is not a JSON file: {error}. {WAY_OUT}") from error
    events = content.get("event_annotation") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(events, list) and all(isinstance(event, dict) for event in events):
        return content
    raise AnnotationError(f"{path} has no list of events called 'event_annotation'. {WAY_OUT}")


def _events(
    content: dict[str, Any], path: Path, recording: dict[str, Any], notes: _Notes, overlaps_known: bool
) -> list[dict[str, Any]]:
    length = recording["frames"] / recording["sample_rate"]
    events = []
    for position, event in enumerate(content["event_annotation"]):
        where = f"{path}, event {position}"
        start, end = (_seconds(event, key, where) for key in ("start", "end"))
        if end <= start:
            raise AnnotationError(f"{where} ends ({end:.3f} s) before or when it starts ({start:.3f} s). {WAY_OUT}")
        if end - length > _OVERHANG or start >= length:
            raise AnnotationError(
                f"{where} ends at {end:.3f} s, after the end of its recording ({length:.3f} s). {WAY_OUT}"
            )
        if end > length:
            notes.add(
                "events end up to 10 ms after their recording and were cut there", f"{path.stem} event {position}"
            )
        label = _canonical(event.get("type"), EVENTS, where)
        events.append({"start": start, "end": min(end, length), "event": label, "event_position": position})
    events.sort(key=lambda event: (event["start"], event["end"]))
    for before, after in _overlaps(events):
        which = f"events {before['event_position']} and {after['event_position']}"
        if not overlaps_known:
            raise AnnotationError(f"{path}: {which} overlap. {WAY_OUT}")
        notes.add("pairs of events overlap and were kept, as published", f"{path.stem} {which}")
    return [{"recording": path.stem, "cycle": cycle, **event} for cycle, event in enumerate(events)]


def _overlaps(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each event, of a list sorted by start, that begins while an earlier one lasts, and that earlier one."""
    last: dict[str, Any] | None = None
    for event in events:
        if last is not None and event["start"] < last["end"]:
            yield last, event
        last = event if last is None or event["end"] > last["end"] else last


def _seconds(event: dict[str, Any], key: str, where: str) -> float:
    """Return a time; it is published in milliseconds, mostly as a string."""
    value = event.get(key)
    try:
        if isinstance(value, bool) or not float(value).is_integer() or float(value) < 0:  # type: ignore[arg-type]
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise AnnotationError(
            f"{where}: {key!r} must be a whole number of milliseconds, got {value!r}. {WAY_OUT}"
        ) from None
    return float(value) / 1000  # type: ignore[arg-type]


def _canonical(label: object, known: tuple[str, ...], where: str) -> str:
    """Return a label as this module spells it; '+' and '&' are used alike upstream."""
    for name in known:
        if isinstance(label, str) and _plain(label) == _plain(name):
            return name
    raise AnnotationError(f"{where}: unknown label {label!r}; known are {', '.join(map(repr, known))}. {WAY_OUT}")


def _plain(label: str) -> str:
    return re.sub(r"\s*[+&]\s*", "+", label.strip()).casefold()


def _record_label(content: dict[str, Any], path: Path, events: list[str], notes: _Notes) -> str:
    """Return the label that the events imply; the published one, where there is one, is only compared."""
    continuous, discontinuous = bool(_CONTINUOUS.intersection(events)), bool(_DISCONTINUOUS.intersection(events))
    implied = {(True, True): "CAS & DAS", (True, False): "CAS", (False, True): "DAS"}.get((continuous, discontinuous))
    implied = implied or ("Normal" if events else "Poor Quality")
    published = content.get("record_annotation", content.get("recording_annotation"))
    if published is not None and (published := _canonical(published, RECORD_LABELS, str(path))) != implied:
        notes.add(
            "record labels contradict the events, which were believed", f"{path.stem} ({published!r}, not {implied!r})"
        )
    return implied
