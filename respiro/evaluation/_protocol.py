"""What a number stands on: the record of the evaluation with those of the trainings, and what is read from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["make_record", "saw_dataset", "seeds", "selection", "stamps", "trained_elsewhere"]

Record = Mapping[str, Any]


def make_record(model: nn.Module, datamodule: Any, split: str) -> dict[str, Any]:
    """Return the data module's record with the side, a digest of the weights, and the records of the trainings."""
    record = dict(datamodule.protocol) | {"split": split, "weights_sha256": _digest(model)}
    if record.get("seed") is None:
        record["seed"] = getattr(datamodule, "seed", None)
    training: Any = getattr(model, "protocol", None)
    if not training:
        return record
    history: Any = getattr(model, "history", ())
    more = {"training_history": [dict(earlier) for earlier in history]} if len(history) > 1 else {}
    return record | {"training": dict(training)} | more


def selection(protocol: Record) -> str:
    """Return how the epoch was chosen. Only the record of the training knows that, not the one of the evaluation."""
    training = protocol.get("training", {})
    rule = training.get("select_on")
    if rule is None:
        return "selection: not recorded"
    if rule == "val" and training.get("val_fraction") == 0:
        return "selection: none (no validation side)"
    return f"selection on {rule}"


def seeds(protocol: Record) -> str:
    """Return the seed of the split, and the one of the training where there is a record of it."""
    known = {"split seed": protocol.get("seed")}
    if "training" in protocol:
        known["training seed"] = protocol["training"].get("training_seed")
    return ", ".join(f"{name} {'not recorded' if seed is None else seed}" for name, seed in known.items())


def saw_dataset(protocol: Record) -> bool:
    """Whether the model may have been trained on a data set of this evaluation; without a record it may."""
    trainings = _trainings(protocol)
    return not trainings or any(_of_one_dataset(protocol, training) for training in trainings)


def trained_elsewhere(protocol: Record) -> bool:
    """Whether the model was trained on other data sets than the train side of this record is of."""
    trainings = _trainings(protocol)
    return bool(trainings) and not any(_trained_on(training) & _trained_on(protocol) for training in trainings)


def stamps(protocol: Record) -> dict[str, str]:
    """Return what makes a result incomparable, by its stamp: from the record of the data or of any training."""
    records = [protocol, *_trainings(protocol)]
    found = {}
    if any(record.get("select_on") == "test" for record in records):
        found["TEST-SELECTED"] = "the epoch was chosen on the test set; for comparison with the literature only"
    if any(record.get("leaky") for record in records):
        found["LEAKY"] = "recordings of one patient are on both sides by design"
    if any(record.get("partial") for record in records):
        found["PARTIAL"] = "the data set is incomplete"
    other = [name for name in _deciding(protocol) if any(_differ(protocol, record, name) for record in records)]
    if other:
        found["OTHER SPLIT"] = (
            f"the model was trained under another split of this data set (other {', '.join(other)}); "
            f"it may have seen the patients"
        )
    for stamp in protocol.get("stamps", ()):
        found.setdefault(stamp, "so marked in the table of predictions")
    return found


def _trainings(protocol: Record) -> list[Record]:
    """Return the records of all trainings, oldest first."""
    latest = [protocol["training"]] if "training" in protocol else []
    return list(protocol.get("training_history", latest))


def _deciding(protocol: Record) -> Sequence[str]:
    """Return the entries that decide who trained and who did not; for validation patients these are more."""
    named = str(protocol.get("protocol"))
    drawn = named == "random-recording" or (named.startswith("patient-fold") and protocol.get("folds") == "drawn")
    sides = ["protocol", "folds", "trained_on"]
    if named != "official":  # where the train side is the same whatever is tested on
        sides.append("test_splits")
    if protocol.get("split") != "test":
        return [*sides, "seed", "val_fraction", "select_on"]
    return [*sides, "seed"] if drawn else sides


def _differ(protocol: Record, other: Record, name: str) -> bool:
    """Whether two records of one data set disagree about an entry that both have."""
    joined = "trained_on" in protocol or "trained_on" in other
    # What else is tested on does not change who trains where test sets come from several data sets.
    if not _of_one_dataset(protocol, other) or (name == "test_splits" and joined):
        return False
    if name == "trained_on":
        return _trained_on(protocol) != _trained_on(other)
    values = [
        sorted(value) if isinstance(value, list | tuple) else value for value in (protocol.get(name), other.get(name))
    ]
    return None not in values and values[0] != values[1]


def _trained_on(protocol: Record) -> set[Any]:
    """Return the names of the data sets that train, which is the one that also tests unless the record says more."""
    return set(protocol.get("trained_on", [protocol.get("dataset")]))


def _of_one_dataset(protocol: Record, training: Record) -> bool:
    """Whether the training saw a data set that the evaluation is on."""
    tested = protocol.get("tested_on") if protocol.get("split") == "test" else None
    return bool(_trained_on(training) & (_trained_on(protocol) if tested is None else set(tested)))


def _digest(model: nn.Module) -> str:
    """Return SHA-256 over names and bytes of all weights: which checkpoint a result belongs to."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
