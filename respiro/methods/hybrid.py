"""Hybrid: cross-entropy and a supervised contrast at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from respiro.component import Backbone, Component, Loss, Transform
from respiro.losses import HybridSupConLoss
from respiro.methods._optim import Optimizer, Schedule
from respiro.methods._views import TwoViews, ViewForward, labels_of, weighed

__all__ = ["HybridSCL"]


class HybridSCL(TwoViews):
    """Cross-entropy and supervised contrast of two views, in one stage.

    The head and the projector stand side by side on the encoder, and all three are trained by the weighted sum of the
    two losses. What the projector learnt is not used afterwards.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SoundClassifier`.
        waveform_augment: Augmentation of waveforms; with it, features are extracted for each view by itself.
        augment: Augmentation of features, drawn twice; default as in :class:`SimCLR`.
        projector: Default as in :class:`SimCLR`.
        loss: Default :class:`respiro.losses.HybridSupConLoss` with weights balanced by the train counts.
        view_forward: ``"separate"`` or ``"concat"``, as in :class:`SimCLR`.

    Source:
        Moummad and Farrugia, "Learning audio features with metadata and contrastive learning", 2022, arXiv 2210.16192,
        equation 4.

    Example:
        >>> import torch
        >>> from respiro.models import CNN6
        >>> model = HybridSCL(CNN6())
        >>> model(torch.zeros(2, 16000)).shape
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
        projector: Component | None = None,
        loss: Loss | None = None,
        view_forward: ViewForward = "separate",
        scoring: Literal["icbhi", "sprsound"] = "icbhi",
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Schedule = "cosine",
        warmup: float = 0.0,
        lr_floor: float = 0.01,
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
        self._set_projector(projector)
        self._set_view_forward(view_forward)

    def _default_loss(self) -> Loss:
        return HybridSupConLoss(weight="balanced")

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("logits", "embeddings", "labels")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        embeddings = self.encode(batch)
        logits, projections = self.head(embeddings), self.projector(embeddings)
        loss, terms = weighed(self.loss, logits, projections, labels_of(batch, "label"))
        return self.logged(loss, batch["label"], **terms)
