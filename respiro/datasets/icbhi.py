"""The ICBHI 2017 Respiratory Sound Database."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from respiro import audio
from respiro.datasets import _icbhi_check
from respiro.datasets._icbhi_files import (
    ARCHIVE,
    BASE_URL,
    DEVICES,
    LOCATIONS,
    SIDE_FILES,
    read_demographics,
    read_diagnosis,
    read_split,
    scan,
)
from respiro.datasets._icbhi_tables import cycles_table, missing_recordings, recordings_table, scan_all
from respiro.datasets._tables import mark_clean
from respiro.datasets._unpack import unpack_zip
from respiro.datasets.base import Fade, RespiratoryDataset, check_reading
from respiro.download import fetch
from respiro.errors import DownloadError, MetadataError, PartialDatasetError, check_choice

__all__ = ["ICBHI", "respirenet_folds"]

Labels = Literal["4-class", "2-class", "diagnosis", "diagnosis-2-class"]
Protocol = Literal["official", "official-clean"]
Side = Literal["train", "test", "all"]

#: Class names in the order of their labels.
CLASSES: dict[str, tuple[str, ...]] = {
    "4-class": ("normal", "crackle", "wheeze", "both"),
    "2-class": ("normal", "abnormal"),
    "diagnosis": ("healthy", "chronic", "non-chronic"),
    "diagnosis-2-class": ("healthy", "unhealthy"),
}


class ICBHI(RespiratoryDataset):
    """ICBHI 2017: 920 recordings of 126 patients, 6898 annotated breath cycles (Rocha et al., 2019).

    *root* may be the official folder, the Kaggle copy (with the official split file added), the ``icbhi_dataset``
    folder of Patch-Mix, the folder of the sound files, or any folder that contains one of them. Hidden folders are not
    searched. Nothing on disk is renamed.

    The tables have, beside the columns of :class:`RespiratoryDataset`, ``mode`` (``mc`` simultaneous, ``sc`` single
    channel), ``diagnosis``, ``bmi``, ``weight`` (kg) and ``height`` (cm) for a recording, and ``crackle``
    and ``wheeze`` (0 or 1) for a cycle.

    Args:
        root: Where the data lies.
        split: ``"train"``, ``"test"``, or ``"all"`` for both.
        protocol: ``"official"`` is the published 60/40 split. It is per recording: patients 156 and 218 are on both
            sides. ``"official-clean"`` leaves their 13 train recordings out (their ``split`` is ``"left-out"``) and
            does not touch test.
        labels: ``"4-class"`` (normal, crackle, wheeze, both), ``"2-class"`` (normal, abnormal), ``"diagnosis"``
            (healthy, chronic, non-chronic: of the patient, for each cycle) or ``"diagnosis-2-class"`` (healthy,
            unhealthy).
        sample_rate: See :class:`RespiratoryDataset`, also for *duration*, *pad*, *fade*, *resample*, *cache_dir* and
            *any_encoding*.
        duration: Seconds.
        pad: How a shorter cycle is filled.
        fade: What is faded in and out.
        resample: What is resampled as a whole.
        partial: Accept fewer recordings than the split file lists; :attr:`missing` then has their names.
        download: Fetch what is not there yet, see :meth:`download`, and verify it.
        verify_tls: Check the certificate of the server when downloading.
        cache_dir: Where resampled cycles are kept.
        any_encoding: Accept files that are not mono 16- or 24-bit PCM.
        band: Lowest and highest frequency (Hz) that is kept of every recording: see :class:`RespiratoryDataset`.

    Attributes:
        root: Where the data lies.
        protocol: Name of the protocol.
        labels: Name of the label map.
        missing: Names of recordings that the split file lists and that are not there.
        ignored: Sound files under *root* whose name is not one of the database.

    Raises:
        DatasetNotFoundError: If there is no recording, or the split, demographics or diagnosis file is not there.
        PartialDatasetError: If recordings are missing and *partial* is false.
        AnnotationError: If an annotation makes no sense, or a recording has none.
        MetadataError: If a side file has a line that makes no sense, or says nothing about a recording or patient.
        AudioError: If a sound file cannot be used, or two recordings are the same file.
        DownloadError: If a download fails.
        ValueError: If an argument has no meaning.
    """

    def __init__(
        self,
        root: str | Path,
        split: Side = "train",
        protocol: Protocol = "official",
        labels: Labels = "4-class",
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
        band: tuple[float, float] | None = None,
    ) -> None:
        check_reading(sample_rate, duration, pad, fade, resample, band)  # before a download of 2 GB
        for name, value, kind in (("split", split, Side), ("protocol", protocol, Protocol), ("labels", labels, Labels)):
            check_choice(name, value, get_args(kind))
        self.root = Path(root).expanduser().absolute()
        self.protocol = protocol
        self.labels = labels
        if download:
            self.download(self.root, verify_tls=verify_tls)
        tree = scan_all(self.root)
        listed = read_split(tree.side_files["split"])
        demographics = read_demographics(tree.side_files["demographics"])
        diagnosis = read_diagnosis(tree.side_files["diagnosis"])
        self.missing = missing_recordings(tree, listed, self.root, partial)
        self.ignored = tree.ignored
        if self.ignored:
            warnings.warn(
                f"{len(self.ignored)} sound files under {self.root} have no name of ICBHI and are ignored "
                f"(first: {self.ignored[0]})",
                UserWarning,
                stacklevel=2,
            )
        recordings = recordings_table(tree, listed, demographics, diagnosis)
        cycles = cycles_table(recordings, tree, labels.startswith("diagnosis"), len(CLASSES[labels]))
        self._source = _icbhi_check.Source(
            [recording.annotation for recording in tree.recordings.values()], listed, demographics, diagnosis
        )
        super().__init__(
            mark_clean(recordings) if protocol == "official-clean" else recordings,
            cycles,
            classes=CLASSES[labels],
            vocabularies={
                # Of the split file, so that a partial copy has the codes of the whole.
                "patient": tuple(sorted({entry.name.patient for entry in listed.values()})),
                "device": DEVICES,
                "location": LOCATIONS,
                "sex": ("M", "F"),
                "age_group": ("adult", "child"),
            },
            splits=("train", "test") if split == "all" else (split,),
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
    def partial(self) -> bool:
        """Whether recordings are missing: no result on this copy is comparable with a published one."""
        return bool(self.missing)

    def verify(self) -> None:
        """Compare the whole database, whatever *split*, *protocol* and *labels*, with its published numbers.

        Counts of recordings, patients, cycles, classes, devices, locations, modes and diagnoses, and SHA-256 digests of
        annotations, split, demographics and diagnosis.

        Raises:
            PartialDatasetError: If recordings are missing.
            VerificationError: Names each number that differs, what was expected and found, and the likeliest cause.
        """
        if self.partial:
            raise PartialDatasetError(
                f"cannot verify a partial copy: {len(self.missing)} of {len(self._source.split)} recordings are not "
                f"under {self.root} (first missing: {self.missing[0]}), and the published numbers are those of all. "
                f"Add them first."
            )
        # The protocol must not hide what it leaves out.
        published = {"split": lambda table: table["split"].replace("left-out", "train")}
        _icbhi_check.verify(self.all_recordings.assign(**published), self.all_cycles.assign(**published), self._source)

    @staticmethod
    def download(root: str | Path, url: str = BASE_URL, verify_tls: bool = True) -> None:
        """Fetch what is not there yet: the three side files, and the archive (about 2 GB), which is unpacked and kept.

        The archive is not fetched when every recording that the split file lists is there already.

        Args:
            root: Folder to put the files into; made if it is not there.
            url: Folder of the files on the server.
            verify_tls: Check the certificate of the server. Some systems do not know the issuer of this one's;
                :meth:`ICBHI.verify` checks the content either way.

        Raises:
            DownloadError: If a file cannot be fetched or unpacked, or is something else (some servers answer with a
                page that says so); names the addresses to fetch by hand.
        """
        root, url = Path(root).expanduser(), url.rstrip("/") + "/"
        root.mkdir(parents=True, exist_ok=True)
        tree = scan(root)
        try:
            for kind, names in SIDE_FILES.items():
                if not tree.side_files[kind]:
                    tree.side_files[kind].append(_fetch_table(kind, url + names[0], root / names[0], verify_tls))
            if read_split(tree.side_files["split"]).keys() - tree.recordings.keys():
                archive = fetch(url + ARCHIVE, root / ARCHIVE, verify_tls=verify_tls)
                unpack_zip(archive, root)
        except DownloadError as error:
            addresses = [url + name for name in (ARCHIVE, *(names[0] for names in SIDE_FILES.values()))]
            raise DownloadError(
                f"{error}\nAll of ICBHI by hand: fetch {', '.join(addresses)}, put the files into {root} and unpack "
                f"the archive there."
            ) from error


_READERS: dict[str, Callable[[list[Path]], object]] = {
    "split": read_split,
    "demographics": read_demographics,
    "diagnosis": read_diagnosis,
}


def _fetch_table(kind: str, url: str, path: Path, verify_tls: bool) -> Path:
    """Fetch a side file, and keep it only if it can be read as one."""
    fetch(url, path, verify_tls=verify_tls)
    try:
        _READERS[kind]([path])
    except MetadataError as error:
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{url}: the server answered with something else than the {kind} file, which was removed: {error}"
        ) from error
    return path


def respirenet_folds() -> dict[str, int]:
    """Return the five patient folds of RespireNet (Gairola et al., 2021): patient to fold, fold k being the test part.

    They are very uneven (512, 61, 50, 99 and 198 recordings) and have nothing to do with the official split.

    Example:
        >>> respirenet_folds()["107"]
        0
    """
    return {patient: fold for fold, members in enumerate(_FOLDS) for patient in members.split()}


_FOLDS = (
    "107 114 130 138 146 147 154 156 158 160 162 163 170 172 177 180 184 186 193 200 203 204 205 207 211 213",
    "101 108 115 120 127 131 137 152 153 161 167 168 173 183 188 197 201 206 208 210 215 216 218 223 224",
    "105 110 111 116 121 123 125 129 136 144 148 157 159 164 165 166 169 179 182 190 196 209 217 222 225",
    "103 104 106 112 117 118 122 124 128 132 134 140 141 142 155 175 185 191 192 195 199 212 219 220 226",
    "102 109 113 119 126 133 135 139 143 145 149 150 151 171 174 176 178 181 187 189 194 198 202 214 221",
)
