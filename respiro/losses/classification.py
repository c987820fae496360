"""Cross-entropy with class weights that can be learnt from the train split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.component import Loss
from respiro.errors import LabelError

__all__ = ["CrossEntropy", "cross_entropy"]

_IGNORED = -1


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
    classes = logits.shape[1]
    # On a CPU only: on a GPU the check would wait for all that is under way, and torch stops at such a label anyway.
    if labels.device.type == "cpu" and len(labels) and not _IGNORED <= labels.min() <= labels.max() < classes:
        raise LabelError(f"labels must lie in [-1, {classes}) for logits of {classes} classes, got {labels.tolist()}")
    if logits.dtype != torch.float64:
        logits = logits.float()
    if weight is None:
        weight = logits.new_ones(logits.shape[1])
    else:
        weight = torch.as_tensor(weight).to(logits)
        if len(weight) != logits.shape[1]:
            raise LabelError(f"there are {len(weight)} class weights for logits of {logits.shape[1]} classes")
    with torch.autocast(logits.device.type, enabled=False):
        total = F.cross_entropy(
            logits, labels, weight, ignore_index=_IGNORED, reduction="sum", label_smoothing=label_smoothing
        )
    divisor = weight[labels.clamp(min=0)].masked_fill(labels == _IGNORED, 0.0).sum()
    return total / divisor.where(divisor > 0, 1.0)


class CrossEntropy(Loss):
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

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the batch, a scalar."""
        if self.balanced and self.class_weight is None:
            raise RuntimeError(
                "CrossEntropy(weight='balanced') has no class counts yet; call use_class_counts(counts) with the "
                "number of cycles per class of the train split first"
            )
        return cross_entropy(logits, labels, self.class_weight, self.label_smoothing)

    # A list, because a tensor in the state dict would need the number of classes before a strict load.
    def get_extra_state(self) -> list[float] | None:
        """Return the class weights as plain numbers."""
        weight: list[float] | None = None if self.class_weight is None else self.class_weight.tolist()
        return weight

    def set_extra_state(self, state: list[float] | None) -> None:
        """Take the balanced weights from a checkpoint; weights that were given by hand stay as they are."""
        if self.balanced and state is not None:
            self.class_weight = torch.tensor(state)
