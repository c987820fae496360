"""Parts that remember how they were built, so that a checkpoint holds plain data only.

A :class:`Component` records its constructor arguments. :func:`describe` turns a part into
``{"class_path": ..., "init_args": ...}``, the form LightningCLI uses, and :func:`build` makes the part again.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import Self

from respiro.errors import CheckpointError

__all__ = [
    "Backbone",
    "Component",
    "Loss",
    "Mixed",
    "TokenBackbone",
    "Transform",
    "build",
    "check_partners",
    "class_path",
    "describe",
    "eval_mode",
    "plain",
    "unit",
]

Spec = dict[str, Any]
Part = TypeVar("Part", bound=nn.Module)
_PLAIN = (str, int, float, bool, type(None))
_SHORTEST = 1e-12  # of a row that has a direction, as torch's normalize has it


class Component(nn.Module):
    """Module that remembers the arguments it was built with.

    Arguments must be plain data (numbers, strings, booleans, ``None``, lists or dicts of them) or components.

    Example:
        >>> class Scale(Component):
        ...     def __init__(self, factor: float = 2.0) -> None:
        ...         super().__init__()
        >>> Scale().init_args
        {'factor': 2.0}
    """

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments, defaults included: a default that changes later must not change an old checkpoint."""
        self = super().__new__(cls)
        # Partial, because copy.deepcopy and pickle call cls.__new__(cls) before they restore the state.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        _self, *arguments = bound.arguments.items()
        object.__setattr__(self, "init_args", dict(arguments))
        return self

    def spec(self) -> Spec:
        """Return ``{"class_path", "init_args"}``, the form LightningCLI uses."""
        return {
            "class_path": class_path(type(self)),
            "init_args": {
                name: plain(value, f"{type(self).__name__}.{name}") for name, value in self.init_args.items()
            },
        }


class Backbone(Component):
    """Encoder: features ``(B, T, F)`` to embeddings ``(B, num_features)``."""

    num_features: int
    #: Name and digest of the weights it was filled with, and the front end they were trained with where that is known.
    pretrained: dict[str, Any] | None = None
    #: Protocol record of each of its trainings, the oldest first.
    history: Sequence[dict[str, Any]] = ()


class TokenBackbone(Backbone):
    """Encoder that cuts features into a grid of tokens, which can be mixed before it goes on with them."""

    #: Tokens along (frequency, time).
    grid: tuple[int, int]

    def embed_patches(self, features: Tensor) -> Tensor:
        """Return the tokens ``(B, grid[0] * grid[1], D)`` of features ``(B, T, F)``, row by row of the grid."""
        raise NotImplementedError

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings ``(B, num_features)`` of tokens, mixed or not."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings ``(B, num_features)``."""
        return self.forward_tokens(self.embed_patches(features))


