"""Reading a checkpoint safely, and telling one of ours from anything else."""

from __future__ import annotations

import pickle
import pkgutil
from pathlib import Path
from typing import Any

import torch

from respiro.errors import CheckpointError

#: Key of our record in a Lightning checkpoint: version, class path, data and the records of every training.
RECORD = "respiro"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint of ours; plain data and memory-mapped tensors only.

    Raises:
        CheckpointError: If there is no such file, or it was not written by a respiro method.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint: {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of plain data (truncated, or saved by another program): {error}"
        ) from error
    if not isinstance(checkpoint, dict) or RECORD not in checkpoint or "hyper_parameters" not in checkpoint:
        raise CheckpointError(
            f"{path} was not written by a respiro method: it has no {RECORD!r} record. Pretrained weights of other "
            f"projects are loaded into a backbone instead, not restored as a method"
        )
    return checkpoint


def restore(path: str | Path, **parts: Any) -> Any:
    """Restore whichever method wrote the checkpoint; *parts* as in ``load_from_checkpoint``.

    Raises:
        CheckpointError: If the file is not one of ours, or its method is not part of respiro.
    """
    class_path = str(read_checkpoint(path)[RECORD]["class_path"])
    if class_path.split(".")[0] != "respiro":
        raise CheckpointError(
            f"{path} was written by {class_path!r}, which is not part of respiro; "
            f"restore it with that class: {class_path.rpartition('.')[2]}.load_from_checkpoint(path)"
        )
    try:
        method = pkgutil.resolve_name(class_path)
    except (ImportError, AttributeError):
        raise CheckpointError(
            f"{path} was written by {class_path!r}, which this version of respiro does not have; "
            f"install the version that wrote it"
        ) from None
    return method.load_from_checkpoint(path, map_location="cpu", weights_only=True, **parts)
