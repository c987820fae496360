"""Contrastive pre-training: SimCLR without labels, SCL with one label (Moummad and Farrugia, 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from respiro.component import Backbone, Component, Loss, Transform
from respiro.losses import NTXentLoss, SupConLoss
from respiro.methods._optim import Optimizer, Schedule
from respiro.methods._probe import Probe
from respiro.methods._views import TwoViews, ViewForward, labels_of, weighed
from respiro.methods.probe import FittedHead

__all__ = ["SCL", "SimCLR"]


class SimCLR(FittedHead, TwoViews):
    """Contrastive learning without labels: the two views of a sample against all others.

    Both stages in one training: the encoder and the projector learn from the contrast, and before each validation, and
    after the last epoch, a classifier is fitted to the embeddings of the clean train side, which the encoder does not
    feel. So ``val_score`` says what the embeddings are worth, and the checkpoint that it selects is a classifier. To
    spare time, let the trainer validate every few epochs only (``check_val_every_n_epoch``); a checkpoint saved in
    between, whose classifier is older than its encoder, says so when it is restored.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SoundClassifier`.
        waveform_augment: Augmentation of waveforms; with it, features are extracted for each view by itself.
        augment: Augmentation of features, drawn twice; default the masks of the paper: twice up to 20 bins, twice up
            to 40 frames.
        projector: Of the embeddings into the space of the contrast; default two layers without batch norm to 128.
        loss: Default :class:`respiro.losses.NTXentLoss`.
        view_forward: ``"separate"``: the encoder takes one view after the other, so that batch norm has the statistics
            of each, as in the released code. ``"concat"``: both at once, which is faster on a GPU.
        probe: How the classifier is fitted: ``"logistic"``, ``"adam"`` or ``"knn"``, see :class:`LinearProbe`.

    Raises:
        LabelError: If a class has no cycle on the train side.

    Source:
        Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020; Moummad and
        Farrugia, "Learning audio features with metadata and contrastive learning", 2022, arXiv 2210.16192, table 2.

    Example:
        >>> import torch
        >>> from respiro.models import CNN6
        >>> model = SimCLR(CNN6())
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
        projector: Component | None = None,
        loss: Loss | None = None,
        view_forward: ViewForward = "separate",
        probe: Probe = "logistic",
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
        self._set_probe(probe)

    def _default_loss(self) -> Loss:
        return NTXentLoss()

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("view1", "view2")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        view1, view2 = self.projector(self.encode(batch)).chunk(2)
        return self.logged(self.loss(view1, view2), batch["label"])


class SCL(FittedHead, TwoViews):
    """Supervised contrastive learning: all views of the samples of one label against all others.

    Both stages in one training, as in :class:`SimCLR`: the contrast trains the encoder, and a classifier is fitted to
    its embeddings before each validation.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SimCLR`.
        loss: Default :class:`respiro.losses.SupConLoss`.
        label_key: Key in the batch of the label that is contrasted: ``"label"``, the class, or a metadata label such as
            ``"sex_age"``, see the datamodule's ``metadata``.

    Raises:
        LabelError: If a class has no cycle on the train side, the batches have no such label, or one of the
            datamodule's ``metadata`` has fewer than two values there, so that there is nothing to contrast.

    Source:
        Khosla et al., "Supervised contrastive learning", NeurIPS 2020; Moummad and Farrugia, "Learning audio features
        with metadata and contrastive learning", 2022, arXiv 2210.16192.

    Example:
        >>> import torch
        >>> from respiro.models import CNN6
        >>> model = SCL(CNN6(), label_key="sex_age")
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
        projector: Component | None = None,
        loss: Loss | None = None,
        label_key: str = "label",
        view_forward: ViewForward = "separate",
        probe: Probe = "logistic",
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
        self._set_probe(probe)
        self.label_key = label_key
        self.save_hyperparameters({"label_key": label_key})

    def _default_loss(self) -> Loss:
        return SupConLoss()

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("embeddings", "labels")

    @property
    def contrasted(self) -> tuple[str, ...]:
        """Keys in the batch of the labels that are contrasted."""
        return (self.label_key,)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        embeddings = self.projector(self.encode(batch))
        loss, terms = weighed(self.loss, embeddings, labels_of(batch, self.label_key))
        return self.logged(loss, batch["label"], **terms)
