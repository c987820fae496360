"""A linear probe: what is in the embeddings of an encoder that is held still."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from respiro.component import Backbone, Component, Transform, build, describe
from respiro.errors import check_choice
from respiro.methods._checkpoint import RECORD
from respiro.methods._probe import Probe, check_counts, embedded, fit_head, scorer
from respiro.methods.classifier import SoundClassifier

__all__ = ["FittedHead", "LinearProbe"]


class FittedHead(SoundClassifier):
    """A classifier whose head is fitted to the embeddings of the train side, before each validation and at the end."""

    probe: Probe
    strength: float = 0.01
    neighbors: int = 20
    #: Whether the encoder has changed since the head was fitted.
    _stale = True

    def _set_probe(self, probe: Probe) -> None:
        check_choice("probe", probe, get_args(Probe))
        self.probe = probe
        self.head.requires_grad_(False)
        self.save_hyperparameters({"probe": probe})

    def classify(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of features ``(B, T, F)``."""
        embeddings = self.backbone(features)
        # The scale of the embeddings is in the head's weights, where half precision would be too coarse.
        with torch.autocast(embeddings.device.type, enabled=False):
            logits: Tensor = self.head.float()(embeddings.float())
        return logits

    def setup(self, stage: str) -> None:
        """Check also that each class has a cycle to fit to."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "class_counts"):
            check_counts(data.class_counts, self.classes)

    def on_fit_start(self) -> None:
        """Take no head of an earlier training for one of this."""
        super().on_fit_start()
        averaging = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if averaging and self.probe == "knn":
            raise ValueError("neighbours cannot be averaged; with a callback that averages weights, use another probe")
        self._stale = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note that the encoder has changed."""
        self._stale = True
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Fit the head to the encoder as it is now; callbacks may have put averaged weights there before."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.fit_head()

    def on_train_epoch_end(self) -> None:
        """Fit the head after the last epoch, also where no validation came before."""
        super().on_train_epoch_end()
        trainer = self.trainer
        if trainer.should_stop or self.current_epoch + 1 == trainer.max_epochs or self.global_step == trainer.max_steps:
            self.fit_head()

    def on_train_end(self) -> None:
        """Fit the head where a callback has ended the training."""
        self.fit_head()

    def fit_head(self) -> None:
        """Pass the whole train side through the encoder, and fit the head to it, if it is not yet."""
        if not self._stale:
            return
        trainer: Any = self.trainer
        score = None
        if self.probe == "adam" and isinstance(trainer.val_dataloaders, DataLoader):
            score = scorer(embedded(self, trainer.val_dataloaders), self.classes, self.scoring)
        train = embedded(self, trainer.train_dataloader)
        self._set_head(fit_head(self.probe, train, self.classes, score, self.strength, self.neighbors))
        self._stale = False

    def _set_head(self, head: Component) -> None:
        self.head = head.requires_grad_(False).to(self.device)
        self.hparams["head"] = describe(self.head)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write also whether the head belongs to the encoder."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[RECORD]["head_fitted"] = not self._stale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the head as it was fitted: one of neighbours has as many as there were train cycles."""
        super().on_load_checkpoint(checkpoint)
        self._set_head(build(checkpoint["hyper_parameters"]["head"], Component, "head"))
        if self._trainer is None and not checkpoint.get(RECORD, {}).get("head_fitted", True):
            warnings.warn(
                "the encoder of this checkpoint was trained on after its classifier was fitted, or it has none yet; "
                "fit one: load_weights(LinearProbe(...).backbone, path), then trainer.fit",
                UserWarning,
                stacklevel=2,
            )


class LinearProbe(FittedHead):
    """A classifier on the embeddings of an encoder that is held still: the second stage of contrastive learning.

    Training takes one epoch, in which the whole train side, whatever the trainer's limits, passes through the encoder
    once, clean, and the head is fitted to its embeddings at once. The encoder itself is not changed. With several
    processes each embeds its share. The head computes in float32 in any precision.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``; one that was trained, such as ``backbone``
            of another method, or filled by :func:`respiro.models.load_weights` from a checkpoint.
        classes: Class names in the order of their labels.
        features: Front end the encoder was trained with; default as in :class:`SoundClassifier`.
        probe: ``"logistic"``: multinomial logistic regression with L2 regularisation on standardised embeddings.
            ``"adam"``: the released probe of Moummad and Farrugia (2022), 100 epochs of Adam at a learning rate of 0.1
            in batches of 128, of which the one that scores best on the validation side is taken. ``"knn"``: a vote of
            the nearest by cosine similarity. All weigh the classes alike.
        strength: Inverse of the regularisation of ``"logistic"`` (``C`` of scikit-learn); positive. Of embeddings of
            ICBHI, 1 takes many times as long as 0.01 and scored about the same on the validation side.
        neighbors: Voters of ``"knn"``.
        scoring: ``"icbhi"`` or ``"sprsound"``.

    Raises:
        ValueError: If an argument has no meaning; when fitted, if an embedding is not finite.
        LabelError: If a class has no cycle on the train side.

    Source:
        Moummad and Farrugia, "Learning audio features with metadata and contrastive learning", 2022, arXiv 2210.16192.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from respiro.datamodules import ICBHIDataModule
        >>> from respiro.datasets import write_synthetic_icbhi
        >>> from respiro.models import CNN6
        >>> root = write_synthetic_icbhi(tempfile.mkdtemp() + "/icbhi", num_patients=8)
        >>> probe = LinearProbe(CNN6())
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer.fit(probe, datamodule=ICBHIDataModule(root, duration=1.0))
        >>> probe.embed(torch.zeros(2, 16000)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        probe: Probe = "logistic",
        strength: float = 0.01,
        neighbors: int = 20,
        scoring: Literal["icbhi", "sprsound"] = "icbhi",
    ) -> None:
        super().__init__(backbone, classes=classes, features=features, scoring=scoring)
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength must be positive and finite, got {strength!r}")
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, got {neighbors!r}")
        self._set_probe(probe)
        self.strength = float(strength)
        self.neighbors = int(neighbors)
        self.save_hyperparameters({"strength": self.strength, "neighbors": self.neighbors})
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        """Say where there is nothing yet to probe."""
        if stage == "fit" and not self.history and getattr(self.backbone, "pretrained", None) is None:
            warnings.warn(
                "the encoder was neither trained nor filled with weights, so this probes random ones; "
                "give it the backbone of a trained method, or fill it with load_weights (respiro fit --weights)",
                UserWarning,
                stacklevel=2,
            )
        super().setup(stage)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        """Change nothing; but a step is counted, by which checkpoints tell that there is something to keep."""
        if batch_idx == 0:
            self.optimizers().step()  # type: ignore[union-attr]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """There is no loss to look at."""

    def on_train_epoch_end(self) -> None:
        """One epoch is all."""
        self.trainer.should_stop = True
        super().on_train_epoch_end()

    def configure_optimizers(self) -> SGD:
        """Return one that has nothing to do: no parameter gets a gradient."""
        return SGD(self.backbone.parameters(), lr=self.lr)
