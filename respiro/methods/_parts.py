"""Parts that cannot work together are refused when the method is built, and not in its first training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from respiro.component import Transform
from respiro.errors import LabelError
from respiro.losses import CrossEntropy, MixedCrossEntropy

if TYPE_CHECKING:
    from respiro.methods.classifier import SoundClassifier

__all__ = ["check_classes", "check_data", "check_loss_kind", "check_mixing"]


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class names, which must be two at least and all different."""
    names = tuple(str(name) for name in classes)
    if len(set(names)) != len(names) or len(names) < 2:
        raise LabelError(f"classes must be at least two different names, got {list(names)}")
    return names


def check_data(model: SoundClassifier, data: Any) -> None:
    """Raise an error if a datamodule has other labels or another sampling rate than the model."""
    classes, scoring = getattr(data, "classes", model.classes), getattr(data, "scoring", model.scoring)
    if (tuple(classes), scoring) != (model.classes, model.scoring):
        raise LabelError(
            f"the data set has classes {list(classes)} and scoring {scoring!r}, the model {list(model.classes)} and "
            f"{model.scoring!r}; build the model with {type(model).__name__}(..., classes=datamodule.classes, "
            f"scoring=datamodule.scoring)"
        )
    own = getattr(model.features, "sample_rate", None)
    rate = getattr(data, "protocol", {}).get("audio", {}).get("sample_rate", own)
    if own is not None and rate != own:
        raise ValueError(f"the data set has {rate} Hz, the features expect {own} Hz; give both the same sample_rate")


def check_mixing(argument: str, part: nn.Module, kind: str, examples: str) -> None:
    """Raise a ``TypeError`` if a transform of ours does not mix *kind*, ``"features"`` or ``"tokens"``."""
    if isinstance(part, Transform) and part.mixes != kind:
        raise TypeError(f"{argument} must mix {kind}, as {examples} does, got {type(part).__name__}")


def check_loss_kind(loss: nn.Module, mixed: bool) -> None:
    """Raise a ``TypeError`` if a cross-entropy of ours takes one label where samples have two, or the reverse."""
    wanted, other = (MixedCrossEntropy, CrossEntropy) if mixed else (CrossEntropy, MixedCrossEntropy)
    if isinstance(loss, other):
        samples = "mixed samples, which have two labels" if mixed else "samples that are not mixed"
        raise TypeError(f"{other.__name__} cannot be the loss on {samples}; use {wanted.__name__}")
