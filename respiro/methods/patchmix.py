"""Patch-Mix and Patch-Mix contrastive learning (Bae et al., Interspeech 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from respiro.component import Component, Loss, TokenBackbone, Transform, build, describe
from respiro.errors import check_choice
from respiro.losses import CrossEntropy, MixedCrossEntropy, PatchMixContrastiveLoss
from respiro.methods._optim import Optimizer, Schedule
from respiro.methods._parts import check_mixing
from respiro.methods.classifier import SoundClassifier
from respiro.models import Projector
from respiro.transforms import PatchMix

__all__ = ["PatchMixCE", "PatchMixCL"]

Target = Literal["grad_block", "grad_flow", "project_block", "project_flow"]


class _PatchMixMethod(SoundClassifier):
    """The mixing of tokens, and the check that there are any."""

    backbone: TokenBackbone
    patch_mix: Transform

    @property
    def smallest_batch(self) -> int:
        """Samples that a training step needs: a sample is mixed with another."""
        return 2

    def _set_patch_mix(self, patch_mix: Transform | None) -> None:
        if not hasattr(self.backbone, "forward_tokens"):
            raise TypeError(
                f"{type(self).__name__} mixes tokens, which {type(self.backbone).__name__} has none of; give it a "
                f"backbone with embed_patches, grid and forward_tokens, such as respiro.models.AST"
            )
        self.patch_mix = build(PatchMix() if patch_mix is None else patch_mix, Transform, "patch_mix")
        check_mixing("patch_mix", self.patch_mix, "tokens")
        self.save_hyperparameters({"patch_mix": describe(self.patch_mix)})


class PatchMixCE(_PatchMixMethod):
    """Cross-entropy on patch-mixed tokens, against the labels of both sources.

    Only the mixed batch goes through the transformer: ``λ CE(p, y) + (1 - λ) CE(p, y')``.

    Args:
        backbone: Encoder with tokens, such as :class:`respiro.models.AST`.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SoundClassifier`.
        loss: Default :class:`respiro.losses.MixedCrossEntropy` without class weights.
        patch_mix: Default :class:`respiro.transforms.PatchMix`.

    Raises:
        TypeError: If the backbone has no tokens.

    Source:
        Bae et al., "Patch-Mix contrastive learning with Audio Spectrogram Transformer on respiratory sound
        classification", Interspeech 2023, section 2.2.

    Example:
        >>> from respiro.models import AST
        >>> model = PatchMixCE(AST("tiny224", frames=98))
        >>> model(torch.zeros(2, 16000)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        backbone: TokenBackbone,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        waveform_augment: Transform | None = None,
        augment: Transform | None = None,
        head: Component | None = None,
        loss: Loss | None = None,
        patch_mix: Transform | None = None,
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
        self._set_patch_mix(patch_mix)

    def _default_loss(self) -> Loss:
        return MixedCrossEntropy()

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """What the loss is called with."""
        return ("logits", "labels", "index", "lam")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        tokens = self.backbone.embed_patches(self.training_features(batch))
        mixed = self.patch_mix(tokens, self.backbone.grid)
        logits = self.head(self.backbone.forward_tokens(mixed.x))
        return self.logged(self.loss(logits, batch["label"], mixed.index, mixed.lam), batch["label"])


class PatchMixCL(_PatchMixMethod):
    """Patch-Mix contrastive learning: cross-entropy on the clean batch, a contrast of the mixed one with it.

    The embedding of a mixed sample is to lie near those of its two sources, in the measure of their shares, and far
    from all others: ``CE(clean) + α CL(mixed, clean)``. Labels are never mixed.

    Args:
        backbone: Encoder with tokens, such as :class:`respiro.models.AST`.
        classes: Class names in the order of their labels. This, and all that is not named here, is as in
            :class:`SoundClassifier`.
        loss: On the clean batch; default :class:`respiro.losses.CrossEntropy` without class weights.
        patch_mix: Default :class:`respiro.transforms.PatchMix`.
        contrastive: Default :class:`respiro.losses.PatchMixContrastiveLoss`.
        projector: Of the mixed embeddings; default :class:`respiro.models.Projector` of the embedding's size.
        target: What the mixed projections are compared with. ``"grad_block"``: the clean embeddings as they are,
            without gradient (the paper). ``"grad_flow"``: with gradient. ``"project_block"``, ``"project_flow"``: their
            projections, without and with gradient.
        contrastive_weight: α.

    Raises:
        TypeError: If the backbone has no tokens.
        ValueError: If *target* is unknown, or needs projections of the embedding's size and the projector gives others.

    Source:
        Bae et al., "Patch-Mix contrastive learning with Audio Spectrogram Transformer on respiratory sound
        classification", Interspeech 2023, section 2.3.

    Example:
        >>> from respiro.models import AST
        >>> model = PatchMixCL(AST("tiny224", frames=98))
        >>> model(torch.zeros(2, 16000)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        backbone: TokenBackbone,
        classes: Sequence[str] = ("normal", "crackle", "wheeze", "both"),
        features: Transform | None = None,
        waveform_augment: Transform | None = None,
        augment: Transform | None = None,
        head: Component | None = None,
        loss: Loss | None = None,
        patch_mix: Transform | None = None,
        contrastive: Loss | None = None,
        projector: Component | None = None,
        target: Target = "grad_block",
        contrastive_weight: float = 1.0,
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
        check_choice("target", target, get_args(Target))
        self._set_patch_mix(patch_mix)
        size = self.backbone.num_features
        self.contrastive = build(PatchMixContrastiveLoss() if contrastive is None else contrastive, Loss, "contrastive")
        if isinstance(self.contrastive, CrossEntropy | MixedCrossEntropy):
            raise TypeError(f"contrastive must compare embeddings, got {type(self.contrastive).__name__}")
        self.projector = build(Projector(size) if projector is None else projector, Component, "projector")
        if not 0 <= contrastive_weight < float("inf"):
            raise ValueError(f"contrastive_weight must be finite and not negative, got {contrastive_weight!r}")
        if getattr(self.projector, "in_features", size) != size:
            raise ValueError(f"the projector takes {self.projector.in_features} features, the backbone gives {size}")
        if target.startswith("grad") and getattr(self.projector, "num_features", size) != size:
            raise ValueError(
                f"target {target!r} compares projections with embeddings, so both need one size, got "
                f"{self.projector.num_features} and {size}; give Projector out_features={size}, or use 'project_block'"
            )
        self.target = target
        self.contrastive_weight = float(contrastive_weight)
        self.save_hyperparameters(
            {
                "contrastive": describe(self.contrastive),
                "projector": describe(self.projector),
                "target": target,
                "contrastive_weight": self.contrastive_weight,
            }
        )

    def _default_loss(self) -> Loss:
        return CrossEntropy()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        labels = batch["label"]
        tokens = self.backbone.embed_patches(self.training_features(batch))
        mix = self.patch_mix(tokens, self.backbone.grid)
        # As one batch: what two passes would give, with half the launches.
        clean, mixed = self.backbone.forward_tokens(torch.cat([tokens, mix.x])).chunk(2)
        ce = self.loss(self.head(clean), labels)
        cl = self.contrastive(self.projector(mixed), self._target(clean), mix.index, mix.lam, labels)
        return self.logged(ce + self.contrastive_weight * cl, labels, train_ce=ce, train_cl=cl)

    def _target(self, clean: Tensor) -> Tensor:
        z = self.projector(clean) if self.target.startswith("project") else clean
        return z.detach() if self.target.endswith("block") else z
