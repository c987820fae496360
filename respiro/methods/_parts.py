"""Parts that cannot work together are refused when the method is built, and not in its first training step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from respiro.component import Component, Loss, Transform, describe
from respiro.errors import LabelError
from respiro.models import SpectrogramFusion
from respiro.transforms import StackedFeatures

if TYPE_CHECKING:
    from respiro.methods.classifier import SoundClassifier

__all__ = ["cache_features", "check_classes", "check_data", "check_encoder", "check_mixing", "check_parts"]


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
    for name in ("features", "waveform_augment"):
        own = getattr(getattr(model, name), "sample_rate", None)
        rate = getattr(data, "protocol", {}).get("audio", {}).get("sample_rate", own)
        if own is not None and rate != own:
            raise ValueError(f"the data set has {rate} Hz, the {name} expect {own} Hz; give both the same sample_rate")


def cache_features(model: SoundClassifier, data: Any, stage: str) -> bool:
    """Let a datamodule with ``feature_cache=True`` keep what the front end makes of each cycle; return whether it does.

    Raises:
        ValueError: If the features would differ from step to step, or what shapes them is not known.
    """
    if stage == "predict" or not getattr(data, "feature_cache", False):
        return False
    if stage == "fit" and not isinstance(model.waveform_augment, nn.Identity):
        raise ValueError(
            "waveform_augment changes the waveforms in every step, so their features cannot be kept; "
            "use augment, which works on features, or feature_cache=False"
        )
    if not isinstance(model.features, Component):
        raise ValueError(
            f"what shapes the features of {type(model.features).__name__} is not known, so they cannot be kept on "
            f"disk; derive it from respiro.component.Transform, or use feature_cache=False"
        )
    if any(getattr(part, "normalize", None) == "batch_minmax" for part in model.features.modules()):
        raise ValueError(
            "normalize='batch_minmax' makes the features of a clip depend on the clips beside it, so they cannot be "
            "kept; use 'clip_minmax', or feature_cache=False"
        )
    data.cache_features(model.features, describe(model.features))
    return True


def check_encoder(model: SoundClassifier) -> None:
    """Warn if the encoder was filled with weights that were trained on other features."""
    learnt = (getattr(model.backbone, "pretrained", None) or {}).get("features")
    if learnt not in (None, describe(model.features)):
        warnings.warn(
            f"the encoder was trained on {_call(learnt)}, but gets {_call(describe(model.features))}; "
            f"build the method with features like those, unless that is what you want",
            UserWarning,
            stacklevel=2,
        )


def _call(spec: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in spec.get("init_args", {}).items())
    return f"{spec['class_path'].rpartition('.')[2]}({arguments})"


def check_parts(model: SoundClassifier) -> None:
    """Raise an error for parts of ours that cannot work together; those of others show it in the first step."""
    _check_head(model.head, model.backbone, len(model.classes))
    _check_bins(model.features, model.backbone)
    check_mixing("waveform_augment", model.waveform_augment, None)
    check_mixing("augment", model.augment, None)
    if model.mix is not None:
        check_mixing("mix", model.mix, "features")
    _check_loss(model)


def _check_head(head: nn.Module, backbone: nn.Module, classes: int) -> None:
    """Raise an error if the head does not lie between the backbone and the classes; where it does not say, pass it."""
    outputs = getattr(head, "num_classes", classes)
    if outputs != classes:
        raise LabelError(f"the head gives {outputs} logits for {classes} classes; build it for as many")
    given = getattr(backbone, "num_features", None)
    taken = getattr(head, "in_features", given)
    if given not in (None, taken):
        raise ValueError(f"the head takes {taken} features, the backbone gives {given}; build it for as many")


def _check_bins(features: nn.Module, backbone: nn.Module) -> None:
    """Raise an error if the front ends do not give what the branches of a fusion take; where one does not say, pass."""
    if not isinstance(backbone, SpectrogramFusion):
        return
    given = features.bins if isinstance(features, StackedFeatures) else [getattr(features, "num_features", None)]
    if None not in given and given != backbone.bins:
        raise ValueError(
            f"the branches take {backbone.bins} bins, the front ends give {given}; build both for the same, "
            f"SpectrogramFusion with bins=features.bins"
        )


def check_mixing(argument: str, part: nn.Module, kind: Literal["features", "tokens"] | None) -> None:
    """Raise a ``TypeError`` if a transform of ours does not mix *kind*, or mixes where nothing is to be mixed."""
    if isinstance(part, Transform) and part.mixes != kind:
        rule = {
            "features": "must mix features, as Mixup or CutMix does",
            "tokens": "must mix tokens, as PatchMix does",
            None: "cannot mix samples; give it as mix",
        }[kind]
        raise TypeError(f"{argument} {rule}, got {type(part).__name__}")


def _check_loss(model: SoundClassifier) -> None:
    """Raise a ``TypeError`` if a loss of ours takes something else than the method gives it."""
    if not isinstance(model.loss, Loss):
        return
    arguments = inspect.signature(model.loss.forward).parameters.values()
    taken = tuple(argument.name for argument in arguments if argument.default is argument.empty)
    if taken != model.loss_inputs:
        raise TypeError(
            f"{type(model.loss).__name__} takes ({', '.join(taken)}) and cannot be the loss of this "
            f"{type(model).__name__}, which gives it ({', '.join(model.loss_inputs)}); use a loss such as "
            f"{type(model._default_loss()).__name__}"
        )