class _Exact(Component):
    """Keeps the precision of its buffers when it is cast: the few digits of half precision are not enough for them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moves to a device come this way, and so do casts.
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Transform(_Exact):
    """Feature extraction, augmentation or mixing on batches: waveforms ``(B, S)``, features ``(B, T, F)`` or tokens."""

    #: What it mixes the samples of, returning :class:`Mixed`; nothing, if it is no mixing transform.
    mixes: ClassVar[Literal["features", "tokens"] | None] = None


class Mixed(NamedTuple):
    """A batch in which every sample holds parts of another: what mixing transforms return."""

    #: The mixed samples, in the shape they came in.
    x: Tensor
    #: Partner of each sample ``(B,)``, int64: sample ``i`` holds parts of sample ``index[i]``.
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, of no use here
    #: Share of its own that a sample kept, in [0, 1]: one for the batch ``()``, or one per sample ``(B,)``.
    lam: Tensor


class Loss(_Exact):
    """Training objective that returns a scalar."""

    def use_class_counts(self, counts: Sequence[int]) -> None:
        """Receive the class counts of the train split before training; most losses need none."""


def describe(part: nn.Module) -> Spec:
    """Return the plain-data description of *part*.

    A module that respiro did not write is described by its name alone; :func:`build` then asks for it.
    """
    return part.spec() if isinstance(part, Component) else {"class_path": class_path(type(part))}


def build(part: Any, kind: type[Part], argument: str) -> Part:
    """Return *part* as it is if it is a module, else build it from its description.

    Args:
        part: A module, or what :func:`describe` returned.
        kind: The class the part must have when it is built from a description.
        argument: Name under which a caller can pass the part by hand; used in messages.

    Raises:
        CheckpointError: If the description names a class that respiro did not write, that does not exist, or that
            cannot be built with these arguments.
        TypeError: If *part* is neither a module nor a description.
    """
    if isinstance(part, nn.Module):
        return part  # type: ignore[return-value]  # a foreign module may stand in for any kind
    if not isinstance(part, Mapping) or "class_path" not in part:
        raise TypeError(f"{argument} must be a {kind.__name__} or another torch module, got {part!r}")
    path = str(part["class_path"])
    if path.split(".")[0] != "respiro":
        raise CheckpointError(
            f"the checkpoint names {path!r}, which respiro did not write; "
            f"build it yourself and pass it: load_from_checkpoint(path, {argument}=...)"
        )
    try:
        cls = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        raise CheckpointError(
            f"the checkpoint names {path!r}, which this version of respiro does not have; "
            f"install the version that wrote it, or pass the part: load_from_checkpoint(path, {argument}=...)"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise CheckpointError(f"the checkpoint names {path!r} as {argument}, which is not a {kind.__name__}")
    init_args = {name: _rebuild(value, argument) for name, value in part.get("init_args", {}).items()}
    try:
        return cls(**init_args)
    except TypeError as error:
        raise CheckpointError(f"{path} cannot be built from the checkpoint: {error}") from error


def class_path(cls: type) -> str:
    """Return the name under which *cls* can be imported: the public one if it has one, which outlives its module."""
    package = ".".join(cls.__module__.split(".")[:2])
    public = getattr(sys.modules.get(package), cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"


def check_partners(index: Tensor, batch: int) -> None:
    """Check the partners of a mixed batch, their range on a CPU only.

    On a GPU the look would wait for all that is under way, and torch itself stops at an index outside the batch.

    Raises:
        ValueError: If *index* is not int64 of shape ``(batch,)``, or names a sample that is not in the batch.

    Example:
        >>> check_partners(torch.tensor([1, 2]), batch=2)
        Traceback (most recent call last):
            ...
        ValueError: index must name samples of the batch, 0 to 1, got [1, 2]
    """
    if index.dtype != torch.int64 or index.shape != (batch,):
        raise ValueError(
            f"index must be int64 of shape ({batch},), a partner for each sample, "
            f"got {index.dtype} of shape {tuple(index.shape)}"
        )
    if index.device.type == "cpu" and batch and not 0 <= index.min() <= index.max() < batch:
        raise ValueError(f"index must name samples of the batch, 0 to {batch - 1}, got {index.tolist()}")


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to eval mode; afterwards give every part its own mode back, as some may be frozen in eval mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def plain(value: Any, where: str) -> Any:
    """Return *value* as data that a checkpoint can hold; *where* names it in the error.

    Raises:
        CheckpointError: If it holds anything but numbers, strings, booleans, ``None``, lists, dicts and components.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, nn.Module):
        return describe(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    raise CheckpointError(f"{where} holds a {type(value).__name__}, which a checkpoint cannot hold; pass plain data")


def unit(x: Tensor) -> Tensor:
    """Return the rows scaled to length 1, in float32 or, if they came so, in float64.

    A row of zeros (no value above 1e-12) has no direction: it stays zero, so that its similarity to every other is 0,
    and its gradient is zero.

    Args:
        x: ``(B, D)``, finite.

    Returns:
        ``(B, D)``.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    empty = largest <= _SHORTEST
    # Scaled first, as the square of a large value is infinite; the length has no effect on the result.
    return normalize(x / largest.masked_fill(empty, 1.0), dim=1).masked_fill(empty, 0.0)


def _rebuild(value: Any, argument: str) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, Component, argument)
    if isinstance(value, Mapping):
        return {key: _rebuild(item, argument) for key, item in value.items()}
    if isinstance(value, list):
        return [_rebuild(item, argument) for item in value]
    return value
