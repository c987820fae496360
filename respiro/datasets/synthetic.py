"""Synthetic ICBHI and SPRSound: the real file layouts filled with made-up breathing, for demos and tests.

No number measured on them says anything about real lungs.
"""

from __future__ import annotations

import json
import operator
import tempfile
from collections.abc import Callable
from pathlib import Path

from respiro.datasets import _synthetic_icbhi, _synthetic_sprsound

__all__ = ["write_synthetic_icbhi", "write_synthetic_sprsound"]

_VERSION = 1  # to be raised whenever the same arguments come to give other files
_MARKER = "synthetic.json"


def write_synthetic_icbhi(
    root: str | Path,
    num_patients: int = 24,
    seed: int = 0,
    *,
    recordings_per_patient: int = 3,
    cycles_per_recording: int = 5,
) -> Path:
    """Write a synthetic ICBHI 2017 database in the layout of the real one.

    Breath noise, heart beats and handling noise, with wheezes and crackles from faint to clear, heard by the four
    devices in their own bands, rates, bit depths and noise. Five eighths of the patients are on the train side. All
    four classes are on both sides, each with at least two train patients (four at the default size).

    From 12 patients on, the official split leaks as the real one does: one patient with COPD was heard at two places
    at once, and one of these two recordings is in test, all the others of that patient in train. So the sides share
    a patient and a take with the same cycle times; all other patients are on one side only.

    The same arguments give the same bytes (with the same numpy on the same machine), and a folder that already holds
    them is left as it is.

    Args:
        root: Folder to make. It appears only when it is complete.
        num_patients: Number of patients, 4 to 899; they are numbered from 101.
        seed: Not negative; another seed gives other persons, sounds and sides.
        recordings_per_patient: 2 to 18.
        cycles_per_recording: Breaths in a recording, give or take one; 5 to 100.

    Returns:
        *root*, to be given to :class:`respiro.datasets.ICBHI`.

    Raises:
        ValueError: If an argument is out of range, or *root* holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_icbhi(Path(folder) / "icbhi", num_patients=4)
        ...     sorted(path.name for path in root.iterdir() if path.suffix != ".json")
        ['ICBHI_Challenge_demographic_information.txt', 'ICBHI_Challenge_diagnosis.txt',
         'ICBHI_challenge_train_test.txt', 'ICBHI_final_database']
    """
    arguments = {
        "num_patients": _in_range("num_patients", num_patients, 4, 899),
        "seed": _in_range("seed", seed, 0),
        "recordings_per_patient": _in_range("recordings_per_patient", recordings_per_patient, 2, 18),
        "cycles_per_recording": _in_range("cycles_per_recording", cycles_per_recording, 5, 100),
    }
    return _write_once(
        Path(root).expanduser(), "ICBHI", arguments, lambda folder: _synthetic_icbhi.write(folder, **arguments)
    )


def write_synthetic_sprsound(
    root: str | Path, num_patients: int = 20, seed: int = 0, *, recordings_per_patient: int = 4
) -> Path:
    """Write a synthetic SPRSound in the layout of its release of 2022.

    Children recorded with one stethoscope at 8 kHz, with the faults of the real files: block alignment 4 in the
    headers, times as strings, events out of order. Seven tenths of the children are on the train side, and one
    recording of each of them is in the intra-patient test; the others are the inter-patient test. All seven event
    types are in train, the rare ones with few children. Some recordings are of poor quality and have no events.

    The same arguments give the same bytes (with the same numpy on the same machine), and a folder that already holds
    them is left as it is.

    Args:
        root: Folder to make. It appears only when it is complete.
        num_patients: Number of children, 4 to 999.
        seed: Not negative; another seed gives other children and sounds.
        recordings_per_patient: Without those of poor quality; 3 to 100.

    Returns:
        *root*, to be given to :class:`respiro.datasets.SPRSound` with ``partial=True``.

    Raises:
        ValueError: If an argument is out of range, or *root* holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_synthetic_sprsound(Path(folder) / "sprsound", num_patients=4)
        ...     sorted(path.name for path in root.iterdir() if path.is_dir())
        ['test_json', 'test_wav', 'train_json', 'train_wav']
    """
    arguments = {
        "num_patients": _in_range("num_patients", num_patients, 4, 999),
        "seed": _in_range("seed", seed, 0),
        "recordings_per_patient": _in_range("recordings_per_patient", recordings_per_patient, 3, 100),
    }
    return _write_once(
        Path(root).expanduser(), "SPRSound", arguments, lambda folder: _synthetic_sprsound.write(folder, **arguments)
    )


def _in_range(name: str, value: int, lowest: int, highest: int = 2**63 - 1) -> int:
    if not lowest <= value <= highest:
        bounds = f"at least {lowest}" if value < lowest else f"at most {highest}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")
    return operator.index(value)


def _write_once(root: Path, kind: str, arguments: dict[str, int], write: Callable[[Path], None]) -> Path:
    """Write into a folder beside *root* and rename it, so that *root* is either absent or complete."""
    marker: dict[str, str | int] = {"synthetic": kind, "version": _VERSION, **arguments}
    if _is_finished(root, marker):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        folder = Path(temporary) / "new"  # a folder of its own: the temporary one is closed to other users
        folder.mkdir()
        write(folder)
        (folder / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        try:
            if root.is_dir():
                root.rmdir()  # it is empty, see above
            folder.rename(root)
        except OSError:
            if not _is_finished(root, marker):  # else another process was faster
                raise
    return root


def _is_finished(root: Path, marker: dict[str, str | int]) -> bool:
    """Whether *root* holds what *marker* describes; an error if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != marker:
        held = f"a synthetic set with other arguments ({found})" if found else "something else"
        raise ValueError(
            f"root {str(root)!r} holds {held}, and nothing is overwritten; "
            "name another folder, or delete this one first"
        )
    return True
