"""What every datamodule does: hold validation out by patient, keep the test side shut, and write down the protocol."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader

from respiro import __version__
from respiro.datamodules._sampling import check_samples_per_class, train_sampler
from respiro.datasets import RespiratoryDataset
from respiro.datasets.base import CODED, Quality, check_label_name, check_reading
from respiro.datasets.metadata import ADULT, check_columns, check_limits
from respiro.errors import DatasetNotFoundError, check_choice
from respiro.splits import split as splits

__all__ = ["Loader", "RespiratoryDataModule"]

SelectOn = Literal["val", "test"]
Loader = DataLoader[Any]
#: Labels by metadata that every batch has unless others are asked for: those of M-SCL.
METADATA: Mapping[str, Sequence[str]] = {"sex_age": ("sex", "age_group")}
#: Arguments of every data set that a datamodule hands on.
_READING = ("sample_rate", "duration", "pad", "fade", "resample", "band")
_SETTINGS = (*_READING, "partial", "any_encoding", "verify_tls", "cache_dir")


class RespiratoryDataModule(LightningDataModule):
    """Train, validation and test sides of one data set, under one recorded protocol.

    Subclasses give :meth:`dataset`. Validation is held out of train by patient. The test side is read by ``test``
    alone, unless ``select_on="test"``: then the whole train side is trained on, the test side stands in for the
    validation side, and the protocol says so wherever it goes.

    Every batch has the keys of :class:`respiro.datasets.base.Batch`, and one for each label of *metadata*: int64, -1 =
    unknown. They are counted, and small ones merged, on the train side without its validation patients. Labels that
    were asked for must be of use; of the default ones the record says why they are not, and all cycles are unknown.

    Attributes:
        protocol: Plain-data record of split, labels, selection rule, seed and counts, with the metadata labels under
            ``"metadata"``; known after :meth:`setup`.
        classes: Class names in the order of their labels.
        class_counts: Train cycles of each class; known after ``setup("fit")``.
        scoring: ``"icbhi"`` or ``"sprsound"``: which score belongs to these labels.
    """

    train_set: RespiratoryDataset
    val_set: RespiratoryDataset
    test_set: RespiratoryDataset
    #: Values of the split column that form the test side.
    test_splits: tuple[str, ...] = ("test",)
    scoring: Literal["icbhi", "sprsound"] = "icbhi"
    classes: tuple[str, ...]
    #: Patient to fold, where the data set has published ones; else folds are drawn.
    folds: Mapping[str, int] | None = None

    def __init__(
        self,
        *,
        protocol: str,
        batch_size: int,
        val_fraction: float,
        select_on: SelectOn,
        seed: int,
        num_workers: int,
        drop_last: bool,
        samples_per_class: int | None = None,
        feature_cache: bool = False,
        metadata: Mapping[str, Sequence[str]] | None = None,
        age_threshold: float = ADULT,
        merge_below: int = 0,
    ) -> None:
        super().__init__()
        check_choice("protocol", protocol, splits.PROTOCOLS)
        check_choice("select_on", select_on, get_args(SelectOn))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction!r}")
        for name, value in (("seed", seed), ("num_workers", num_workers)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        if samples_per_class is not None:
            check_samples_per_class(samples_per_class, batch_size)
        self.split_protocol = protocol
        self.batch_size = batch_size
        self.val_fraction = val_fraction if select_on == "val" else 0.0
        self.select_on = select_on
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.samples_per_class = samples_per_class
        self.feature_cache = feature_cache
        self.metadata = _checked(metadata)
        check_limits(age_threshold, merge_below)
        self.age_threshold = age_threshold
        self.merge_below = merge_below
        self.protocol: dict[str, Any] = {}

    def keep_settings(self) -> None:
        """Make the saved arguments plain data that mean the same everywhere, and check those about reading."""
        for name, value in self.hparams.items():
            if isinstance(value, np.generic):
                self.hparams[name] = value.item()
            elif name in ("root", "cache_dir") and value is not None:
                self.hparams[name] = str(Path(value).expanduser().absolute())
        if self.metadata is not None:
            self.hparams["metadata"] = {name: list(columns) for name, columns in self.metadata.items()}
        check_reading(*(self.hparams[name] for name in _READING))
        if self.hparams["band"] is not None:
            self.hparams["band"] = [float(edge) for edge in self.hparams["band"]]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that go to the data set as they are."""
        return {name: self.hparams[name] for name in _SETTINGS}

    @abstractmethod
    def dataset(self, download: bool = False) -> RespiratoryDataset:
        """Read the tables of every split; with *download*, fetch what is missing first."""

    @abstractmethod
    def label_map(self) -> str:
        """Name of the label map, for the protocol record."""

    def prepare_data(self) -> None:
        """Download if asked to, and resample every cycle once (one process of each node)."""
        if self.hparams["download"]:
            self.dataset(download=True)
        self.data.prepare()

    @cached_property
    def data(self) -> RespiratoryDataset:
        """Every side of the data set."""
        return self.dataset()

    @cached_property
    def split(self) -> splits.Split:
        """Row labels of the three sides, under the chosen protocol."""
        cycles = self.data.cycles
        if "train" not in set(cycles["split"]):
            raise DatasetNotFoundError(
                f"{self.hparams['root']} has no train side, so no protocol can be formed; add the train files "
                f"(for SPRSound after 2022, those of 2022)"
            )
        return splits.split_cycles(
            cycles, self.split_protocol, self.val_fraction, self.seed, self.test_splits, self._folds
        )

    @property
    def _folds(self) -> Mapping[str, int] | None:
        return self.folds if self.split_protocol.startswith("patient-fold") else None

    def setup(self, stage: str) -> None:
        """Build only the sides that *stage* needs; called on every process."""
        self._start_protocol()  # before any side is made, which would lack the labels
        if stage in {"fit", "validate"}:
            self.train_set = self.data.subset(self.split.train)
            self.val_set = self.data.subset(self.split.test if self.select_on == "test" else self.split.val)
            if stage == "validate" and not len(self.val_set):
                raise ValueError("there is no validation side: val_fraction is 0")
        if stage in {"test", "predict"}:
            self.test_set = self.data.subset(self.split.test)

    def cache_features(self, features: Callable[[Tensor], Tensor], spec: Mapping[str, Any]) -> None:
        """Keep the features of every cycle on disk, as ``features`` in the samples of every side.

        See :meth:`respiro.datasets.RespiratoryDataset.cache_features`. Sides set up later have them too.
        """
        self.data.cache_features(features, spec)
        for side in ("train_set", "val_set", "test_set"):
            if hasattr(self, side):
                getattr(self, side).feature_store = self.data.feature_store

    def add_quality(self, quality: Quality) -> None:
        """Score how good the recording of each cycle is, as ``quality`` in the tables and samples of every side.

        See :meth:`respiro.datasets.RespiratoryDataset.add_quality`. *quality* is fitted, in place, to the train cycles
        without their validation patients. The record tells how it was built and what it found. Sides set up later have
        the scores too.
        """
        self._start_protocol()
        self.data.add_quality(quality, self.split.train)
        for side in ("train_set", "val_set", "test_set"):
            if hasattr(self, side):
                getattr(self, side).replace_cycles(self.data.all_cycles)
        self.protocol["quality"] = {**quality.spec(), "rms_range": quality.rms_range.tolist()}

    def _start_protocol(self) -> None:
        if not self.protocol:
            self.protocol = self._record() | {"metadata": self._add_labels()}

    def _add_labels(self) -> dict[str, Any]:
        """Label all cycles by their metadata, and return the record of each label."""
        asked = self.metadata is not None
        limits = self.age_threshold, self.merge_below, self.split.train
        return {
            name: self.data.add_labels(name, columns, *limits, strict=asked).to_dict()
            for name, columns in (METADATA if self.metadata is None else self.metadata).items()
        }

    @property
    def class_counts(self) -> list[int]:
        """Train cycles of each class."""
        return self.data.subset(self.split.train).class_counts

    def _record(self) -> dict[str, Any]:
        data = self.data
        sides = self.split.describe(data.cycles)
        del sides["name"], sides["seed"]  # said below, the seed also where nothing was drawn
        folds = {"folds": "drawn" if self._folds is None else "published"} if "fold" in self.split_protocol else {}
        return {
            "dataset": type(data).__name__,
            "protocol": self.split.name,
            **folds,
            "labels": self.label_map(),
            "classes": list(data.classes),
            "scoring": self.scoring,
            "test_splits": list(self.test_splits),
            "select_on": self.select_on,
            "val_fraction": self.val_fraction,
            "samples_per_class": None if self.samples_per_class is None else int(self.samples_per_class),
            "feature_cache": bool(self.feature_cache),
            "seed": self.seed,
            "partial": bool(getattr(data, "partial", False)),
            "any_encoding": data.any_encoding,
            "left_out_by_labels": len(data.left_out),
            **data.origin,
            "data_digest": data.digest,
            "audio": data.reading,
            "vocabularies": {name: list(data.vocabularies[name]) for name in CODED if name != "patient"},
            **sides,
            "respiro": __version__,
        }

    def train_dataloader(self) -> Loader:
        """Train side, shuffled or in batches of equal classes (``samples_per_class``), which are all full.

        A shuffled epoch keeps its last, smaller batch unless ``drop_last`` is set. Under a trainer the order depends on
        the seed and the epoch alone, so that a resumed training goes on as it would have gone on.
        """
        data = self.train_set
        sampler = train_sampler(data, self.trainer, self.batch_size, self.samples_per_class)
        shuffle = sampler is None
        loader = DataLoader(data, sampler=sampler, shuffle=shuffle, drop_last=self.drop_last, **self._loading(data))
        if len(data) and not len(loader):
            raise ValueError(
                f"{len(data)} train cycles make no batch of {self.batch_size}, and a smaller one is dropped; "
                f"use a smaller batch_size, or drop_last=False"
            )
        return loader

    def val_dataloader(self) -> Loader | list[Loader]:
        """Validation side in order, or nothing where ``val_fraction`` is 0."""
        return self._evaluation_loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> Loader:
        """Test side in order."""
        return self._evaluation_loader(self.test_set)

    predict_dataloader = test_dataloader

    def _evaluation_loader(self, data: RespiratoryDataset) -> Loader:
        trainer = self.trainer
        sampler = None
        if trainer is not None and trainer.world_size > 1:
            # Lightning's own sampler repeats cycles until every process has as many; they would be counted twice.
            sampler = UnrepeatedDistributedSampler(
                data, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
            )
        return DataLoader(data, sampler=sampler, shuffle=False, **self._loading(data))

    def _loading(self, data: RespiratoryDataset) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }


def _checked(metadata: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]] | None:
    """Return the columns of each label, or ``None`` as it is."""
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata must map names to columns, such as {dict(METADATA)}, got {metadata!r}")
    for name in metadata:
        check_label_name(name)
    return {name: check_columns(columns) for name, columns in metadata.items()}
