"""M-SCL: supervised contrastive learning with a head for the class and others for metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from respiro.component import Backbone, Component, Loss, Transform, describe
from respiro.losses import MultiSupConLoss
from respiro.methods._optim import Optimizer, Schedule
from respiro.methods._probe import Probe
from respiro.methods._views import TwoViews, ViewForward, labels_of, weighed
from respiro.methods.probe import FittedHead

__all__ = ["MSCL"]


class MSCL(FittedHead, TwoViews):
    """Supervised contrastive learning on several labels at once, each with a projector of its own.

    One encoder, a projector for each task, and the weighted sum of their contrasts: by default 0.75 on the class and
    0.25 on sex and age group. The tasks are those of the loss, so any number of them is a matter of its weights. Both
    stages in one training, as in :class:`SimCLR`.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SimCLR`.
        projectors: For each task; tasks that are not named get the default of :class:`SimCLR`.
        loss: Default :class:`respiro.losses.MultiSupConLoss`; its ``weights`` name the tasks.
        label_keys: Key in the batch of each task's label where that is not the task's name; by default ``"label"`` for
            ``"class"``. Other labels are the metadata of the datamodule.

    Raises:
        ValueError: If a projector or a label key is given for a task that the loss does not have.
        LabelError: If a class has no cycle on the train side, the batches have no such label, or one of the
            datamodule's ``metadata`` has fewer than two values there, so that there is nothing to contrast.

    Source:
        Moummad and Farrugia, "Learning audio features with metadata and contrastive learning", 2022, arXiv 2210.16192,
        equation 3; the weights as in the released code.

    Example:
        >>> import torch
        >>> from respiro.losses import MultiSupConLoss
        >>> from respiro.models import CNN6
        >>> model = MSCL(CNN6(), loss=MultiSupConLoss({"class": 0.5, "sex_age": 0.25, "device": 0.25}))
        >>> list(model.projectors)
        ['class', 'sex_age', 'device']
    """

    loss: MultiSupConLoss

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        waveform_augment: Transform | None = None,
        augment: Transform | None = None,
        projectors: dict[str, Component] | None = None,
        loss: Loss | None = None,
        label_keys: dict[str, str] | None = None,
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
        if not hasattr(self.loss, "weights"):
            raise TypeError(
                f"the loss must have weights by task, as MultiSupConLoss does, got {type(self.loss).__name__}"
            )
        tasks = list(self.loss.weights)
        given, keys = projectors or {}, {"class": "label"} | (label_keys or {})
        for argument, named in (("projectors", given), ("label_keys", label_keys or {})):
            if unknown := set(named) - set(tasks):
                raise ValueError(f"{argument} names {sorted(unknown)}, but the loss has the tasks {tasks}")
        self.projectors = nn.ModuleDict(
            {task: self._projector(given.get(task), f"the projector of {task!r}") for task in tasks}
        )
        #: Key of each task's label in the batch.
        self.label_keys = {task: keys.get(task, task) for task in tasks}
        self.save_hyperparameters(
            {
                "projectors": {task: describe(projector) for task, projector in self.projectors.items()},
                "label_keys": self.label_keys,
            }
        )
        self._set_view_forward(view_forward)
        self._set_probe(probe)

    def _default_loss(self) -> Loss:
        return MultiSupConLoss()

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("embeddings_by_task", "labels_by_task")

    @property
    def contrasted(self) -> tuple[str, ...]:
        """Keys in the batch of the labels that are contrasted."""
        return tuple(self.label_keys.values())

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        embeddings = self.encode(batch)
        projections = {task: projector(embeddings) for task, projector in self.projectors.items()}
        labels = {task: labels_of(batch, key) for task, key in self.label_keys.items()}
        loss, terms = weighed(self.loss, projections, labels)
        return self.logged(loss, batch["label"], **terms)
