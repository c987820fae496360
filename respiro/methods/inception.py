"""Several spectrograms, a branch for each, and a training objective of several terms (Ngo, Pham et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from respiro.component import Backbone, Component, Loss, Transform
from respiro.errors import LabelError
from respiro.losses import CenterLoss, MultiObjectiveLoss, TripletLoss
from respiro.methods import _optim
from respiro.methods._optim import Optimizer as OptimizerName
from respiro.methods._optim import Schedule
from respiro.methods._views import weighed
from respiro.methods.classifier import SoundClassifier
from respiro.models import InceptionResidual, LinearHead, SpectrogramFusion
from respiro.transforms import GammatoneSpectrogram, MorletScalogram, StackedFeatures

__all__ = ["InceptionFusion"]


class InceptionFusion(SoundClassifier):
    """Gammatone and wavelet spectrograms, an Inception-residual branch for each, joined while training.

    The loss sees the logits, the joined embedding, and the logits of an auxiliary head on each branch, which prediction
    does not use. With :class:`respiro.losses.MultiObjectiveLoss` these are a classification term, a centre term whose
    centres move by plain gradient descent at a rate of their own, a triplet term and the auxiliary terms; each is
    logged as ``train_<term>``. Of mixed batches the metric terms take only samples that were not mixed.

    Args:
        backbone: Default :class:`respiro.models.SpectrogramFusion` of two
            :class:`respiro.models.InceptionResidual`. Any backbone will do; only a fusion has auxiliary heads.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SoundClassifier`.
        features: Front ends in the order of the branches, in :class:`respiro.transforms.StackedFeatures`; default
            :class:`respiro.transforms.GammatoneSpectrogram` and :class:`respiro.transforms.MorletScalogram`, for
            another backbone than a fusion the first of them alone. They are for sound at 8 kHz.
        loss: Default :class:`respiro.losses.MultiObjectiveLoss` of all its terms; another loss gets ``(logits,
            embeddings, labels)``.

    The centres are out of reach of gradient clipping.

    Raises:
        ValueError: If the front ends have other bins than the branches take, or the centres another size than the
            joined embedding.
        LabelError: If there are not as many centres as classes.
        TypeError: If samples are mixed, and the loss does not know how to take that.

    Source:
        Ngo, Pham et al., "An inception-residual-based architecture with multi-objective loss for detecting respiratory
        anomalies", 2023, arXiv 2303.04104. A reconstruction: the paper names the parts, most numbers are ours.

    Example:
        >>> import torch
        >>> model = InceptionFusion(classes=["normal", "adventitious"], scoring="sprsound")
        >>> model(torch.randn(2, 32000)).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        waveform_augment: Transform | None = None,
        augment: Transform | None = None,
        mix: Transform | None = None,
        head: Component | None = None,
        loss: Loss | None = None,
        scoring: Literal["icbhi", "sprsound"] = "icbhi",
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Schedule = "cosine",
        warmup: float = 0.0,
        lr_floor: float = 0.01,
        compile: bool = False,
    ) -> None:
        super().__init__(
            SpectrogramFusion([InceptionResidual(), InceptionResidual()], [124, 124]) if backbone is None else backbone,
            classes=classes,
            features=features,
            waveform_augment=waveform_augment,
            augment=augment,
            mix=mix,
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
        objective = self.loss if isinstance(self.loss, MultiObjectiveLoss) else None
        if objective is None and mix is not None:
            raise TypeError(f"{type(self.loss).__name__} cannot take mixed samples; use MultiObjectiveLoss, or no mix")
        self._check_centers()
        sizes = self.backbone.sizes if isinstance(self.backbone, SpectrogramFusion) else []
        wanted = objective is not None and objective.weights.get("auxiliary", 0) > 0
        self.branch_heads = nn.ModuleList(LinearHead(size, len(self.classes)) for size in (sizes if wanted else []))

    def _default_features(self) -> Transform:
        front = GammatoneSpectrogram()
        return StackedFeatures([front, MorletScalogram()]) if isinstance(self.backbone, SpectrogramFusion) else front

    def _default_loss(self) -> Loss:
        size = self.backbone.num_features
        return MultiObjectiveLoss(center=CenterLoss(len(self.classes), size), triplet=TripletLoss())

    @property
    def center(self) -> CenterLoss | None:
        """The centre term of a loss of ours, if it has one."""
        return self.loss.center if isinstance(self.loss, MultiObjectiveLoss) else None

    def _check_centers(self) -> None:
        if self.center is None:
            return
        count, size = self.center.centers.shape
        if count != len(self.classes):
            raise LabelError(
                f"there are {count} centres for {len(self.classes)} classes; build CenterLoss for as many, in a config "
                f"or on the command line model.loss.init_args.center.init_args.num_classes"
            )
        if size != self.backbone.num_features:
            raise ValueError(
                f"the centres have {size} numbers, the embeddings {self.backbone.num_features}; "
                f"build CenterLoss({count}, {self.backbone.num_features})"
            )

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("logits", "embeddings", "labels")

    @property
    def smallest_batch(self) -> int:
        """Samples that a training step needs: the embeddings of a branch pass a batch norm."""
        return 2

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        x, labels = self.training_features(batch), batch["label"]
        mixed = None if self.mix is None else self.mix(x)
        embeddings, branches = self._embed(x if mixed is None else mixed.x)
        inputs: list[Any] = [self.head(embeddings), embeddings, labels]
        if isinstance(self.loss, MultiObjectiveLoss):
            inputs.append([head(branch) for head, branch in zip(self.branch_heads, branches, strict=False)])
            inputs.extend([] if mixed is None else [mixed.index, mixed.lam])
        loss, terms = weighed(self.loss, *inputs)
        return self.logged(loss, labels, **terms)

    def _embed(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the joined embeddings ``(B, D)`` and those of the branches."""
        if not isinstance(self.backbone, SpectrogramFusion):
            return self.backbone(features), []
        branches = self.backbone.embed_branches(features)
        return self.backbone.combine(branches), branches

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and its schedule; the centres move after each of its steps, at their own rate."""
        if self.center is None:
            return _optim.configure(self)
        configured = _optim.configure(self, apart=[self.center.centers])
        configured["optimizer"].register_step_post_hook(lambda *_: self._move_centers())
        return configured

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Take the gradient of the centres away, before it is clipped with those of the network."""
        if self.center is not None:
            self._pull, self.center.centers.grad = self.center.centers.grad, None

    def _move_centers(self) -> None:
        if self.center is not None and isinstance(self.loss, MultiObjectiveLoss):
            self.center.centers.grad = self._pull
            self.loss.step_centers()
