"""Cross-entropy fine-tuning: the base that the other methods build on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from respiro.component import Backbone, Component, Loss, TokenBackbone, Transform, build, describe, eval_mode
from respiro.losses import CrossEntropy, MixedCrossEntropy, cross_entropy
from respiro.methods import _optim, _steps
from respiro.methods._checkpoint import SelfDescribing
from respiro.methods._optim import Optimizer, Schedule
from respiro.methods._parts import cache_features, check_classes, check_data, check_encoder, check_parts
from respiro.methods._predict import AUDIO, embed_dataset, predict_dataset, predict_file, table
from respiro.metrics._counts import metrics_for
from respiro.models import LinearHead
from respiro.transforms import KaldiFbank, LogMelSpectrogram

__all__ = ["SoundClassifier"]


class SoundClassifier(SelfDescribing):
    """Features, augmentation, backbone, head and loss, trained with cross-entropy by default.

    The checkpoint carries all of it as plain data, the preprocessing and the protocol included: restoring needs
    ``load_from_checkpoint(path, weights_only=True)`` and nothing else, and :meth:`predict` needs nothing but sound.

    Args:
        backbone: Encoder of features ``(B, T, F)`` to embeddings ``(B, D)``.
        classes: Class names in the order of their labels; give ``datamodule.classes`` for anything but ICBHI's four.
        features: Front end on waveforms ``(B, S)``; default :class:`respiro.transforms.KaldiFbank` for
            :class:`respiro.models.AST`, :class:`respiro.transforms.LogMelSpectrogram` for all others.
        waveform_augment: Augmentation of waveforms, while training only; default none.
        augment: Augmentation of features, while training only; default none.
        mix: Mixing of augmented features, while training only: :class:`respiro.transforms.Mixup` or
            :class:`respiro.transforms.CutMix`; default none.
        head: Embeddings to logits ``(B, C)``; default :class:`respiro.models.LinearHead`, for AST with layer norm.
        loss: Default :class:`respiro.losses.CrossEntropy` with weights balanced by the train counts; with *mix*,
            :class:`respiro.losses.MixedCrossEntropy` with the same weights.
        scoring: ``"icbhi"`` or ``"sprsound"``: which score is logged as ``val_score`` and ``test_score``.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (momentum 0.9, Nesterov).
        lr: Peak learning rate.
        weight_decay: As the optimiser defines it.
        schedule: ``"cosine"`` over the whole training or ``"constant"``, both set every step; ``"epoch-cosine"`` is set
            once an epoch, to where the cosine stands at its end (the released code of Bae et al., 2023);
            ``"cosine-40"`` once an epoch, falling to *lr_floor* over 40 epochs, rising again over the next 40, and so
            on (that of Moummad and Farrugia, 2022).
        warmup: Share of the training over which the learning rate rises linearly to *lr*; in [0, 1).
        lr_floor: Where the cosine ends, as a share of *lr*.
        compile: Compile the backbone with ``torch.compile`` before training: slow first steps, faster later ones.

    All that a training step draws at random depends on the seed, the process, the epoch and the number of the batch
    alone: processes draw differently, and a resumed training draws what an uninterrupted one does.

    Raises:
        ValueError: If an argument has no meaning.
        LabelError: If two classes have one name, or the head another number of classes.
        CheckpointError: If an argument of a part is no plain data; when restoring, if a part was not written by
            respiro and was not passed.
        DivergenceError: While training, if the loss is not finite; looked at every ``log_every_n_steps`` steps and at
            the end of each epoch.

    Example:
        >>> from respiro.models import CNN6
        >>> model = SoundClassifier(CNN6())
        >>> model(torch.zeros(2, 16000)).shape
        torch.Size([2, 4])
    """

    #: Whether the batches hold what our front end makes of them.
    _cached = False

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        waveform_augment: Transform | None = None,
        augment: Transform | None = None,
        mix: Transform | None = None,
        head: Component | None = None,
        loss: Loss | None = None,
        scoring: Literal["icbhi", "sprsound"] = "icbhi",
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Schedule = "cosine",
        warmup: float = 0.0,
        lr_floor: float = 0.01,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _optim.check(optimizer, lr, weight_decay, schedule, warmup, lr_floor)
        self.classes = check_classes(classes)
        self.backbone = build(backbone, Backbone, "backbone")
        self.features = build(self._default_features() if features is None else features, Transform, "features")
        self.waveform_augment = _optional(waveform_augment, "waveform_augment")
        self.augment = _optional(self._default_augment() if augment is None else augment, "augment")
        self.mix = None if mix is None else build(mix, Transform, "mix")
        self.head = build(self._default_head() if head is None else head, Component, "head")
        self.loss = build(self._default_loss() if loss is None else loss, Loss, "loss")
        check_parts(self)
        self.scoring = scoring
        self.optimizer = optimizer
        self.lr = float(lr)  # numpy's would end up in the optimiser's state and keep the checkpoint from loading
        self.weight_decay = float(weight_decay)
        self.schedule = schedule
        self.warmup = float(warmup)
        self.lr_floor = float(lr_floor)
        metrics = metrics_for(scoring, self.classes)
        self.val_metrics: MetricCollection = metrics.clone(prefix="val_")
        self.test_metrics: MetricCollection = metrics.clone(prefix="test_")
        # A metric, because Lightning's own mean over processes is off where they hold different numbers of cycles.
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.save_hyperparameters(
            {
                "backbone": describe(self.backbone),
                "classes": list(self.classes),
                "features": describe(self.features),
                "waveform_augment": None if waveform_augment is None else describe(self.waveform_augment),
                "augment": None if isinstance(self.augment, nn.Identity) else describe(self.augment),
                **({} if self.mix is None else {"mix": describe(self.mix)}),  # subclasses that mix have none
                "head": describe(self.head),
                "loss": describe(self.loss),
                "scoring": scoring,
                "optimizer": optimizer,
                "lr": self.lr,
                "weight_decay": self.weight_decay,
                "schedule": schedule,
                "warmup": self.warmup,
                "lr_floor": self.lr_floor,
                "compile": bool(compile),
            }
        )

    def _default_head(self) -> Component:
        if not hasattr(self.backbone, "num_features"):
            name = type(self.backbone).__name__
            raise TypeError(f"{name} has no num_features to build a head for; give it that attribute, or pass head=...")
        return LinearHead(
            self.backbone.num_features, len(self.classes), layer_norm=isinstance(self.backbone, TokenBackbone)
        )

    def _default_features(self) -> Transform:
        if isinstance(self.backbone, TokenBackbone):
            return KaldiFbank(num_mel_bins=getattr(self.backbone, "num_mel_bins", 128))
        return LogMelSpectrogram()

    def _default_augment(self) -> Transform | None:
        return None

    def _default_loss(self) -> Loss:
        return CrossEntropy("balanced") if self.mix is None else MixedCrossEntropy("balanced")

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("logits", "labels") if self.mix is None else ("logits", "labels", "index", "lam")

    @property
    def smallest_batch(self) -> int:
        """Samples that a training step needs."""
        return 1 if self.mix is None else 2

    @property
    def protocol(self) -> dict[str, Any]:
        """Protocol record of the latest training; empty before training."""
        return self.history[-1] if self.history else {}

    def forward(self, waveform: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of waveforms ``(B, S)``."""
        return self.classify(self.features(waveform))

    def classify(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of features ``(B, T, F)``."""
        logits: Tensor = self.head(self.backbone(features))
        return logits

    def setup(self, stage: str) -> None:
        """Check that the data fit, and learn the protocol and the class counts from the datamodule."""
        data = getattr(self.trainer, "datamodule", None)
        check_data(self, data)
        self._cached = cache_features(self, data, stage)
        if stage != "fit":
            return
        check_encoder(self)
        if data is not None:
            seed = os.environ.get("PL_GLOBAL_SEED")
            record = {
                **getattr(data, "protocol", {}),
                "training_seed": None if seed is None else int(seed),
                "pretrained": getattr(self.backbone, "pretrained", None),
            }
            if record not in self.history[-1:]:
                self.history = [*self.history, record]
            if isinstance(self.loss, Loss) and hasattr(data, "class_counts"):
                self.loss.use_class_counts(data.class_counts)

    def on_fit_start(self) -> None:
        """Compile the backbone if asked to."""
        if self.hparams["compile"]:
            self.backbone.compile()

    def on_train_start(self) -> None:
        """Keep the seed, and check that no batch is too small for the method."""
        self._seed = _steps.base_seed()
        _steps.check_batches(self.trainer, self.smallest_batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what this batch draws its own, and different on every process."""
        _steps.seed(self._seed, self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        x, labels = self.training_features(batch), batch["label"]
        if self.mix is None:
            return self.logged(self.loss(self.head(self.backbone(x)), labels), labels)
        mixed = self.mix(x)
        return self.logged(self.loss(self.head(self.backbone(mixed.x)), labels, mixed.index, mixed.lam), labels)

    def training_features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the augmented features ``(B, T, F)`` of a batch."""
        features: Tensor = self.augment(self.extract(batch))
        return features

    def extract(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the features ``(B, T, F)`` of a batch; the datamodule's cache may hold them already."""
        waveform = batch["waveform"]
        if self._cached and "features" in batch:
            return batch["features"].to(waveform.dtype)
        features: Tensor = self.features(self.waveform_augment(waveform) if self.training else waveform)
        return features

    def logged(self, loss: Tensor, labels: Tensor, **terms: Tensor) -> Tensor:
        """Log the mean over the epoch of ``train_loss`` and its *terms*, and return the loss."""
        how: Any = {"batch_size": len(labels), "on_step": False, "on_epoch": True, "sync_dist": True}
        self.log_dict(terms, **how)
        self.log("train_loss", loss, prog_bar=True, **how)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop at a loss that is not finite; not looked at in every step, as the look makes a GPU wait."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from elsewhere
        if batch_idx % max(1, every) == 0:
            _steps.check_loss(outputs["loss"], f"epoch {self.current_epoch}, batch {batch_idx}")

    def on_train_epoch_end(self) -> None:
        """Look at the mean loss too, which no batch that went wrong leaves finite."""
        if "train_loss" in self.trainer.callback_metrics:
            _steps.check_loss(self.trainer.callback_metrics["train_loss"], f"epoch {self.current_epoch}")

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` (cross-entropy without class weights), ``val_score`` and its rates."""
        self._evaluation_step(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` (cross-entropy without class weights), ``test_score`` and its rates."""
        self._evaluation_step(batch, "test", self.test_metrics, self.test_loss)

    def _evaluation_step(
        self, batch: Mapping[str, Tensor], stage: str, metrics: MetricCollection, mean_loss: MeanMetric
    ) -> None:
        logits = self.classify(self.extract(batch))
        # Without class weights, whose mean over batches depends on how the cycles fall into batches.
        mean_loss.update(cross_entropy(logits, batch["label"]), weight=len(logits))
        metrics.update(logits, batch["label"])
        self.log(f"{stage}_loss", mean_loss, batch_size=len(logits), on_step=False, on_epoch=True)
        self.log_dict(metrics, batch_size=len(logits), on_step=False, on_epoch=True, prog_bar=stage == "val")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities ``(B, C)``."""
        return self._probabilities(batch["waveform"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and its schedule over the whole training."""
        return _optim.configure(self)

    @torch.inference_mode()
    def predict(self, x: Any, cycles: Sequence[tuple[float, float]] | None = None) -> pd.DataFrame:
        """Classify a batch, a data set, or a sound file.

        Args:
            x: Waveforms ``(B, S)`` or ``(S,)`` at the model's sampling rate, a batch with the key ``waveform``, a
                :class:`respiro.datasets.RespiratoryDataset`, or the path of a sound file of any length.
            cycles: Start and end of each cycle in the file, seconds; without it the file is cut into windows of the
                training duration; the last one ends with the file and may overlap the one before.

        Returns:
            One row a cycle: ``prediction`` (class name), ``p_<class>`` for each class; for a data set also its
            metadata, for a file ``start`` and ``end`` in seconds.

        Raises:
            AudioError: If the file cannot be read.
            ValueError: If a cycle does not lie within the file, or *x* is none of the above.
        """
        with eval_mode(self):
            if isinstance(x, str | Path):
                return predict_file(self, x, cycles)
            if isinstance(x, Mapping):
                return table(self._probabilities(x["waveform"]), self.classes)
            if isinstance(x, Tensor):
                return table(self._probabilities(x if x.ndim == 2 else x[None]), self.classes)
            if hasattr(x, "cycles") and hasattr(x, "__getitem__"):
                return predict_dataset(self, x)
        raise ValueError(
            f"predict takes waveforms, a batch, a data set or the path of a sound file, got {type(x).__name__}"
        )

    @torch.inference_mode()
    def embed(self, x: Any) -> Tensor:
        """Return the embeddings ``(N, D)`` of waveforms, a batch or a data set, float32 on the CPU.

        Args:
            x: As in :meth:`predict`, but no file.
        """
        with eval_mode(self):
            if isinstance(x, Mapping):
                return self._embeddings({"waveform": x["waveform"]})
            if isinstance(x, Tensor):
                return self._embeddings({"waveform": x if x.ndim == 2 else x[None]})
            if hasattr(x, "cycles") and hasattr(x, "__getitem__"):
                return embed_dataset(self, x)
        raise ValueError(f"embed takes waveforms, a batch or a data set, got {type(x).__name__}")

    def _embeddings(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: batch[name].to(self.device) for name in ("waveform", "features") if name in batch}
        embeddings: Tensor = self.backbone(self.extract(inputs))
        return embeddings.float().cpu()

    def _probabilities(self, waveform: Tensor) -> Tensor:
        probabilities: Tensor = self(waveform.to(self.device)).float().softmax(dim=1)
        return probabilities

    @property
    def audio(self) -> dict[str, Any]:
        """How the training cycles were read: sampling rate, duration, padding, fades."""
        default = AUDIO | {"sample_rate": getattr(self.features, "sample_rate", AUDIO["sample_rate"])}
        return default | dict(self.protocol.get("audio", {}))


def _optional(part: Transform | None, argument: str) -> nn.Module:
    return nn.Identity() if part is None else build(part, Transform, argument)
