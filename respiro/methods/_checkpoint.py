"""Reading a checkpoint safely, and telling one of ours from anything else."""

from __future__ import annotations

import pickle
import pkgutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from typing_extensions import Self

from respiro import __version__
from respiro.component import Backbone, class_path
from respiro.errors import CheckpointError

#: Key of our record in a Lightning checkpoint: version, class path, data and the records of every training.
RECORD = "respiro"


class SelfDescribing(LightningModule):
    """A module whose checkpoint tells what it is and what it was trained on, so that it restores without arguments."""

    backbone: Backbone

    @property
    def history(self) -> list[dict[str, Any]]:
        """Protocol record of each training of the encoder, the oldest first: a stamp once earned stays."""
        # With the encoder, which may go on from method to method.
        return list(getattr(self.backbone, "history", ()))

    @history.setter
    def history(self, records: list[dict[str, Any]]) -> None:
        self.backbone.history = records

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what is needed to restore the model, and the protocol it was trained under."""
        data = getattr(self.trainer, "datamodule", None)
        checkpoint[RECORD] = {
            "version": __version__,
            "class_path": class_path(type(self)),
            "history": self.history,
            "data": data and {"class_path": class_path(type(data)), "init_args": dict(data.hparams)},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the records of earlier trainings; where one is resumed, its own stands last."""
        earlier = checkpoint.get(RECORD, {}).get("history", [])
        pretrained = earlier[-1].get("pretrained") if earlier else None
        self.backbone.pretrained = pretrained
        own = [record | {"pretrained": pretrained} for record in self.history]
        self.history = [*earlier, *(record for record in own if record not in earlier)]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Restore a model; parts that respiro did not write are passed by name.

        Raises:
            CheckpointError: If the file is not one of ours, or names a part that only its author can build.
        """
        read_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


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
