"""SPRSound, the paediatric respiratory sound database of the BioCAS grand challenges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pandas as pd

from respiro import audio
from respiro.datasets import _sprsound_check, _sprsound_files
from respiro.datasets._sprsound_files import EVENTS, RECORD_LABELS
from respiro.datasets._unpack import unpack_zip
from respiro.datasets.base import Fade, RespiratoryDataset, check_reading
from respiro.download import fetch
from respiro.errors import DatasetNotFoundError, PartialDatasetError, check_choice

__all__ = ["SPRSound"]

Task = Literal["1-1", "1-2", "2-1", "2-2", "icbhi4", "icbhi2"]
Side = Literal["train", "inter", "intra", "test", "all"]
RhonchiStridor = Literal["wheeze", "drop"]

REPOSITORY = "https://github.com/SJTU-YONGFU-RESEARCH-GRP/SPRSound"
#: The repository was restructured and relabelled several times; this is the state that ``download`` fetches.
COMMIT = "874eeb8736ddb78937c2fb5332fc7e7293d0f0ca"
ARCHIVE_URL = f"https://codeload.github.com/SJTU-YONGFU-RESEARCH-GRP/SPRSound/zip/{COMMIT}"

#: Class names in the order of their labels: the official ids of the tasks, and those of ICBHI.
CLASSES: dict[str, tuple[str, ...]] = {
    "1-1": ("normal", "adventitious"),
    "1-2": tuple(event.lower() for event in EVENTS),
    "2-1": ("normal", "poor quality", "adventitious"),
    "2-2": tuple(label.lower() for label in RECORD_LABELS),
    "icbhi4": ("normal", "crackle", "wheeze", "both"),
    "icbhi2": ("normal", "abnormal"),
}
#: Label of each event, in the order of ``EVENTS``, or of each record, in that of ``RECORD_LABELS``.
_LABELS: dict[str, tuple[int, ...]] = {
    "1-1": (0, 1, 1, 1, 1, 1, 1),
    "1-2": (0, 1, 2, 3, 4, 5, 6),
    "2-1": (0, 1, 2, 2, 2),
    "2-2": (0, 1, 2, 3, 4),
    "icbhi4": (0, 2, 2, 2, 1, 1, 3),
    "icbhi2": (0, 1, 1, 1, 1, 1, 1),
}


class SPRSound(RespiratoryDataset):
    """SPRSound: recordings of children, with events annotated in each (Zhang et al., 2022).

    The release of 2022 has 2683 recordings of 292 patients and 9089 events, in a train set and two test sets: *inter*
    has other children, *intra* other recordings of the children in train. The releases of 2023, 2024 and 2025 are test
    sets alone, without inter and intra; their train set is that of 2022, if it is there. Some of their children may be
    in it: look at the leakage audit.

    *root* may be the repository, in any of its three layouts, the folder that contains it, or a folder of one release
    (``BioCAS2022/``, ``Classification/``). ``Detection/`` is never read: it mixes releases. The sounds are published as
    ``.wav``; lossless ``.flac`` of the same names in their place is read as well.

    A record label follows from its events (no events: Poor Quality). The releases after 2023 publish none; where one is
    published and contradicts its events, the events are believed and a warning names it.

    The tables have, beside the columns of :class:`RespiratoryDataset`, ``record_label`` for a recording and, in tasks
    on events, ``event`` (published label) and ``event_position`` (position in the annotation file, which is not sorted
    by time) for a cycle.

    Args:
        root: Where the data lies.
        split: ``"train"``, ``"inter"``, ``"intra"``, ``"test"`` (both; the only test set after 2022) or ``"all"``.
        task: On events ``"1-1"`` (normal, adventitious) and ``"1-2"`` (seven classes), or the label maps ``"icbhi4"``
            (normal, crackle, wheeze, both) and ``"icbhi2"`` (normal, abnormal), for models of ICBHI. On whole
            recordings ``"2-1"`` (normal, poor quality, adventitious) and ``"2-2"`` (five classes).
        year: Of the release.
        sample_rate: See :class:`RespiratoryDataset`, also for *duration*, *pad*, *fade*, *resample*, *cache_dir* and
            *any_encoding*. The recordings have 8 kHz: nothing is above 4 kHz.
        duration: Seconds.
        pad: How a shorter cycle is filled. Length is informative here (a wheeze lasts 0.5 s, a normal event 1.3 s), and
            zeros show it, repetition its period.
        fade: What is faded in and out.
        resample: What is resampled as a whole.
        partial: Accept fewer recordings than the release has, and for ``split="all"`` a side without any;
            :attr:`partial` then tells.
        download: Fetch the repository if the release is not there, see :meth:`download`, and verify it.
        verify_tls: Check the certificate of the server when downloading.
        cache_dir: Where resampled cycles are kept.
        any_encoding: Accept files that are not mono 16- or 24-bit PCM.
        rhonchi_stridor: What ``"icbhi4"`` does with rhonchi and stridor: count them as ``"wheeze"``, or ``"drop"``
            them; :attr:`left_out` then lists them.
        band: Lowest and highest frequency (Hz) that is kept of every recording: see :class:`RespiratoryDataset`.

    Attributes:
        root: Where the data lies.
        task: Name of the task or label map.
        year: Year of the release.
        events: Every annotated event of every split, whatever the task.
        partial: Whether recordings are missing: no result on this copy is comparable with a published one.
        commit: Of the repository, if the name of its folder or its ``.git`` tells; labels differ between commits.

    Raises:
        DatasetNotFoundError: If the folders of the split are not there.
        PartialDatasetError: If recordings are missing and *partial* is false.
        AnnotationError: If an annotation makes no sense, a sound or its annotation is missing, or a name stands twice.
        AudioError: If a sound file cannot be used.
        DownloadError: If the download fails.
        ValueError: If an argument has no meaning.
    """

    rounding: ClassVar[audio.Rounding] = "milliseconds"

    def __init__(
        self,
        root: str | Path,
        split: Side = "train",
        task: Task = "1-1",
        year: int = 2022,
        sample_rate: int = 16000,
        duration: float = 8.0,
        pad: audio.Pad = "repeat",
        fade: Fade = "recording",
        resample: Literal["recording", "cycle"] = "recording",
        partial: bool = False,
        download: bool = False,
        verify_tls: bool = True,
        cache_dir: str | Path | None = None,
        any_encoding: bool = False,
        rhonchi_stridor: RhonchiStridor = "wheeze",
        band: tuple[float, float] | None = None,
    ) -> None:
        splits = _splits(split, year)
        check_reading(sample_rate, duration, pad, fade, resample, band)  # before a download
        check_choice("task", task, get_args(Task))
        check_choice("rhonchi_stridor", rhonchi_stridor, get_args(RhonchiStridor))
        self.root = Path(root).expanduser().absolute()
        self.task = task
        self.year = year
        if download:
            self.download(self.root, year, verify_tls=verify_tls)
        parts = _find(self.root, splits, year, partial)
        last = next(parts[split] for split in reversed(splits) if split in parts)
        self.commit = _sprsound_files.find_commit(last.annotations)
        recordings, self.events, notes = _sprsound_files.read_parts(parts)
        self.partial = _is_partial(recordings, self.root, year, partial)
        for note in notes:
            warnings.warn(note, UserWarning, stacklevel=2)
        on_events = not task.startswith("2")
        cycles = _event_cycles(self.events, task, rhonchi_stridor) if on_events else _record_cycles(recordings, task)
        super().__init__(
            recordings,
            cycles,
            classes=CLASSES[task],
            vocabularies={
                "patient": tuple(sorted(recordings["patient"].dropna().unique())),
                "device": ("Yunting II",),
                "location": tuple(f"p{place}" for place in range(1, 9)),
                "sex": ("M", "F"),
                "age_group": ("adult", "child"),
            },
            splits=splits,
            sample_rate=sample_rate,
            duration=duration,
            pad=pad,
            fade=fade,
            resample=resample,
            cache_dir=cache_dir,
            any_encoding=any_encoding,
            band=band,
        )
        if download and not self.partial:
            self.verify()

    @property
    def without_events(self) -> list[str]:
        """Names of the recordings of every split that have no events: in tasks on events they do not occur."""
        return self.all_recordings.loc[self.all_recordings["record_label"] == "Poor Quality", "recording"].tolist()

    @property
    def origin(self) -> dict[str, Any]:
        """Year of the release, commit of the repository where known, and recordings that a task on events lacks."""
        lacking = 0 if self.task.startswith("2") else len(self.without_events)
        return {"year": self.year, "commit": self.commit, "recordings_without_events": lacking}

    def summary(self) -> None:
        """Print the counts per split and class, and what no count includes."""
        super().summary()
        if not self.task.startswith("2"):
            print(f"recordings without events (poor quality), not in this task: {len(self.without_events)}")

    def verify(self) -> None:
        """Compare every split of the release, whatever *split* and *task*, with its published numbers.

        For 2022: counts of recordings, patients, record labels and events, and a digest of the inter event ids. For the
        later releases, whose labels were corrected since, recordings only (and all numbers of the train set of 2022).

        Raises:
            PartialDatasetError: If recordings are missing.
            VerificationError: Names each number that differs, what was expected and what was found.
        """
        if self.partial:
            raise PartialDatasetError(
                f"cannot verify a partial copy: {_found(self.all_recordings, self.year)} under {self.root}. "
                f"Add the others first."
            )
        _sprsound_check.verify(self.all_recordings, self.events, self.year)

    @staticmethod
    def download(root: str | Path, year: int = 2022, url: str = ARCHIVE_URL, verify_tls: bool = True) -> None:
        """Fetch the repository at a fixed commit as one archive and unpack it, unless the release is there already.

        The archive is kept. It holds every release, and more than the recordings.

        Args:
            root: Folder to unpack it in; made if it is not there.
            year: Of the release whose folders are looked for.
            url: Of the archive.
            verify_tls: Check the certificate of the server.

        Raises:
            DownloadError: If the archive cannot be fetched or unpacked.
        """
        root = Path(root).expanduser()
        if _sprsound_files.find_parts(root, year).keys() != _sprsound_check.RECORDINGS[year].keys():
            unpack_zip(fetch(url, root / f"SPRSound-{COMMIT}.zip", verify_tls=verify_tls), root)


def _splits(split: str, year: int) -> tuple[str, ...]:
    """Return the values of the column ``split`` that *split* stands for."""
    if year not in _sprsound_check.RECORDINGS:
        raise ValueError(f"year must be one of {', '.join(map(str, _sprsound_check.RECORDINGS))}, got {year!r}")
    known: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
    if year == 2022:
        known = {"train": ("train",), "inter": ("inter",), "intra": ("intra",), "test": ("inter", "intra")}
        known["all"] = ("train", "inter", "intra")
    if split not in known:
        only = "" if year == 2022 else f" (the release of {year} is one test set)"
        raise ValueError(f"split must be one of {', '.join(map(repr, known))}{only}, got {split!r}")
    return known[split]


def _find(root: Path, splits: tuple[str, ...], year: int, partial: bool) -> dict[str, _sprsound_files.Part]:
    parts = _sprsound_files.find_parts(root, year)
    # "all" of a later release is its test set, and train where there is one.
    needed = ("test",) if year != 2022 and len(splits) > 1 else splits
    if partial and "train" in splits[:-1]:  # "all" of a partial copy is what there is
        needed = tuple(split for split in needed if split in parts) or needed
    for split in needed:
        if split not in parts:
            folders = _sprsound_files.folders_looked_for(split, year)
            missing = f"none of {folders} in it holds annotations" if root.is_dir() else "it does not exist"
        elif not parts[split].sounds.is_dir():
            missing = f"{parts[split].sounds} does not exist"
        else:
            continue
        raise DatasetNotFoundError(
            f"SPRSound {year} ({split}) not found in {root}: {missing}. To get the data: pass download=True, or clone "
            f"{REPOSITORY}, check out {COMMIT} and pass its folder as root."
        )
    return {split: part for split, part in parts.items() if part.sounds.is_dir()}


def _is_partial(recordings: pd.DataFrame, root: Path, year: int, accepted: bool) -> bool:
    """Return whether a split has fewer recordings than were published; raise unless that is *accepted*."""
    published = _sprsound_check.RECORDINGS[year]
    found = recordings["split"].value_counts()
    short = [
        split
        for split, number in published.items()
        if found.get(split, 0) < number and (year == 2022 or split in found or split == "test")
    ]
    if short and not accepted:
        raise PartialDatasetError(
            f"{_found(recordings, year)} found under {root}. Pass partial=True to go on; every result is then marked "
            f"partial."
        )
    return bool(short)


def _found(recordings: pd.DataFrame, year: int) -> str:
    found = recordings["split"].value_counts()
    published = _sprsound_check.RECORDINGS[year].items()
    return ", ".join(f"{found.get(split, 0)} of {number} {split} recordings" for split, number in published)


def _event_cycles(events: pd.DataFrame, task: str, rhonchi_stridor: str) -> pd.DataFrame:
    label = dict(zip(EVENTS, _LABELS[task], strict=True))
    if task == "icbhi4" and rhonchi_stridor == "drop":
        label |= {"Rhonchi": -1, "Stridor": -1}
    return events.assign(label=events["event"].map(label).astype("int64"))


def _record_cycles(recordings: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return one cycle a recording, from its start to its end."""
    label = dict(zip(RECORD_LABELS, _LABELS[task], strict=True))
    return pd.DataFrame(
        {
            "recording": recordings["recording"],
            "cycle": 0,
            "start": 0.0,
            "end": recordings["frames"] / recordings["sample_rate"],
            "label": recordings["record_label"].map(label).astype("int64"),
        }
    )
