"""SPRSound for a Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from respiro.audio import Pad
from respiro.datamodules.base import RespiratoryDataModule, SelectOn
from respiro.datasets import SPRSound
from respiro.datasets._sprsound_check import RECORDINGS
from respiro.datasets.base import Fade
from respiro.datasets.sprsound import CLASSES, RhonchiStridor, Task
from respiro.errors import check_choice

__all__ = ["SPRSoundDataModule"]


class SPRSoundDataModule(RespiratoryDataModule):
    """SPRSound: a challenge task, validation held out of train by patient.

    Args:
        root: Folder of the database, in any of the layouts that :class:`respiro.datasets.SPRSound` reads.
        task: ``"1-1"``, ``"1-2"`` (events), ``"2-1"``, ``"2-2"`` (records), or a label map on events: ``"icbhi4"``,
            ``"icbhi2"``.
        year: Release whose test side is used.
        test_side: ``"inter"`` (unseen children), ``"intra"`` (other recordings of the train children), or
            ``"both"``; reports then give the two apart as well.
        batch_size: Cycles per batch and process.
        val_fraction: Share of the train side held out for validation, by patient; in [0, 1).
        select_on: ``"val"``, or ``"test"``, which is stamped on every result.
        seed: Chooses the validation patients.
        num_workers: Loader processes; reading is cheap, 0 is enough without a GPU.
        drop_last: Leave out the last train batch of an epoch where it is smaller than the others.
        samples_per_class: Draw train batches of ``batch_size / samples_per_class`` classes with so many cycles of each,
            instead of shuffling: what the triplet loss needs and what rare classes get.
        sample_rate: Hz.
        duration: Seconds of every waveform.
        pad: ``"repeat"``, ``"zero"`` or ``"reflect"``.
        fade: ``"recording"``, ``"cycle"`` or ``"none"``.
        resample: ``"recording"`` or ``"cycle"``.
        rhonchi_stridor: Under ``task="icbhi4"``: count them as ``"wheeze"``, or ``"drop"`` them.
        partial: Go on with fewer recordings than published; every result is then marked partial.
        any_encoding: Accept files that are not mono PCM as published.
        download: Fetch what is missing.
        verify_tls: Check the certificate of the server when downloading.
        cache_dir: Where resampled cycles, and features, are kept.
        feature_cache: Keep the features of every cycle on disk, computed once by the model's front end: for front ends
            that take longer than the network.
        metadata: Columns of the cycles table by the batch key of the label that they make, alone or combined, such as
            ``{"place": ["device", "location"]}``: see :func:`respiro.datasets.metadata_labels`. Default
            ``{"sex_age": ["sex", "age_group"]}``; ``{}`` for none.
        age_threshold: Years, between the two values of ``age_group`` there. The default is that of the code of
            Moummad and Farrugia (2023) for SPRSound.
        merge_below: Train cycles that a combination needs to have a label of its own.
        band: Lowest and highest frequency (Hz) that is kept of every recording, so that data sets with other recorded
            bandwidths hold the same: see :class:`respiro.datasets.RespiratoryDataset`. Default all.

    Raises:
        ValueError: If an argument has no meaning.
        LabelError: In ``setup``, if a label that *metadata* asks for is of no use.
    """

    def __init__(
        self,
        root: str | Path,
        task: Task = "1-1",
        year: int = 2022,
        test_side: Literal["inter", "intra", "both"] = "both",
        batch_size: int = 32,
        val_fraction: float = 0.15,
        select_on: SelectOn = "val",
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        samples_per_class: int | None = None,
        sample_rate: int = 16000,
        duration: float = 8.0,
        pad: Pad = "repeat",
        fade: Fade = "recording",
        resample: Literal["recording", "cycle"] = "recording",
        rhonchi_stridor: RhonchiStridor = "wheeze",
        partial: bool = False,
        any_encoding: bool = False,
        download: bool = False,
        verify_tls: bool = True,
        cache_dir: str | Path | None = None,
        feature_cache: bool = False,
        metadata: Mapping[str, Sequence[str]] | None = None,
        age_threshold: float = 5.0,
        merge_below: int = 0,
        band: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            protocol="official",
            batch_size=batch_size,
            val_fraction=val_fraction,
            select_on=select_on,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
            samples_per_class=samples_per_class,
            feature_cache=feature_cache,
            metadata=metadata,
            age_threshold=age_threshold,
            merge_below=merge_below,
        )
        check_choice("test_side", test_side, ("inter", "intra", "both"))
        self.save_hyperparameters()
        self.keep_settings()
        check_choice("task", task, CLASSES)
        check_choice("year", year, RECORDINGS)
        check_choice("rhonchi_stridor", rhonchi_stridor, get_args(RhonchiStridor))
        self.classes = CLASSES[task]
        sides = ("inter", "intra") if test_side == "both" else (test_side,)
        self.test_splits = sides if year == 2022 else ("test",)
        self.scoring = "icbhi" if task.startswith("icbhi") else "sprsound"

    def dataset(self, download: bool = False) -> SPRSound:
        """Read the tables of every side."""
        return SPRSound(
            self.hparams["root"],
            split="all",
            task=self.hparams["task"],
            year=self.hparams["year"],
            rhonchi_stridor=self.hparams["rhonchi_stridor"],
            download=download,
            **self.settings,
        )

    def label_map(self) -> str:
        """Name of the task or label map, with its policy where it has one."""
        task = str(self.hparams["task"])
        return (
            f"{task} (rhonchi and stridor: {self.hparams['rhonchi_stridor']})" if task == "icbhi4" else f"task {task}"
        )
