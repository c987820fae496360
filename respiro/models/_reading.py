"""Reading files of weights: tensors and plain data are read, and nothing in a file can run."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from respiro.errors import WeightsError

__all__ = ["named_tensors", "read"]


class _NotNeeded:
    """Takes the place of what is neither tensor nor plain data, and keeps nothing of it."""

    def __new__(cls, *args: object) -> _NotNeeded:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Drop it."""


def _stand_in(path: str) -> type[_NotNeeded]:
    module, _, name = path.rpartition(".")
    return type(name, (_NotNeeded,), {"__module__": module})


#: What research code saves beside its weights: the command line, and arrays, numbers and random states of numpy.
#: torch would build them if it were allowed to; an array made by a file of ill intent points anywhere in memory.
_STAND_INS = [
    _stand_in(path)
    for path in (
        "argparse.Namespace",
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        "numpy.random.__RandomState_ctor",
        *(f"numpy.random._pickle.{kind}_ctor" for kind in ("__randomstate", "__generator", "__bit_generator")),
        *(f"numpy.random.{name}" for name in ("_mt19937.MT19937", "_pcg64.PCG64")),
    )
]


def read(path: Path) -> Any:
    """Return what a file of ``torch.save`` or of safetensors holds.

    Raises:
        WeightsError: If it is damaged, or holds what could run code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        archive = zipfile.is_zipfile(path)
        if archive and (damaged := zipfile.ZipFile(path).testzip()):  # torch compares no checksums
            raise ValueError(f"checksum of {damaged}")
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # whatever a damaged file makes the readers raise
        cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        raise WeightsError(
            f"{path} cannot be read as weights: it is damaged or incomplete, or it holds more than tensors and plain "
            f"data, which could run code and is not read ({cause}). "
            f"Fetch it again, or save the state dict alone"
        ) from error


def named_tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Find every tensor of a file; those in nested dictionaries by their joined names."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{name}{key}", value
        else:
            yield from named_tensors(value, f"{name}{key}.")
