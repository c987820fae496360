"""Cross-entropy with class weights that can be learnt from the train split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.component import Loss
from respiro.errors import LabelError
from respiro.losses._mixed import check_mixed

__all__ = ["CrossEntropy", "MixedCrossEntropy", "cross_entropy", "mixed_cross_entropy"]

#: Label of a sample that is left out.
IGNORED = -1


def cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the (class-weighted) mean cross-entropy of a batch, in float32 even under autocast.

    Labels of -1 are ignored. A batch without any other label, or whose labels all have weight 0, gives 0, with a
    gradient of 0. The weighted mean divides by the sum of the weights of the labels, as torch does.

    Args:
        logits: Scores ``(B, C)``.
        labels: Classes ``(B,)``, int64, -1 = unknown.
        weight: One weight per class ``(C,)``.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Returns:
        A scalar.

    Raises:
        LabelError: If there are not as many weights as logits, or a label is no class.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> cross_entropy(logits, torch.tensor([0, -1]))
        tensor(0.1269)
    """
    if weight is not None:
        return _weighted_mean(logits, labels, weight, label_smoothing)
    check_labels(labels, logits, "logits")
    exact = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return total / (labels != IGNORED).sum().clamp(min=1)


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    index: Tensor,
    lam: Tensor | float,
    weight: Tensor | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy of a mixed batch: ``lam * CE(logits, labels) + (1 - lam) * CE(logits, labels[index])``.

    Each of the two is a :func:`cross_entropy` of its own, so that it divides by the class weights of its own labels and
    leaves out its own labels of -1. A share per sample weighs the samples in the two sums, not in what divides them.

    Args:
        logits: Scores of the mixed samples ``(B, C)``.
        labels: Classes of the samples as they were ``(B,)``, int64, -1 = unknown.
        index: Partner of each sample ``(B,)``, int64.
        lam: Share of its own that a sample kept, in [0, 1]; one for the batch ``()`` or one per sample ``(B,)``.
        weight: One weight per class ``(C,)``.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Returns:
        A scalar.

    Raises:
        LabelError: If there are not as many weights as logits, or a label is no class.
        ValueError: If *index* or *lam* has no meaning for this batch.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> mixed_cross_entropy(logits, torch.tensor([0, 1]), index=torch.tensor([1, 0]), lam=0.75)
        tensor(0.6269)
    """
    check_mixed(index, lam, len(logits))
    own = _weighted_mean(logits, labels, weight, label_smoothing, lam)
    return own + _weighted_mean(logits, labels[index], weight, label_smoothing, 1 - lam)


def check_labels(labels: Tensor, scores: Tensor, name: str) -> None:
    """Check the labels of *scores* ``(B, C)``, which the messages call *name*.

    Their range on a CPU only: on a GPU the look would wait for all that is under way, and torch stops at such a label
    anyway.

    Raises:
        ValueError: If a shape does not fit, or the labels are not int64.
        LabelError: If a label is neither a class nor -1.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}; labels.long() makes them so")
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"{name} must have shape (B, C) and labels (B,), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    classes = scores.shape[1]
    if labels.device.type == "cpu" and len(labels):
        lowest, highest = labels.aminmax()
        if not IGNORED <= lowest.item() <= highest.item() < classes:
            raise LabelError(
                f"labels must lie in [-1, {classes}) for {name} of {classes} classes, got {labels.tolist()}"
            )


