"""Two augmented views of each sample, from one extraction of its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from respiro.component import Component, Transform, build, describe
from respiro.errors import LabelError, check_choice
from respiro.losses import HybridSupConLoss, MultiObjectiveLoss, MultiSupConLoss, SupConLoss
from respiro.methods.classifier import SoundClassifier
from respiro.models import Projector
from respiro.transforms import LogMelSpectrogram, SpecAugment

__all__ = ["TwoViews", "ViewForward", "labels_of", "weighed"]

ViewForward = Literal["separate", "concat"]
#: Size of the space in which views are compared (Moummad and Farrugia, 2022).
PROJECTION = 128


class TwoViews(SoundClassifier):
    """What methods share that compare two views of each sample."""

    view_forward: ViewForward

    def _set_view_forward(self, view_forward: ViewForward) -> None:
        check_choice("view_forward", view_forward, get_args(ViewForward))
        self.view_forward = view_forward
        self.save_hyperparameters({"view_forward": view_forward})

    def _projector(self, projector: Component | None, argument: str = "projector") -> Component:
        size = self.backbone.num_features
        if projector is None:
            return Projector(size, out_features=PROJECTION, batch_norm=False)
        built = build(projector, Component, argument)
        if getattr(built, "in_features", size) != size:
            raise ValueError(f"{argument} takes {built.in_features} features, the backbone gives {size}")
        return built

    def _set_projector(self, projector: Component | None) -> None:
        self.projector = self._projector(projector)
        self.save_hyperparameters({"projector": describe(self.projector)})

    def _default_augment(self) -> Transform:
        """Return the masks of Moummad and Farrugia (2022), filled with the minimum of a clip where that is known."""
        front = self.features
        if isinstance(front, LogMelSpectrogram) and front.normalize.endswith("minmax"):
            return SpecAugment("icbhi_sup", time_width=40, fill=-front.mean / front.std)
        return SpecAugment("icbhi_sup", time_width=40)

    @property
    def contrasted(self) -> tuple[str, ...]:
        """Keys in the batch of the labels that are contrasted."""
        return ()

    def setup(self, stage: str) -> None:
        """Check also that the labels to be contrasted are of use; remember no batches of an earlier training."""
        super().setup(stage)
        if stage != "fit":
            return
        for part in self.loss.modules():
            if isinstance(part, SupConLoss):
                part.set_extra_state(None)  # a training that is resumed gets it back afterwards
        data: Any = getattr(self.trainer, "datamodule", None)
        for key in self.contrasted:
            if problem := _problem(data, key):
                raise LabelError(f"there is nothing to contrast by {key!r}: {problem}")

    def views(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return two augmented views of the features of a batch, each ``(B, T, F)``."""
        if isinstance(self.waveform_augment, nn.Identity):
            features = self.extract(batch)
            return self.augment(features), self.augment(features)
        one, other = (self.training_features(batch) for _ in range(2))
        return one, other

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings of both views of a batch, first all of one, then all of the other ``(2B, D)``."""
        views = self.views(batch)
        if self.view_forward == "concat":
            embeddings: Tensor = self.backbone(torch.cat(views))
            return embeddings
        # Batch norm takes its statistics from each view by itself.
        return torch.cat([self.backbone(view) for view in views])


def _problem(data: Any, key: str) -> str:
    """Say why a label of the train side is of no use; nothing where it is, or where that cannot be told."""
    record = getattr(data, "protocol", {}).get("metadata", {}).get(key)
    if record is not None:
        return str(record.get("problem", ""))
    train: Any = getattr(data, "train_set", None)
    if key not in getattr(train, "vocabularies", {}):
        return ""
    values = {code for code in train.codes(key).tolist() if code >= 0}
    return "" if len(values) > 1 else f"the train side has {len(values) or 'no'} value of it; contrast by another label"


def labels_of(batch: Mapping[str, Tensor], key: str) -> Tensor:
    """Return the labels of both views of a batch ``(2B,)``.

    Raises:
        LabelError: If the batch has no such labels.
    """
    labels = [name for name, values in batch.items() if values.dtype == torch.int64 and name not in ("index", "length")]
    if key not in labels:
        raise LabelError(
            f"the batches have no labels {key!r}, only {', '.join(labels)} ('label' is the class); "
            f"give the datamodule metadata={{{key!r}: [...]}} with the columns that they are made of, beside the others"
        )
    return batch[key].repeat(2)


def weighed(loss: nn.Module, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss, and what is to be logged of it: its terms, and how many anchors it left out."""
    terms: dict[str, Tensor] = {}
    if isinstance(loss, MultiSupConLoss | HybridSupConLoss | MultiObjectiveLoss):
        terms = loss.terms(*inputs)
        total = loss.total(terms)
    else:
        total = loss(*inputs)
    left_out: Any = getattr(loss, "left_out", {})
    if isinstance(left_out, Tensor):
        left_out = {"": left_out}
    logged = {f"train_{name}": term for name, term in terms.items()}
    counts = {f"train_left_out_{name}".rstrip("_"): count.float() for name, count in left_out.items()}
    return total, logged | counts
