"""ICBHI 2017 for a Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from respiro.audio import Pad
from respiro.datamodules.base import RespiratoryDataModule, SelectOn
from respiro.datasets import ICBHI
from respiro.datasets.base import Fade
from respiro.datasets.icbhi import CLASSES, Labels, respirenet_folds
from respiro.errors import check_choice

__all__ = ["ICBHIDataModule"]


class ICBHIDataModule(RespiratoryDataModule):
    """ICBHI 2017: official split, validation held out of its train side by patient.

    Args:
        root: Folder of the database, in any of the layouts that :class:`respiro.datasets.ICBHI` reads.
        protocol: ``"official"``, ``"official-clean"`` (train without the two patients that also stand in test),
            ``"patient-fold-0"`` to ``"patient-fold-4"`` (RespireNet's), or ``"random-recording"`` (leaky, and marked
            so).
        labels: ``"4-class"``, ``"2-class"``, ``"diagnosis"`` or ``"diagnosis-2-class"``.
        batch_size: Cycles per batch and process.
        val_fraction: Share of the train side held out for validation, by patient; in [0, 1).
        select_on: ``"val"``, or ``"test"`` to choose the epoch on the test side as many papers do; the latter is
            stamped on every result.
        seed: Chooses the validation patients (and the folds or the random split, where the protocol draws them).
        num_workers: Loader processes; reading is cheap, 0 is enough without a GPU.
        drop_last: Leave out the last train batch of an epoch where it is smaller than the others.
        samples_per_class: Draw train batches of ``batch_size / samples_per_class`` classes with so many cycles of each,
            instead of shuffling: what the triplet loss needs and what rare classes get.
        sample_rate: Hz.
        duration: Seconds of every waveform.
        pad: ``"repeat"``, ``"zero"`` or ``"reflect"``.
        fade: ``"recording"`` (Patch-Mix), ``"cycle"`` (SCL) or ``"none"``.
        resample: ``"recording"`` (Patch-Mix) or ``"cycle"`` (SCL).
        partial: Go on with fewer recordings than the split lists; every result is then marked partial.
        any_encoding: Accept files that are not mono PCM as published.
        download: Fetch what is missing.
        verify_tls: Check the certificate of the server when downloading.
        cache_dir: Where resampled cycles, and features, are kept.
        feature_cache: Keep the features of every cycle on disk, computed once by the model's front end: for front ends
            that take longer than the network.
        metadata: Columns of the cycles table by the batch key of the label that they make, alone or combined, such as
            ``{"place": ["device", "location"]}``: see :func:`respiro.datasets.metadata_labels`. Default
            ``{"sex_age": ["sex", "age_group"]}``; ``{}`` for none.
        age_threshold: Years, between the two values of ``age_group`` there.
        merge_below: Train cycles that a combination needs to have a label of its own.
        band: Lowest and highest frequency (Hz) that is kept of every recording, so that data sets with other recorded
            bandwidths hold the same: see :class:`respiro.datasets.RespiratoryDataset`. Default all.

    Raises:
        ValueError: If an argument has no meaning.
        LabelError: In ``setup``, if a label that *metadata* asks for is of no use.

    Example:
        >>> import tempfile
        >>> from respiro.datasets import write_synthetic_icbhi
        >>> root = write_synthetic_icbhi(tempfile.mkdtemp() + "/icbhi", num_patients=8)
        >>> data = ICBHIDataModule(root, batch_size=4)
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["waveform"].shape
        torch.Size([4, 128000])
        >>> data.protocol["select_on"]
        'val'
    """

    def __init__(
        self,
        root: str | Path,
        protocol: str = "official",
        labels: Labels = "4-class",
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
        partial: bool = False,
        any_encoding: bool = False,
        download: bool = False,
        verify_tls: bool = True,
        cache_dir: str | Path | None = None,
        feature_cache: bool = False,
        metadata: Mapping[str, Sequence[str]] | None = None,
        age_threshold: float = 18.0,
        merge_below: int = 0,
        band: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            protocol=protocol,
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
        self.save_hyperparameters()
        self.keep_settings()
        check_choice("labels", labels, CLASSES)
        self.classes = CLASSES[labels]
        self.folds = respirenet_folds()

    def dataset(self, download: bool = False) -> ICBHI:
        """Read the tables of both sides."""
        return ICBHI(
            self.hparams["root"],
            split="all",
            labels=self.hparams["labels"],
            download=download,
            **self.settings,
        )

    def label_map(self) -> str:
        """Name of the label map."""
        return str(self.hparams["labels"])
