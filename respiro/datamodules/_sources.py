"""Our datamodules as sources of a joint one: they name which data, and all else is said once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from respiro.datamodules.base import RespiratoryDataModule
from respiro.datamodules.icbhi import ICBHIDataModule
from respiro.datamodules.sprsound import SPRSoundDataModule
from respiro.errors import check_choice

__all__ = ["CLASSES", "LABEL_MAPS", "Source", "check_common", "describe_source", "source_of"]

#: What becomes of rhonchi and stridor, which ICBHI does not annotate, under each label map; for the record.
LABEL_MAPS = {
    "drop": "rhonchi and stridor: left out",
    "qlung": "rhonchi and stridor: wheeze",
    "two-class": "normal or not",
}
#: Class names in the order of their labels, the same in every source.
CLASSES = {
    "drop": ("normal", "crackle", "wheeze", "both"),
    "qlung": ("normal", "crackle", "wheeze", "both"),
    "two-class": ("normal", "abnormal"),
}
_WHICH = ("root", "partial", "any_encoding", "download", "verify_tls")
_LABELS = ("labels", "task", "rhonchi_stridor")


@dataclass(frozen=True)
class _Kind:
    """What is to be known about a datamodule that can be a source."""

    module: type[Any]
    name: str  #: of the database
    own: tuple[str, ...]  #: arguments that say which data
    labels: dict[str, dict[str, str]]  #: arguments of each label map


_KINDS = (
    _Kind(
        ICBHIDataModule,
        "ICBHI",
        (*_WHICH, "protocol"),
        {"drop": {"labels": "4-class"}, "qlung": {"labels": "4-class"}, "two-class": {"labels": "2-class"}},
    ),
    _Kind(
        SPRSoundDataModule,
        "SPRSound",
        (*_WHICH, "year", "test_side"),
        {
            "drop": {"task": "icbhi4", "rhonchi_stridor": "drop"},
            "qlung": {"task": "icbhi4", "rhonchi_stridor": "wheeze"},
            "two-class": {"task": "icbhi2"},
        },
    ),
)


def source_of(given: Any, where: str) -> RespiratoryDataModule:
    """Return a source: one of our datamodules, as it is or built of its class and arguments as plain data.

    Args:
        given: The one or the other.
        where: What messages call it.

    Raises:
        ValueError: If it is anything else.
    """
    kind = _kind(given, where)
    module: RespiratoryDataModule = kind.module(**given.get("init_args", {})) if isinstance(given, Mapping) else given
    return module


def describe_source(module: RespiratoryDataModule, where: str) -> dict[str, Any]:
    """Return a source as plain data: its class and the arguments that say which data.

    Raises:
        ValueError: If its protocol is not one of the official ones.
    """
    kind = _kind(module, where)
    check_choice(f"{where}: protocol", module.split_protocol, ("official", "official-clean"))
    return {"class_path": _class_path(kind), "init_args": {name: module.hparams[name] for name in kind.own}}


def check_common(module: RespiratoryDataModule, where: str, label_map: str, common: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a source says something of its own about what is common to all.

    Args:
        module: The source.
        where: What messages call it.
        label_map: Name of the label map.
        common: Every other argument that is common.
    """
    kind = _kind(module, where)
    for name, parameter in inspect.signature(kind.module).parameters.items():
        value = module.hparams[name]
        wanted = kind.labels[label_map].get(name, parameter.default) if name in _LABELS else common.get(name)
        if name in kind.own or value in (parameter.default, wanted):
            continue
        argument, because = name, "is the same for all data sets"
        if name in _LABELS:
            argument, because = "label_map", f"follows from label_map={label_map!r}"
        raise ValueError(
            f"{where}: {name} {because}, got {name}={value!r} in {kind.module.__name__}; leave it out there, and give "
            f"{argument} to CrossDatasetDataModule"
        )


class Source:
    """A data set that trains or tests.

    Args:
        spec: What :func:`describe_source` returned.
        label_map: Name of the label map.
        reading: Arguments of the datamodule that say how sound is read and where it is kept.
    """

    def __init__(self, spec: Mapping[str, Any], label_map: str, reading: Mapping[str, Any]) -> None:
        kind = next(kind for kind in _KINDS if _class_path(kind) == spec["class_path"])
        self.module: RespiratoryDataModule = kind.module(**spec["init_args"], **kind.labels[label_map], **reading)
        self.name = kind.name
        # Sides and protocol are chosen from the tables, which are the same for all of them.
        which = [item for item in spec["init_args"].items() if item[0] not in ("protocol", "test_side", "download")]
        self.key = (kind.name, *sorted(which))

    @property
    def test_sets(self) -> dict[str, str]:
        """Name of the test set that each test split is, such as ``"SPRSound inter"``."""
        year = self.module.hparams.get("year", 2022)
        suffix = "" if year == 2022 else f" {year}"
        return {split: f"{self.name} {split}{suffix}" for split in self.module.test_splits}


def _kind(source: Any, where: str) -> _Kind:
    described = isinstance(source, Mapping)
    for kind in _KINDS:  # a class derived from one would be rebuilt as another one
        if source.get("class_path") == _class_path(kind) if described else type(source) is kind.module:
            return kind
    known = " or ".join(kind.module.__name__ for kind in _KINDS)
    found = repr(source.get("class_path")) if described else type(source).__name__
    raise ValueError(f"{where} must be one of {known}, which name the data, got {found}")


def _class_path(kind: _Kind) -> str:
    return f"respiro.datamodules.{kind.module.__name__}"
