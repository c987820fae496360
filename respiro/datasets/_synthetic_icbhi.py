"""The synthetic ICBHI: who its patients are, what they are recorded with, and the files of the real layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from respiro.datasets import _breath
from respiro.datasets._breath import Breath, Device, Person


class Role(NamedTuple):
    """What a patient is drawn from: diagnosis, range of age (years), shares of normal, crackle, wheeze, both."""

    diagnosis: str
    ages: tuple[float, float]
    shares: tuple[float, float, float, float]


COPD = Role("COPD", (50, 90), (0.37, 0.25, 0.20, 0.18))
HEALTHY_CHILD = Role("Healthy", (1, 15), (0.93, 0.04, 0.03, 0.0))
HEALTHY_ADULT = Role("Healthy", (20, 65), (0.93, 0.03, 0.04, 0.0))
URTI = Role("URTI", (1, 12), (0.7, 0.12, 0.18, 0.0))
BRONCHIECTASIS = Role("Bronchiectasis", (25, 80), (0.4, 0.3, 0.12, 0.18))
BRONCHIOLITIS = Role("Bronchiolitis", (0.5, 3), (0.4, 0.2, 0.25, 0.15))
PNEUMONIA = Role("Pneumonia", (30, 85), (0.5, 0.3, 0.08, 0.12))
ASTHMA = Role("Asthma", (30, 70), (0.5, 0.0, 0.38, 0.12))

# Repeated or cut to the number of patients. Both begin with COPD, which holds every class, so the smallest set does.
_TRAIN = (
    *(COPD, COPD, HEALTHY_CHILD, COPD, URTI, BRONCHIECTASIS, COPD, HEALTHY_ADULT, BRONCHIOLITIS, PNEUMONIA, COPD),
    *(HEALTHY_CHILD, ASTHMA, URTI, HEALTHY_ADULT),
)
_TEST = (COPD, COPD, HEALTHY_CHILD, BRONCHIECTASIS, URTI, COPD, BRONCHIOLITIS, HEALTHY_ADULT, COPD)
#: From this number of patients on, one of them is on both sides.
_SHARED_FROM = 12

_AKG = Device("AKGC417L", 44100, 24, (60, 1800), level=-14, floor=-48, mode="mc")
_AKG_16 = Device("AKGC417L", 44100, 16, (60, 1800), level=-14, floor=-48, mode="mc")
_LITT_C2SE = Device("LittC2SE", 44100, 24, (90, 700), level=-21, floor=-55, mode="mc")
_LITT_3200 = Device("Litt3200", 4000, 16, (40, 900), level=-22, floor=-58)
_MEDITRON = Device("Meditron", 44100, 16, (30, 1300), level=-22, floor=-52)
_MEDITRON_10K = Device("Meditron", 10000, 16, (30, 1300), level=-22, floor=-52, offset=0.04)
_MEDITRON_4K = Device("Meditron", 4000, 16, (30, 1300), level=-22, floor=-52, offset=0.02)
# Mostly the low rates, which keeps the folder small; the first four are the four devices.
_DEVICES = (
    *(_MEDITRON, _AKG, _LITT_3200, _LITT_C2SE, _MEDITRON_4K, _LITT_3200, _AKG_16, _MEDITRON_10K),
    *(_MEDITRON, _LITT_3200, _LITT_3200, _MEDITRON_4K),
)

_LOCATIONS = ("Tc", "Al", "Ar", "Pl", "Pr", "Ll", "Lr")
_SOUNDS_OF_LABEL = ((), ("crackle",), ("wheeze",), ("crackle", "wheeze"))


def write(root: Path, num_patients: int, seed: int, recordings_per_patient: int, cycles_per_recording: int) -> None:
    """Write all files into the empty folder *root*; the arguments are those of ``write_synthetic_icbhi``."""
    rng = np.random.default_rng(seed)
    num_train = -(-5 * num_patients // 8)
    cast = [("train", _TRAIN[i % len(_TRAIN)]) for i in range(num_train)]
    cast += [("test", _TEST[i % len(_TEST)]) for i in range(num_patients - num_train)]
    devices = [_DEVICES[i % len(_DEVICES)] for i in rng.permutation(num_patients)]
    order = rng.permutation(num_patients)
    if num_patients >= _SHARED_FROM:
        devices[0] = _AKG  # the shared patient is heard at several places at once

    sounds = root / "ICBHI_final_database"
    sounds.mkdir()
    split, demographics, diagnoses = [], [], []
    for patient, i in enumerate(order, start=101):
        side, role = cast[i]
        own = np.random.default_rng([seed, patient, 0])
        age, sex = round(own.uniform(*role.ages), 0 if role.ages[0] >= 1 else 2), str(own.choice(["M", "F"]))
        person = _breath.draw_person(age, sex, own)
        stems = _write_patient(
            sounds, patient, person, role, devices[i], recordings_per_patient, cycles_per_recording, seed
        )
        crossing = stems[1] if num_patients >= _SHARED_FROM and i == 0 else None
        split += [f"{stem}\t{'test' if stem == crossing else side}\r\n" for stem in stems]
        # As in the real set, one patient (the last of the test side) has no demographics at all.
        known = _demographics(age, sex, i % 6 == 1, own) if i < num_patients - 1 else ["NA"] * 5
        demographics.append("\t".join([str(patient), *known]) + "\r\n")
        diagnoses.append(f"{patient}\t{role.diagnosis}\n")
    for name, lines in (
        ("ICBHI_challenge_train_test.txt", sorted(split)),
        ("ICBHI_Challenge_demographic_information.txt", demographics),
        ("ICBHI_Challenge_diagnosis.txt", diagnoses),
    ):
        (root / name).write_bytes("".join(lines).encode("ascii"))


def _write_patient(
    folder: Path, patient: int, person: Person, role: Role, device: Device, recordings: int, cycles: int, seed: int
) -> list[str]:
    """Write the recordings of one patient, two a take, and return their names.

    The two recordings of a simultaneous take (mode mc) hear the same breaths at two places; otherwise each hears its
    own breaths.
    """
    rng = np.random.default_rng([seed, patient, 1])
    places = np.resize(rng.permutation(_LOCATIONS), recordings)
    stems = [f"{patient}_{n // 2 + 1}b{n // 2 + 1}_{places[n]}_{device.mode}_{device.name}" for n in range(recordings)]
    together = 2 if device.mode == "mc" else 1
    groups = [stems[n : n + together] for n in range(0, recordings, together)]
    counts = cycles + rng.integers(-1, 2, len(groups))
    dealt = _breath.deal(role.shares, counts.sum(), rng)
    for group, labels in zip(groups, np.split(dealt, np.cumsum(counts)[:-1]), strict=True):
        breaths = _draw_breaths(labels, person, rng)
        samples = _breath.whole_samples(breaths[-1].end + rng.uniform(0.1, 0.5))
        events = _breath.adventitious(breaths, samples, person, rng)
        lines = [f"{b.start:g}\t{b.end:g}\t{n & 1}\t{n >> 1}\n" for b, n in zip(breaths, labels, strict=True)]
        for stem in group:
            signal = _breath.through_chest(breaths, events, person, rng, brightness=2.0 if "_Tc_" in stem else 1.0)
            _breath.write_wav(folder / f"{stem}.wav", _breath.record(signal, device, rng), device)
            (folder / f"{stem}.txt").write_bytes("".join(lines).encode("ascii"))
    return stems


def _draw_breaths(labels: NDArray[np.int64], person: Person, rng: np.random.Generator) -> list[Breath]:
    borders = _breath.draw_borders(len(labels), person, rng).tolist()
    kinds = {"crackle": person.crackle, "wheeze": "wheeze"}
    sounds = [tuple(kinds[name] for name in _SOUNDS_OF_LABEL[label]) for label in labels]
    return [Breath(*each) for each in zip(borders[:-1], borders[1:], sounds, strict=True)]


def _demographics(age: float, sex: str, missing: bool, rng: np.random.Generator) -> list[str]:
    """Age, sex, BMI (adults), weight and height (children) as text; if *missing*, without BMI or height."""
    if age >= 18:
        return [f"{age:g}", sex, "NA" if missing else f"{rng.uniform(19, 34):.1f}", "NA", "NA"]
    weight, height = 3.5 + 2.8 * age * rng.uniform(0.85, 1.15), 60 + 6.5 * age * rng.uniform(0.9, 1.1)
    return [f"{age:g}", sex, "NA", f"{weight:.1f}", "NA" if missing else f"{height:.0f}"]
