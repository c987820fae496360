"""Pretrained weights: a published file by its name, or any file by its path, checked before anything is loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from respiro.download import cache_folder, fetch, file_sha256
from respiro.errors import WeightsError
from respiro.models._published import Weights, WeightsFile
from respiro.models._reading import read

__all__ = ["Converted", "LoadReport", "Weights", "WeightsFile", "load_weights"]


@dataclass(frozen=True)
class Converted:
    """What ``convert_weights`` of a backbone makes of the tensors of a file.

    Args:
        encoder: Tensors by their names in the backbone; those it does not know keep theirs, and are refused later.
        head: Names in :class:`respiro.models.LinearHead` of the classifier's tensors, and those in the file.
        unused: Names in the file of tensors that are known and not needed.
        looks_like: What the file seems to be, for messages; empty if that cannot be told.
    """

    encoder: dict[str, Tensor]
    head: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    looks_like: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` did.

    Args:
        matched: Names in the model of the tensors that were loaded.
        missing: Names in the model of a classifier that the file does not hold: it keeps its values.
        unexpected: Names in the file of tensors that the model has no use for, such as the classifier of AudioSet.
        source: Name of the published weights, or path of the file.
        sha256: Digest of the file.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    source: str
    sha256: str

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.matched)} tensors loaded"]
        parts += [f"not in the file: {_some(self.missing)}"] if self.missing else []
        parts += [f"not used: {_some(self.unexpected)}"] if self.unexpected else []
        return "; ".join([*parts, f"sha256 {self.sha256[:16]}"])


def load_weights(
    model: nn.Module,
    source: Weights | WeightsFile | str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LoadReport:
    """Fill a backbone, or the backbone of a method, with pretrained weights: all of it, or nothing.

    The file is a published one, a state dict, or the checkpoint of a respiro method, of which the backbone is taken.
    Any backbone can be filled from such a checkpoint; the records of its trainings come along in ``history``. Weights
    are taken as they are: build the backbone with the arguments it was trained with.

    A file that also holds a classifier of the method's kind fills the head too; to load the encoder alone, pass
    ``model.backbone``. What was loaded is noted in ``pretrained`` of the backbone. Only tensors and plain data are read
    from a file, so it cannot run code.

    Args:
        model: A backbone, or a method with one. It takes published weights if it has ``convert_weights``.
        source: Published weights, their name, or the path of a ``.safetensors`` or ``torch.save`` file. Published files
            are downloaded once.
        cache_dir: Folder of all caches, where downloads are kept under ``weights``; by default the environment variable
            ``RESPIRO_CACHE``, else the user's cache folder.
        progress: Show a progress bar while downloading.

    Returns:
        The names of the tensors that were loaded, and of those that were not.

    Raises:
        WeightsError: If the file is not there or cannot be read, if the backbone takes no published weights, or if a
            tensor is missing, unknown, of another shape, not finite, or of integers where the model has floating point.
            The model is then as it was.
        DownloadError: If the file cannot be downloaded, or is not what was published.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from respiro.models import CNN6
        >>> cnn = CNN6()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(cnn.state_dict(), f"{folder}/cnn6.pth")
        ...     report = load_weights(cnn, f"{folder}/cnn6.pth")
        >>> len(report.matched), report.missing, report.unexpected
        (24, [], [])
    """
    backbone: Any = getattr(model, "backbone", model)
    name, path, digest = _locate(source, backbone, cache_dir, progress)
    content, tensors = read(path)
    ours = _is_checkpoint(content)
    if not ours:
        _check_converts(backbone)
    converted: Converted = _parts(content, tensors) if ours else backbone.convert_weights(tensors)
    prefix = "" if backbone is model else "backbone."
    own = _tensors(backbone, prefix)
    new = {prefix + key: tensor for key, tensor in converted.encoder.items()}
    head = _tensors(model.head, "head.") if prefix and hasattr(model, "head") else {}
    missing, unexpected = list(head), list(converted.unused)
    if converted.head and head:
        own, missing = own | head, []
        new |= {f"head.{key}": tensors[key_in_file] for key, key_in_file in converted.head.items()}
    else:
        unexpected += converted.head.values()
    if refusal := _refusal(own, new, _call(backbone), converted.looks_like):
        raise WeightsError(f"{name} {refusal}")
    model.load_state_dict(new, strict=False)  # the other parts of a method come from no file
    backbone.pretrained = {"source": name, "sha256": digest or file_sha256(path)}
    if ours:
        earlier = list(content["respiro"].get("history", []))
        backbone.pretrained["features"] = content["hyper_parameters"].get("features")
        backbone.history = earlier + [record for record in getattr(backbone, "history", ()) if record not in earlier]
    return LoadReport(list(new), missing, unexpected, name, backbone.pretrained["sha256"])


def _tensors(module: Any, prefix: str) -> dict[str, Tensor]:
    state = module.state_dict(prefix=prefix)  # foreign modules may keep other things there too
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _locate(
    source: Weights | WeightsFile | str | os.PathLike[str],
    backbone: nn.Module,
    cache_dir: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[str, Path, str | None]:
    """Return the name of the weights, the path of their file, downloaded if necessary, and its SHA-256 if known."""
    if isinstance(source, str) and source in Weights.__members__ and not Path(source).is_file():
        source = Weights[source]
    if isinstance(source, Weights | WeightsFile):
        _check_converts(backbone)
        file = source.value if isinstance(source, Weights) else source
        path = cache_folder(cache_dir) / "weights" / file.name
        fetch(file.url, path, sha256=file.sha256, md5=file.md5, size=file.size, progress=progress)
        whole = file.sha256 if file.sha256 and len(file.sha256) == 64 else None  # which fetch has compared
        return source.name, path, whole and whole.lower()
    path = Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(Weights.__members__)
        raise WeightsError(f"no weights: {path} is not a file, nor one of the published {names}")
    return str(path), path, None


def _check_converts(backbone: nn.Module) -> None:
    if not hasattr(backbone, "convert_weights"):
        raise WeightsError(
            f"{type(backbone).__name__} takes no published weights: it has no method convert_weights. "
            f"Load a checkpoint of a respiro method, or a state dict of its own with load_state_dict"
        )


def _is_checkpoint(content: Any) -> bool:
    """Whether a file was written by a respiro method."""
    parts = ("respiro", "hyper_parameters", "state_dict")
    return isinstance(content, Mapping) and all(isinstance(content.get(part), Mapping) for part in parts)


def _parts(checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Return backbone and head of a method; its loss, projector and metrics are of no use elsewhere."""
    state = [name for name in tensors if name.startswith("state_dict.")]
    backbone, head = (
        {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
        for prefix in ("state_dict.backbone.", "state_dict.head.")
    )
    used = {*backbone.values(), *head.values()}
    method, encoder = checkpoint["respiro"], checkpoint["hyper_parameters"].get("backbone")
    return Converted(
        {name: tensors[name_in_file] for name, name_in_file in backbone.items()},
        head,
        [name for name in state if name not in used],
        f"a checkpoint of {_class_name(method)} with {_class_name(encoder)}",
    )


def _class_name(spec: Any) -> str:
    path = spec.get("class_path") if isinstance(spec, Mapping) else None
    return str(path).rpartition(".")[2] if path else "an unknown class"


def _refusal(own: Mapping[str, Tensor], new: Mapping[str, Tensor], model: str, looks_like: str) -> str:
    """Say why the new tensors cannot take the place of a model's own; nothing if they can."""
    fits = [name for name in new if name in own and new[name].shape == own[name].shape]
    kinds = {
        "missing": [name for name in own if name not in new],
        "unknown": [name for name in new if name not in own],
        "of another size": [
            f"{name} {tuple(new[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in new and new[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name} {new[name].dtype} instead of {own[name].dtype}"
            for name in fits
            if new[name].is_floating_point() != own[name].is_floating_point()
        ],
        "not finite": [name for name in fits if not new[name].isfinite().all()],
    }
    if not any(kinds.values()):
        return ""
    problems = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names)
    head = any(name.startswith("head.") for name in own)
    return (
        f"matches {len(fits)} of {len(own)} tensors of {model}{' and its head' if head else ''}"
        f"{f'; it looks like {looks_like}' if looks_like else ''} ({problems}). Nothing was loaded."
        f"{' To load the encoder alone, pass model.backbone' if head else ''}"
    )


def _call(module: nn.Module) -> str:
    """Write a component as the call that builds it, without the arguments left at their defaults."""
    defaults = {name: argument.default for name, argument in inspect.signature(type(module)).parameters.items()}
    given: dict[str, Any] = getattr(module, "init_args", {})
    changed = [f"{name}={value!r}" for name, value in given.items() if value != defaults.get(name)]
    return f"{type(module).__name__}({', '.join(changed)})"


def _some(names: Sequence[str]) -> str:
    """Join the first three names."""
    first = ", ".join(names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
