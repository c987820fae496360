"""What the ICBHI and SPRSound scores share: one confusion matrix, and the two rates read from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from respiro.errors import LabelError

__all__ = ["ConfusionMetric", "pooled_rates"]


def pooled_rates(confmat: Tensor, first_abnormal: int = 1, two_class: bool = False) -> tuple[Tensor, Tensor]:
    """Return sensitivity and specificity of a confusion matrix, pooled over the abnormal cycles.

    A rate over no cycles is NaN. Integer counts give the default dtype, float64 counts give float64.

    Args:
        confmat: Counts by true class (rows) and predicted class (columns); class 0 is normal.
        first_abnormal: Smallest class id that counts as abnormal; those between it and normal enter neither rate.
        two_class: Count every abnormal prediction for an abnormal cycle as right, not the exact class only.

    Shape:
        confmat ``(..., C, C)``; returns two tensors ``(...)``.
    """
    specificity = confmat[..., 0, 0] / confmat[..., 0, :].sum(-1)
    abnormal = confmat[..., first_abnormal:, :]
    if two_class:
        right = abnormal[..., first_abnormal:].sum((-2, -1))
    else:
        right = confmat.diagonal(0, -2, -1)[..., first_abnormal:].sum(-1)
    return right / abnormal.sum((-2, -1)), specificity


class ConfusionMetric(Metric):
    """Metric whose only state is the confusion matrix ``confmat[true, predicted]``.

    The counts are integers and are summed over processes, so the result does not depend on batches or devices.
    Inside a ``MetricCollection`` all such metrics share one matrix.

    Args:
        num_classes: Number of classes, normal first; at least 2.

    Raises:
        ValueError: If there are fewer than two classes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    confmat: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (normal and one more), got {num_classes!r}")
        self.num_classes = num_classes
        self.add_state("confmat", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            preds: Scores (logits or probabilities), of which the largest is the prediction; or predicted labels.
            target: True labels; cycles labelled -1 are ignored.

        Shape:
            preds ``(B, C)`` floating, or ``(B,)`` integer; target ``(B,)`` integer.

        Raises:
            ValueError: If shapes or dtypes do not fit, or a score is NaN.
            LabelError: If a label or a predicted label is none of the classes.
        """
        size = self.num_classes
        target = self._check_target(target)
        predicted = self._predicted(preds, target)
        # Ignored cycles go to a cell of their own: selecting rows would make a GPU wait for the host.
        cells = torch.where(target < 0, size * size, target * size + predicted)
        counts = torch.bincount(cells, minlength=size * size + 1)[:-1]
        # Not in place: a state made under inference mode could not be changed outside it.
        self.confmat = self.confmat + counts.reshape(size, size)

    def _check_target(self, target: Tensor) -> Tensor:
        if target.ndim != 1 or target.is_floating_point():
            raise ValueError(f"target must be integer labels of shape (B,), got {tuple(target.shape)} {target.dtype}")
        target = target.long()
        self._check_range(target, -1, "target", " (-1 is ignored)")
        return target

    def _predicted(self, preds: Tensor, target: Tensor) -> Tensor:
        if preds.ndim == 1 and not preds.is_floating_point() and len(preds) == len(target):
            preds = preds.long()
            self._check_range(preds, 0, "preds", "")
            return preds
        if preds.shape != (len(target), self.num_classes):
            raise ValueError(
                f"preds must be scores of shape ({len(target)}, {self.num_classes}) or integer labels of shape "
                f"({len(target)},), got {tuple(preds.shape)} {preds.dtype}"
            )
        if preds.isnan().any():
            row = int(preds.isnan().any(1).nonzero()[0])
            raise ValueError(f"preds has NaN scores (first: row {row} of {len(preds)}); has training diverged?")
        return preds.argmax(1)

    def _check_range(self, labels: Tensor, lowest: int, name: str, note: str) -> None:
        wrong = (labels < lowest) | (labels >= self.num_classes)
        if wrong.any():
            raise LabelError(
                f"{name} must lie in 0 to {self.num_classes - 1}{note}, got {int(labels[wrong][0])}; "
                f"does num_classes={self.num_classes} fit the data?"
            )