def _weighted_mean(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | Sequence[float] | None,
    label_smoothing: float,
    share: Tensor | float = 1.0,
) -> Tensor:
    """Return the mean cross-entropy, of which each sample counts its *share*, ``()`` or ``(B,)``."""
    check_labels(labels, logits, "logits")
    if logits.dtype != torch.float64:
        logits = logits.float()
    if weight is None:
        weight = logits.new_ones(logits.shape[1])
    else:
        weight = torch.as_tensor(weight).to(logits)
        if len(weight) != logits.shape[1]:
            raise LabelError(f"there are {len(weight)} class weights for logits of {logits.shape[1]} classes")
    losses = F.cross_entropy(
        logits, labels, weight, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    if isinstance(share, Tensor):
        share = share.to(losses)
    divisor = weight[labels].masked_fill(labels == IGNORED, 0.0).sum()
    return (share * losses).sum() / divisor.where(divisor > 0, 1.0)


class _ClassWeighted(Loss):
    """Class weights that are given, or learnt from the train split."""

    class_weight: Tensor | None

    def __init__(self, weight: list[float] | Literal["balanced"] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
        self.balanced = weight == "balanced"
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", None, persistent=False)
        if weight is not None and not self.balanced:
            if isinstance(weight, str) or not all(0 <= value < float("inf") for value in weight):
                raise ValueError(f"weight must be 'balanced', None or finite numbers of at least 0, got {weight!r}")
            self.class_weight = torch.tensor(weight, dtype=torch.float32)

    def use_class_counts(self, counts: Sequence[int]) -> None:
        """Set ``"balanced"`` weights from the class counts of the train split; other weights stay as they are."""
        if not self.balanced:
            return
        for index, count in enumerate(counts):
            if count <= 0:
                raise LabelError(
                    f"class {index} has {count} cycles in the train split, so it has no balanced weight; "
                    f"pass weight=[...] with one number per class, or train on classes that occur"
                )
        self.class_weight = torch.tensor([sum(counts) / (len(counts) * count) for count in counts])

    def _weight(self) -> Tensor | None:
        if self.balanced and self.class_weight is None:
            raise RuntimeError(
                f"{type(self).__name__}(weight='balanced') has no class counts yet; call use_class_counts(counts) with "
                f"the number of cycles per class of the train split first"
            )
        return self.class_weight

    # A list, because a tensor in the state dict would need the number of classes before a strict load.
    def get_extra_state(self) -> list[float] | None:
        """Return the class weights as plain numbers."""
        weight: list[float] | None = None if self.class_weight is None else self.class_weight.tolist()
        return weight

    def set_extra_state(self, state: list[float] | None) -> None:
        """Take the balanced weights from a checkpoint; weights that were given by hand stay as they are."""
        if self.balanced and state is not None:
            self.class_weight = torch.tensor(state)


class CrossEntropy(_ClassWeighted):
    """Cross-entropy, with class weights if asked for.

    Labels of -1 are ignored; a batch without any other label gives 0. ``"balanced"`` weights are ``N / (C n_c)`` with
    the class counts ``n_c`` of the train split, which :meth:`use_class_counts` receives. The scale of the weights has
    no effect, because the mean divides by their sum. They are kept in the state dict.

    Args:
        weight: One weight per class, ``"balanced"``, or ``None`` for equal weights.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Shape:
        logits ``(B, C)``, labels ``(B,)`` int64; returns a scalar.

    Raises:
        ValueError: If *weight* or *label_smoothing* is not one of the above.
        LabelError: If the number of weights is not the number of classes, or a class has no example to weigh it by.
        RuntimeError: If ``"balanced"`` is called before it has class counts.

    Example:
        >>> loss = CrossEntropy("balanced")
        >>> loss.use_class_counts([30, 10])
        >>> loss.class_weight
        tensor([0.6667, 2.0000])
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the batch, a scalar."""
        return cross_entropy(logits, labels, self._weight(), self.label_smoothing)


class MixedCrossEntropy(_ClassWeighted):
    """Cross-entropy of mixed samples: of the own label by the share kept, of the partner's label by the rest.

    ``lam * CE(logits, labels) + (1 - lam) * CE(logits, labels[index])``, where each of the two is a weighted mean as
    :class:`CrossEntropy` takes it, with the same class weights; a label of -1 leaves its own term out. A share per
    sample weighs the samples in the two sums, not in what divides them.

    Args:
        weight: One weight per class, ``"balanced"``, or ``None`` for equal weights.
        label_smoothing: Share of the target spread over all classes, in [0, 1].

    Shape:
        logits ``(B, C)``, labels ``(B,)`` int64, index ``(B,)`` int64, lam ``()`` or ``(B,)``; returns a scalar.

    Raises:
        ValueError: If *weight* or *label_smoothing* is not one of the above, or *index* or *lam* does not fit.
        LabelError: If the number of weights is not the number of classes, or a class has no example to weigh it by.
        RuntimeError: If ``"balanced"`` is called before it has class counts.

    Source:
        Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018; Bae et al., "Patch-Mix contrastive
        learning with Audio Spectrogram Transformer on respiratory sound classification", Interspeech 2023.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> MixedCrossEntropy()(logits, torch.tensor([0, 1]), index=torch.tensor([1, 0]), lam=torch.tensor(0.75))
        tensor(0.6269)
    """

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor, lam: Tensor | float) -> Tensor:
        """Return the mean cross-entropy of the mixed batch, a scalar."""
        return mixed_cross_entropy(logits, labels, index, lam, self._weight(), self.label_smoothing)
