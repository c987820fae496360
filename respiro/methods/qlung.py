"""Quality-adaptive angular margins (QLung), and any other margin on the angle in their place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from respiro.component import Backbone, Component, Loss, Transform, build, describe
from respiro.losses import CrossEntropy, DualFactorAngularMarginLoss
from respiro.methods._optim import Optimizer, Schedule
from respiro.methods._parts import check_data
from respiro.methods.classifier import SoundClassifier
from respiro.models import CosineHead, LinearHead
from respiro.transforms import AudioQuality

__all__ = ["QLung"]

#: What a margin loss can be given.
_INPUTS = ("cosines", "labels", "quality", "norms")


class QLung(SoundClassifier):
    """Cross-entropy of an angular classifier, and a loss whose margins follow the quality of the sound and its class.

    ``ce_weight * CE(logits) + margin_weight * margin(cosines)``, where a sample of good quality and a rare class has to
    come nearer to the direction of its class. A margin loss by itself, such as ArcFace, is
    ``QLung(backbone, margin=ArcFaceLoss(), ce_weight=0, margin_weight=1)``. Prediction takes the logits of the head and
    needs neither margin nor quality.

    Before training the datamodule computes the quality of every cycle, once, on its raw sound, and gives the class
    counts of its train side. Without a datamodule the batches must have ``quality``, and the margin its counts.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SoundClassifier`.
        head: Default :class:`respiro.models.CosineHead` with scale 37. Any head will do; with *share_weights* one that
            has ``logits_and_cosines``, such as :class:`respiro.models.LinearHead`.
        loss: On ``(logits, labels)``; default :class:`respiro.losses.CrossEntropy` without class weights.
        margin: On ``cosines``, ``labels`` and, if it asks for them, ``quality`` and ``norms`` (of the embeddings);
            default :class:`respiro.losses.DualFactorAngularMarginLoss`.
        quality: Default :class:`respiro.transforms.AudioQuality` at the sampling rate of the features. Not used where
            the margin does not ask for quality.
        ce_weight: Of *loss*; not negative, and positive where the margin alone would leave a part of *head* untrained:
            with :class:`respiro.models.LinearHead`, or without *share_weights*.
        margin_weight: Of *margin*; not negative, and positive without *share_weights*.
        share_weights: Whether the margin is on the angles to the weights of *head*; else a
            :class:`respiro.models.CosineHead` of its own is trained beside it.
        recompute: Compute the quality of the clips of each batch, as they are augmented, cut and faded, instead of
            taking that of the raw cycles; default if there is a *waveform_augment*, which changes it.

    Raises:
        ValueError: If a weight is negative, both are 0, or one is that must not be.
        TypeError: If the margin asks for something else, or the head has no cosines to share.

    Source:
        Kim et al., "Quality adaptive angular margin learning for respiratory sound classification", Interspeech 2026,
        arXiv 2606.11915, equations 1 to 7. No code was released.

    Example:
        >>> from respiro.models import CNN6
        >>> model = QLung(CNN6())
        >>> model(torch.randn(2, 16000)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        waveform_augment: Transform | None = None,
        augment: Transform | None = None,
        head: Component | None = None,
        loss: Loss | None = None,
        margin: Loss | None = None,
        quality: Transform | None = None,
        ce_weight: float = 1.0,
        margin_weight: float = 0.4,
        share_weights: bool = True,
        recompute: bool | None = None,
        scoring: Literal["icbhi", "sprsound"] = "icbhi",
        optimizer: Optimizer = "adam",
        lr: float = 5e-5,
        weight_decay: float = 1e-6,
        schedule: Schedule = "cosine",
        warmup: float = 0.0,
        lr_floor: float = 1e-3,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone,
            classes=classes,
            features=features,
            waveform_augment=waveform_augment,
            augment=augment,
            head=head,
            loss=loss,
            scoring=scoring,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup=warmup,
            lr_floor=lr_floor,
            compile=compile,
        )
        if not (ce_weight >= 0 and margin_weight >= 0 and 0 < ce_weight + margin_weight < float("inf")):
            raise ValueError(
                f"ce_weight and margin_weight must not be negative, nor both 0, got {ce_weight!r} and {margin_weight!r}"
            )
        self.ce_weight, self.margin_weight = float(ce_weight), float(margin_weight)
        self.margin = build(DualFactorAngularMarginLoss() if margin is None else margin, Loss, "margin")
        inputs = _inputs(self.margin)
        self.margin_inputs = inputs if margin_weight else ()
        self.quality = build(self._default_quality() if quality is None else quality, Transform, "quality")
        if not share_weights and not (ce_weight and margin_weight):
            raise ValueError(
                f"with share_weights=False both losses are needed, as each trains a head of its own; got ce_weight "
                f"{ce_weight!r} and margin_weight {margin_weight!r}"
            )
        if isinstance(self.head, LinearHead) and not ce_weight:
            raise ValueError(
                "with ce_weight=0 nothing trains the bias of LinearHead, nor the lengths of its weights; use CosineHead"
            )
        self.margin_head = None if share_weights else CosineHead(self.backbone.num_features, len(self.classes))
        if share_weights and not hasattr(self.head, "logits_and_cosines"):
            raise TypeError(
                f"{type(self.head).__name__} has no logits_and_cosines(embeddings) for the margin; use CosineHead or "
                f"LinearHead, or share_weights=False"
            )
        changed = not isinstance(self.waveform_augment, nn.Identity)
        self.recompute = "quality" in self.margin_inputs and (changed if recompute is None else bool(recompute))
        self.save_hyperparameters(
            {
                "margin": describe(self.margin),
                "quality": describe(self.quality),
                "ce_weight": self.ce_weight,
                "margin_weight": self.margin_weight,
                "share_weights": bool(share_weights),
                "recompute": self.recompute,
            }
        )

    def _default_head(self) -> Component:
        return CosineHead(self.backbone.num_features, len(self.classes))

    def _default_loss(self) -> Loss:
        return CrossEntropy()

    def _default_quality(self) -> Transform:
        return AudioQuality(getattr(self.features, "sample_rate", 16000))

    def setup(self, stage: str) -> None:
        """Let the datamodule compute the quality of every cycle, and give its class counts to the margin."""
        data: Any = getattr(self.trainer, "datamodule", None)
        check_data(self, data)  # before the quality of thousands of cycles is computed
        if stage == "fit" and "quality" in self.margin_inputs and hasattr(data, "add_quality"):
            data.add_quality(self.quality)  # first, as the record of the training tells of it
        super().setup(stage)
        if stage == "fit" and isinstance(self.margin, Loss) and hasattr(data, "class_counts"):
            self.margin.use_class_counts(data.class_counts)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        if self.recompute:
            waveform = self.waveform_augment(batch["waveform"])
            batch = {**batch, "waveform": waveform, "quality": self.quality(waveform, batch.get("length"))}
            features = self.augment(self.features(waveform))
        else:
            features = self.training_features(batch)
        embeddings, labels = self.backbone(features), batch["label"]
        total, terms = torch.zeros((), device=embeddings.device), {}
        logits, cosines = self._logits_and_cosines(embeddings)
        if self.ce_weight:
            terms["train_ce"] = self.loss(logits, labels)
            total = total + self.ce_weight * terms["train_ce"]
        if self.margin_weight:
            terms["train_margin"] = self.margin(cosines=cosines, labels=labels, **self._asked(embeddings, batch))
            total = total + self.margin_weight * terms["train_margin"]
        return self.logged(total, labels, **terms)

    def _logits_and_cosines(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        head: Any = self.head
        if self.margin_head is not None:
            return head(embeddings), self.margin_head.cosines(embeddings)
        both: tuple[Tensor, Tensor] = head.logits_and_cosines(embeddings)
        return both

    def _asked(self, embeddings: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the margin asks for beside the cosines and the labels."""
        asked = {}
        if "norms" in self.margin_inputs:
            asked["norms"] = torch.linalg.vector_norm(embeddings.float(), dim=1)
        if "quality" in self.margin_inputs:
            if "quality" not in batch:
                raise ValueError(
                    "the batches have no 'quality', which the margin asks for; use a datamodule of respiro, or put it "
                    "into the batches, or set recompute=True"
                )
            asked["quality"] = batch["quality"]
        return asked


def _inputs(margin: nn.Module) -> tuple[str, ...]:
    """Return what a margin loss asks for."""
    arguments = inspect.signature(margin.forward).parameters.values()
    taken = tuple(argument.name for argument in arguments if argument.default is argument.empty)
    if not {"cosines", "labels"} <= set(taken) <= set(_INPUTS):
        raise TypeError(
            f"{type(margin).__name__} takes ({', '.join(taken)}) and cannot be the margin, which is given cosines, "
            f"labels and, if it asks for them, quality and norms; a loss on logits goes to loss, or to SoundClassifier"
        )
    return taken
