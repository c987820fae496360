"""Reading files of weights: tensors and plain data are read, and nothing in a file can run."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from respiro.errors import WeightsError

__all__ = ["read"]


class _NotNeeded:
    """Takes the place of what is neither tensor nor plain data, and keeps nothing of it."""

    def __init__(self, *args: object) -> None:
        """Accept any arguments."""

    def __setstate__(self, state: object) -> None:
        """Accept any state."""


def _stand_in(path: str) -> type[_NotNeeded]:
    module, _, name = path.rpartition(".")
    return type(name, (_NotNeeded,), {"__module__": module})


#: What research code saves beside its weights: the command line; arrays, numbers and random states of numpy, by their
#: names in numpy 1 and 2. None of them is built, as numpy believes what a file says of an array, true or not.
_STAND_INS: list[Any] = [
    _stand_in(path)
    for path in (
        "argparse.Namespace",
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        "numpy.random.__RandomState_ctor",
        "numpy.random._pickle.__randomstate_ctor",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random._mt19937.MT19937",
    )
]


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return what a file of ``torch.save`` or of safetensors holds, and its tensors: nested ones by their joined names.

    Raises:
        WeightsError: If it is damaged, holds what could run code, or no tensor with a name.
    """
    content = _content(path)
    tensors = dict(_named(content, ""))
    if not tensors:
        raise WeightsError(f"{path} holds no weights: there are no tensors with a name in it")
    return content, tensors


def _content(path: Path) -> Any:
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
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        cause = f"it names {named[1]}" if named else f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        raise WeightsError(
            f"{path} cannot be read as weights: it is damaged or incomplete, or it holds more than tensors and plain "
            f"data, which could run code and is not read ({cause}). "
            f"Fetch it again, or save the state dict alone"
        ) from error


def _named(content: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{name}{key}", value
        else:
            yield from _named(value, f"{name}{key}.")
