"""Sensitivity, specificity and score of the ICBHI 2017 challenge, by its own definition (Rocha et al., 2019)."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from respiro.metrics._confusion import ConfusionMetric, pooled_rates

__all__ = ["ICBHIScore", "ICBHISensitivity", "ICBHISpecificity", "icbhi_metrics", "icbhi_rates"]


def icbhi_rates(confmat: Tensor, two_class: bool = False) -> dict[str, Tensor]:
    """Return sensitivity, specificity and score of a confusion matrix ``(..., C, C)``, class 0 normal."""
    sensitivity, specificity = pooled_rates(confmat, two_class=two_class)
    return {"sensitivity": sensitivity, "specificity": specificity, "score": (sensitivity + specificity) / 2}


class _ICBHIMetric(ConfusionMetric):
    def __init__(self, num_classes: int = 4, two_class: bool = False) -> None:
        super().__init__(num_classes)
        self.two_class = two_class


class ICBHISensitivity(_ICBHIMetric):
    """Share of abnormal cycles given their exact class, pooled over the abnormal classes (not macro).

    A crackle called wheeze is a miss. NaN without abnormal cycles. Source: Rocha et al., Physiol. Meas. 40, 2019.

    Args:
        num_classes: Number of classes, normal first.
        two_class: Two-class rate of a model with more classes: any abnormal class is right for an abnormal cycle.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; targets of -1 are ignored. Returns a scalar.

    Raises:
        ValueError: If there are fewer than two classes; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: On update, if a label or a predicted label is none of the classes.

    Example:
        >>> import torch
        >>> preds, target = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])
        >>> ICBHISensitivity()(preds, target), ICBHISensitivity(two_class=True)(preds, target)
        (tensor(0.3333), tensor(1.))
    """

    def compute(self) -> Tensor:
        """Return the sensitivity, in [0, 1]."""
        return icbhi_rates(self.confmat, self.two_class)["sensitivity"]


class ICBHISpecificity(_ICBHIMetric):
    """Share of normal cycles called normal (not the one-vs-rest mean); NaN without normal cycles.

    Source: Rocha et al., Physiol. Meas. 40, 2019.

    Args:
        num_classes: Number of classes, normal first.
        two_class: As in :class:`ICBHISensitivity`; the specificity is the same either way.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; targets of -1 are ignored. Returns a scalar.

    Raises:
        ValueError: If there are fewer than two classes; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: On update, if a label or a predicted label is none of the classes.

    Example:
        >>> import torch
        >>> ICBHISpecificity()(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 2]))
        tensor(0.5000)
    """

    def compute(self) -> Tensor:
        """Return the specificity, in [0, 1]."""
        return icbhi_rates(self.confmat, self.two_class)["specificity"]


class ICBHIScore(_ICBHIMetric):
    """Mean of sensitivity and specificity: the ICBHI Score. Calling everything normal gives 0.5.

    NaN where either rate is. Source: Rocha et al., Physiol. Meas. 40, 2019.

    Args:
        num_classes: Number of classes, normal first.
        two_class: As in :class:`ICBHISensitivity`.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; targets of -1 are ignored. Returns a scalar.

    Raises:
        ValueError: If there are fewer than two classes; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: On update, if a label or a predicted label is none of the classes.

    Example:
        >>> import torch
        >>> ICBHIScore()(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 3]))
        tensor(0.5000)
    """

    def compute(self) -> Tensor:
        """Return the score, in [0, 1]."""
        return icbhi_rates(self.confmat, self.two_class)["score"]


def icbhi_metrics(num_classes: int = 4, two_class: bool = False) -> MetricCollection:
    """Return score, sensitivity and specificity (Rocha et al., 2019) over one shared confusion matrix.

    Args:
        num_classes: Number of classes, normal first.
        two_class: As in :class:`ICBHISensitivity`.

    Shape:
        preds ``(B, C)`` scores or ``(B,)`` labels, target ``(B,)``; each value is a scalar.

    Raises:
        ValueError: If there are fewer than two classes; on update, if shapes or dtypes do not fit or a score is NaN.
        LabelError: On update, if a label or a predicted label is none of the classes.

    Example:
        >>> import torch
        >>> metrics = icbhi_metrics()
        >>> metrics.update(torch.eye(4), torch.tensor([0, 1, 2, 2]))
        >>> metrics.compute()
        {'score': tensor(0.8333), 'sensitivity': tensor(0.6667), 'specificity': tensor(1.)}
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "score": ICBHIScore(num_classes, two_class),
        "sensitivity": ICBHISensitivity(num_classes, two_class),
        "specificity": ICBHISpecificity(num_classes, two_class),
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])
