"""Cross-entropy that takes the class prior into account."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from respiro.losses._checks import check_not_negative
from respiro.losses._counts import ClassCounted, log_prior
from respiro.losses.classification import cross_entropy

__all__ = ["LogitAdjustedCrossEntropy", "logit_adjusted_cross_entropy"]


def logit_adjusted_cross_entropy(
    logits: Tensor, labels: Tensor, class_counts: Tensor | Sequence[int], tau: float = 1.0
) -> Tensor:
    """Return the mean cross-entropy of ``logits + tau * log(pi)``. See :class:`LogitAdjustedCrossEntropy`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> logit_adjusted_cross_entropy(logits, torch.tensor([0, 1]), class_counts=[30, 10])
        tensor(0.1924)
    """
    return cross_entropy(logits + tau * log_prior(class_counts, logits), labels)


class LogitAdjustedCrossEntropy(ClassCounted):
    """Cross-entropy of ``logits + tau * log(pi)``, with each class's share ``pi`` of the train samples.

    The bare logits, by which to predict, then aim at the balanced error. A model trained by plain cross-entropy can be
    adjusted afterwards: :meth:`adjust`.

    Args:
        class_counts: Train samples of each class; by default the datamodule gives them before training.
        tau: How much of the prior is taken into account; not negative.

    Shape:
        logits ``(B, C)``, labels ``(B,)`` int64, -1 = ignored; returns a scalar.

    Raises:
        ValueError: If *tau* is negative or not finite.
        LabelError: If a label is no class, a class has no train sample, or the counts are for another number of
            classes.
        RuntimeError: If it is called before it has class counts.

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equations 9 and 10.

    Example:
        >>> import torch
        >>> loss = LogitAdjustedCrossEntropy(class_counts=[30, 10])
        >>> loss(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        tensor(0.1924)
    """

    def __init__(self, class_counts: Sequence[int] | None = None, tau: float = 1.0) -> None:
        super().__init__(class_counts)
        self.tau = check_not_negative("tau", tau)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        return logit_adjusted_cross_entropy(logits, labels, self.known_counts(), self.tau)

    def adjust(self, logits: Tensor) -> Tensor:
        """Return ``logits - tau * log(pi)`` ``(B, C)``, by which a model trained by plain cross-entropy predicts.

        In float32 at least.
        """
        return logits - self.tau * log_prior(self.known_counts(), logits)
