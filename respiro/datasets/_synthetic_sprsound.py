"""The synthetic SPRSound: children with conditions, and the files of the layout of 2022."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from respiro.datasets import _breath
from respiro.datasets._breath import Breath, Device, Person, Signal

_SOUNDS: dict[str, tuple[str, ...]] = {
    "Normal": (),
    "Rhonchi": ("rhonchus",),
    "Wheeze": ("wheeze",),
    "Stridor": ("stridor",),
    "Coarse Crackle": ("coarse",),
    "Fine Crackle": ("fine",),
    "Wheeze+Crackle": ("wheeze", "fine"),
}
_TYPES = tuple(_SOUNDS)
_TYPE_OF = {sounds: name for name, sounds in _SOUNDS.items()}
_CONTINUOUS = {"Rhonchi", "Wheeze", "Stridor", "Wheeze+Crackle"}
_DISCONTINUOUS = {"Coarse Crackle", "Fine Crackle", "Wheeze+Crackle"}

# Shares of the seven types in the events of a child.
_PNEUMONIA = (0.40, 0.0, 0.0, 0.0, 0.18, 0.26, 0.16)
_BRONCHITIS = (0.55, 0.15, 0.30, 0.0, 0.0, 0.0, 0.0)
_CROUP = (0.65, 0.0, 0.20, 0.15, 0.0, 0.0, 0.0)
_FINE_ONLY = (0.60, 0.0, 0.0, 0.0, 0.0, 0.40, 0.0)
_WHEEZE_ONLY = (0.65, 0.0, 0.35, 0.0, 0.0, 0.0, 0.0)
_WELL = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
# Repeated or cut to the number of children. The first three of train have all types, so the smallest set does.
_TRAIN = (_PNEUMONIA, _BRONCHITIS, _CROUP, _WELL, _FINE_ONLY, _WELL, _WHEEZE_ONLY, _WELL, _FINE_ONLY, _WELL)
_INTER = (_PNEUMONIA, _WHEEZE_ONLY, _WELL, _FINE_ONLY, _BRONCHITIS, _WELL)

_DEVICE = Device("Yunting II", 8000, 16, (80, 1600), level=-30, floor=-62)
_FOLDERS = {
    "train": ("train_wav", "train_json"),
    "inter": ("test_wav", "test_json/inter_test_json"),
    "intra": ("test_wav", "test_json/intra_test_json"),
}


def write(root: Path, num_patients: int, seed: int, recordings_per_patient: int) -> None:
    """Write all files into the empty folder *root*; the arguments are those of ``write_synthetic_sprsound``."""
    for folder in {folder for pair in _FOLDERS.values() for folder in pair}:
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = 40_000_000 + np.sort(rng.choice(10_000_000, num_patients, replace=False))
    num_train = min(num_patients - 1, -(-7 * num_patients // 10))
    number = 0
    for position, i in enumerate(rng.permutation(num_patients)):
        if i < num_train:
            shares, sides = _TRAIN[i % len(_TRAIN)], {"train": recordings_per_patient - 1, "intra": 1}
        else:
            i -= num_train
            shares, sides = _INTER[i % len(_INTER)], {"inter": recordings_per_patient}
        own = np.random.default_rng([seed, position])
        age, gender = own.uniform(0.2, 14), int(own.integers(2))
        person = _breath.draw_person(age, "MF"[gender], own)
        for side, count in sides.items():
            recordings = _draw_recordings(person, shares, count, own)
            if i % 3 == 0:  # every third child also has a recording of poor quality on each side
                recordings.append(_draw_poor_recording(person, own))
            for events, signal in recordings:
                number += 1
                stem = f"{names[position]}_{age:.1f}_{gender}_p{own.integers(1, 5)}_{number}"
                _write_recording(root, side, stem, events, signal, own)


def _draw_recordings(
    person: Person, shares: tuple[float, ...], count: int, rng: np.random.Generator
) -> list[tuple[list[Breath], Signal]]:
    """Draw recordings as (events, sound at ``RATE``); the event types are dealt over all of them together."""
    plans = [_draw_breaths(person, rng) for _ in range(count)]
    dealt = iter(_breath.deal(shares, sum(len(marked) for _, _, marked in plans), rng))
    drawn = []
    for samples, breaths, marked in plans:
        events = [Breath(start, end, _SOUNDS[_TYPES[next(dealt)]]) for start, end in marked]
        sounds = _breath.adventitious(events, samples, person, rng)
        drawn.append((events, _breath.through_chest(breaths, sounds, person, rng)))
    return drawn


def _draw_breaths(person: Person, rng: np.random.Generator) -> tuple[int, list[Breath], list[tuple[float, float]]]:
    """Draw one recording: samples, breaths to its end and beyond, and start and end of those that are annotated."""
    samples = int(rng.choice([73728, 122880], p=[0.75, 0.25]))  # the two published lengths, at 8 kHz
    seconds = samples / _breath.RATE
    borders = _breath.draw_borders(int(seconds / (0.8 * person.period)) + 1, person, rng)
    breaths = [Breath(start, end) for start, end in itertools.pairwise(borders.tolist())]
    marked = []
    for start, end, _ in breaths:
        before, after = rng.uniform(0, 0.12, 2) * (end - start)  # marked a little narrower than the breath
        if end < seconds and rng.random() < 0.9:
            marked.append((round(start + before, 3), round(end - after, 3)))
    return samples, breaths, marked


def _draw_poor_recording(person: Person, rng: np.random.Generator) -> tuple[list[Breath], Signal]:
    """Draw a recording in which handling noise buries the breath: it has no events."""
    samples, breaths, _ = _draw_breaths(person, rng)
    faint = 0.3 * _breath.through_chest(breaths, np.zeros(samples), person, rng)
    return [], faint + 3 * _breath.handling(samples, int(rng.integers(15, 30)), rng)


def _record_label(types: list[str]) -> str:
    """Record label of these event types, by the rule that all published records follow."""
    if not types:
        return "Poor Quality"
    heard = [name for name, kinds in (("CAS", _CONTINUOUS), ("DAS", _DISCONTINUOUS)) if kinds & set(types)]
    return " & ".join(heard) or "Normal"


def _write_recording(
    root: Path, side: str, stem: str, events: list[Breath], signal: Signal, rng: np.random.Generator
) -> None:
    wav_folder, json_folder = _FOLDERS[side]
    samples = _breath.record(signal, _DEVICE, rng)
    # All published headers give 4 bytes a sample where 2 is right.
    _breath.write_wav(root / wav_folder / f"{stem}.wav", samples, _DEVICE, block_align=4)
    if rng.random() < 0.4:  # published events are not always in order
        events = [events[i] for i in rng.permutation(len(events))]
    rows = [{"start": _milliseconds(e.start), "end": _milliseconds(e.end), "type": _TYPE_OF[e.sounds]} for e in events]
    annotation = {"record_annotation": _record_label([row["type"] for row in rows]), "event_annotation": rows}
    (root / json_folder / f"{stem}.json").write_text(json.dumps(annotation), encoding="utf-8")


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
