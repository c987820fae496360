"""Train on one data set, test on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from respiro.audio import Pad
from respiro.datamodules._cross_audit import FEWEST, CrossAudit, audit_sides, unmeasured
from respiro.datamodules._sources import CLASSES, LABEL_MAPS, Source, check_common, describe_source, source_of
from respiro.datamodules.base import RespiratoryDataModule, SelectOn
from respiro.datasets import RespiratoryDataset
from respiro.datasets._joined import JoinedDataset, Side
from respiro.datasets._tables import mark_clean
from respiro.datasets.base import Fade
from respiro.errors import DatasetNotFoundError, LabelError, check_choice

__all__ = ["CrossDatasetDataModule"]

#: Hyperparameters that every data set is read with.
_READING = ("sample_rate", "duration", "pad", "fade", "resample", "band", "cache_dir")


class CrossDatasetDataModule(RespiratoryDataModule):
    """Train on one data set and test on others, under one label map and read in one way.

    *train* and *test* are datamodules that name which data: root, protocol, year, side, and whether copies may be
    partial. How these are read, labelled and batched is said here, once for all. Each test set is reported apart
    (``Evaluation.by_set``), named by its data set: ``"ICBHI test"``, ``"SPRSound inter"``, ``"SPRSound intra"``,
    ``"SPRSound test 2023"``. The cycles table has their names in ``split``, and the data set in ``dataset``, which also
    stands before each patient, recording and take.

    The record says which classes of which test set have fewer than 10 cycles, too few to measure
    (``protocol["unmeasured"]``), and which patients are on both sides where one database is. :meth:`audit` shows that
    before a training.

    Args:
        train: Whose train side trains, and validates. An ICBHI side is that of its protocol, ``"official"`` or
            ``"official-clean"``.
        test: Whose test sides test; one, or several.
        label_map: ``"drop"`` and ``"qlung"`` have ICBHI's four classes, fine and coarse crackles of SPRSound being
            crackles; rhonchi and stridor are left out, or are wheezes as in QLung (Kim et al., 2026). ``"two-class"``
            tells normal from abnormal.
        batch_size: Cycles per batch and process.
        val_fraction: Share of the train side held out for validation, by patient; in [0, 1).
        select_on: ``"val"``, or ``"test"`` to choose the epoch on the test sets, which is stamped on every result.
        seed: Chooses the validation patients.
        num_workers: Loader processes; reading is cheap, 0 is enough without a GPU.
        drop_last: Leave out the last train batch of an epoch where it is smaller than the others.
        samples_per_class: Draw train batches of ``batch_size / samples_per_class`` classes with so many cycles of each,
            instead of shuffling.
        sample_rate: Hz.
        duration: Seconds of every waveform.
        pad: ``"repeat"``, ``"zero"`` or ``"reflect"``.
        fade: ``"recording"``, ``"cycle"`` or ``"none"``.
        resample: ``"recording"`` or ``"cycle"``.
        band: Lowest and highest frequency (Hz) that is kept of every recording: recordings of SPRSound end at 4 kHz,
            those of ICBHI at 2, 5 or 22 kHz, which a model may hear. Default all.
        cache_dir: Where resampled cycles, and features, are kept.
        feature_cache: Keep the features of every cycle on disk, computed once by the model's front end.
        metadata: Columns of the cycles table by the batch key of the label that they make: see
            :class:`ICBHIDataModule`.
        age_threshold: Years, between the two values of ``age_group`` there.
        merge_below: Train cycles that a combination needs to have a label of its own.

    Raises:
        ValueError: If an argument has no meaning, a source is none of our datamodules or has an argument of its own
            about what is common, or a test set is named twice. When the tables are read: if a test set has no cycle.
        LabelError: When the tables are read, if a class has no train cycle under the label map.

    Example:
        >>> import tempfile
        >>> from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
        >>> from respiro.datasets import write_synthetic_icbhi, write_synthetic_sprsound
        >>> folder = tempfile.mkdtemp()
        >>> icbhi = ICBHIDataModule(write_synthetic_icbhi(folder + "/icbhi", num_patients=8))
        >>> children = SPRSoundDataModule(write_synthetic_sprsound(folder + "/sprsound"), partial=True)
        >>> data = CrossDatasetDataModule(train=icbhi, test=[icbhi, children], band=(50, 2000))
        >>> data.setup("test")
        >>> sorted(data.test_set.cycles["split"].unique())
        ['ICBHI test', 'SPRSound inter', 'SPRSound intra']
    """

    def __init__(
        self,
        train: RespiratoryDataModule,
        test: RespiratoryDataModule | list[RespiratoryDataModule],
        label_map: Literal["drop", "qlung", "two-class"] = "qlung",
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
        band: tuple[float, float] | None = None,
        cache_dir: str | Path | None = None,
        feature_cache: bool = False,
        metadata: Mapping[str, Sequence[str]] | None = None,
        age_threshold: float = 18.0,
        merge_below: int = 0,
    ) -> None:
        check_choice("label_map", label_map, LABEL_MAPS)
        tests = list(test) if isinstance(test, list | tuple) else [test]
        given = {"train": train} | {f"test[{number}]": source for number, source in enumerate(tests)}
        sources = {where: source_of(source, where) for where, source in given.items()}
        specs = {where: describe_source(source, where) for where, source in sources.items()}
        common: dict[str, Any] = {
            "batch_size": batch_size,
            "val_fraction": val_fraction,
            "select_on": select_on,
            "seed": seed,
            "num_workers": num_workers,
            "drop_last": drop_last,
            "samples_per_class": samples_per_class,
            "feature_cache": feature_cache,
            "metadata": metadata,
            "age_threshold": age_threshold,
            "merge_below": merge_below,
        }
        super().__init__(protocol=specs["train"]["init_args"].get("protocol", "official"), **common)
        train_spec, *test_specs = specs.values()
        self.save_hyperparameters(
            {
                "train": train_spec,
                "test": test_specs,
                "label_map": label_map,
                **common,
                "sample_rate": sample_rate,
                "duration": duration,
                "pad": pad,
                "fade": fade,
                "resample": resample,
                "band": band,
                "cache_dir": cache_dir,
            }
        )
        self.keep_settings()
        for where, source in sources.items():
            check_common(source, where, label_map, self.hparams)
        self.classes = CLASSES[label_map]
        how = {name: self.hparams[name] for name in _READING}
        self.train_source, *self.test_sources = (Source(spec, label_map, how) for spec in specs.values())
        self.test_splits = tuple(name for source in self.test_sources for name in source.test_sets.values())
        twice = [name for name in self.test_splits if self.test_splits.count(name) > 1]
        if twice or not self.test_splits:
            problem = f"the test set {twice[0]!r} stands in it twice" if twice else "it is empty"
            raise ValueError(f"test must name at least one test set, and none twice; {problem}")

    def prepare_data(self) -> None:
        """Download what sources are asked to, and resample every cycle once (one process of each node)."""
        for source in (self.train_source, *self.test_sources):
            if source.module.hparams["download"]:
                source.module.dataset(download=True)
        self.data.prepare()

    def dataset(self, download: bool = False) -> JoinedDataset:
        """Read the tables of every source; with *download*, fetch what is missing first."""
        parts: dict[tuple[Any, ...], RespiratoryDataset] = {}
        for source in (self.train_source, *self.test_sources):
            if source.key not in parts:
                parts[source.key] = source.module.dataset(download)
        sides = [_train_side(self.train_source, parts[self.train_source.key])]
        sides += [_test_side(source, parts[source.key]) for source in self.test_sources]
        data = JoinedDataset(sides, cache_dir=self.hparams["cache_dir"])
        self._check_sides(data)
        return data

    def _check_sides(self, data: JoinedDataset) -> None:
        """Raise an error for a class that cannot be learnt, or a test set that cannot be measured."""
        labels = data.cycles.loc[data.cycles["split"] == "train", "label"]
        absent = [name for label, name in enumerate(data.classes) if not (labels == label).any()]
        if absent:
            raise LabelError(
                f"under label_map {self.hparams['label_map']!r}, {self.train_source.name} has no train cycle of "
                f"{', '.join(map(repr, absent))}, so no model can learn it; train on more recordings, or use "
                f"label_map='two-class'"
            )
        for name in self.test_splits:
            if not (data.cycles["split"] == name).any():
                raise ValueError(
                    f"the test set {name!r} has no cycle under label_map {self.hparams['label_map']!r}; leave it out, "
                    f"or add its recordings"
                )

    def label_map(self) -> str:
        """Name of the label map, with its policy."""
        name = str(self.hparams["label_map"])
        return f"{name} ({LABEL_MAPS[name]})"

    def audit(self) -> CrossAudit:
        """Look at every side: cycles, classes that cannot be measured, what is left out, bandwidth, shared patients."""
        return audit_sides(self.data, self.label_map(), self.test_splits)

    def _record(self) -> dict[str, Any]:
        few = unmeasured(self.data, self.test_splits)
        record = super()._record()
        return record | {
            "dataset": f"{self.train_source.name} to {', '.join(self.test_splits)}",
            "trained_on": [self.train_source.name],
            "tested_on": list(dict.fromkeys(source.name for source in self.test_sources)),
            "unmeasured": {name: list(classes) for name, classes in few.items()},
            "notes": [
                *record["notes"],
                *(_few(name, label, count) for name, found in few.items() for label, count in found.items()),
            ],
        }


def _train_side(source: Source, data: RespiratoryDataset) -> Side:
    """Return the train side of a source, under its protocol: what that leaves out stays in the table as left out."""
    cycles = data.all_cycles
    if source.module.split_protocol == "official-clean":
        cycles = mark_clean(cycles, source.module.test_splits)
    if "train" not in set(cycles["split"]):
        raise DatasetNotFoundError(
            f"{source.module.hparams['root']} has no train side; add the train files (for SPRSound after 2022, those "
            f"of 2022)"
        )
    return Side(data, source.name, cycles[cycles["split"].isin(["train", "left-out"])])


def _test_side(source: Source, data: RespiratoryDataset) -> Side:
    names = data.all_cycles["split"].map(source.test_sets)
    return Side(data, source.name, data.all_cycles.assign(split=names)[names.notna()])


def _few(name: str, label: str, count: int) -> str:
    cycles = f"{count or 'no'} {'cycle' if count == 1 else 'cycles'}"
    return (
        f"{name} has {cycles} of {label!r}, too few to measure that class (fewer than {FEWEST}); "
        f"the macro-F1 of that set is without it"
    )
