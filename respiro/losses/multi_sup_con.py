"""Supervised contrastive learning with several labels of a sample, or beside cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from respiro.component import Loss
from respiro.losses._contrast import Denominator
from respiro.losses.classification import _ClassWeighted, cross_entropy
from respiro.losses.sup_con import SupConLoss, sup_con_loss

__all__ = ["HybridSupConLoss", "MultiSupConLoss", "hybrid_sup_con_loss", "multi_sup_con_loss"]

_PUBLISHED = {"class": 0.75, "sex_age": 0.25}


def multi_sup_con_loss(
    embeddings_by_task: Mapping[str, Tensor],
    labels_by_task: Mapping[str, Tensor],
    weights: Mapping[str, float] = _PUBLISHED,
    temperature: float = 0.06,
    denominator: Denominator = "all",
    gather: bool = False,
) -> Tensor:
    """Return the weighted sum of supervised contrastive losses on several labels; see :class:`MultiSupConLoss`.

    Args:
        embeddings_by_task: For each task, all views of all samples ``(V * B, D)``; *D* may differ.
        labels_by_task: For each task, the labels ``(V * B,)``, int64, -1 = unknown.
        weights: Weight of each task, at least 0.
        temperature: Divides the cosine similarities; positive.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Contrast with the samples of all processes.

    Returns:
        A scalar.

    Raises:
        ValueError: If an argument has no meaning or does not fit the others.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> labels = {"class": torch.tensor([0, 0, 1]), "sex": torch.tensor([0, 1, 1])}
        >>> multi_sup_con_loss({"class": z, "sex": z}, labels, {"class": 0.75, "sex": 0.25}, temperature=1.0)
        tensor(0.4857)
    """
    _check_weights(weights)
    _check_tasks(weights, embeddings_by_task, labels_by_task)
    terms = {
        task: sup_con_loss(embeddings_by_task[task], labels_by_task[task], temperature, denominator, gather)
        for task in weights
    }
    return _total(weights, terms)


def hybrid_sup_con_loss(
    logits: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    ce_weight: float = 0.5,
    supcon_weight: float = 0.5,
    temperature: float = 0.06,
    weight: Tensor | Sequence[float] | None = None,
    denominator: Denominator = "all",
    gather: bool = False,
) -> Tensor:
    """Return cross-entropy and supervised contrastive loss, weighted and added; see :class:`HybridSupConLoss`.

    Args:
        logits: Scores of all views of all samples ``(V * B, C)``.
        embeddings: Their embeddings ``(V * B, D)``, of any length.
        labels: Their classes ``(V * B,)``, int64, -1 = unknown.
        ce_weight: Weight of the cross-entropy, at least 0.
        supcon_weight: Weight of the supervised contrastive loss, at least 0.
        temperature: Divides the cosine similarities; positive.
        weight: One weight per class of the cross-entropy ``(C,)``.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Contrast with the samples of all processes.

    Returns:
        A scalar.

    Raises:
        LabelError: If there are not as many class weights as logits, or a label is no class.
        ValueError: If an argument has no meaning or does not fit the others.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> hybrid_sup_con_loss(2 * z, z, torch.tensor([0, 0, 1]), temperature=1.0)
        tensor(0.2201)
    """
    weights = {"ce": ce_weight, "supcon": supcon_weight}
    _check_weights(weights)
    terms = {
        "ce": cross_entropy(logits, labels, weight),
        "supcon": sup_con_loss(embeddings, labels, temperature, denominator, gather),
    }
    return _total(weights, terms)


class MultiSupConLoss(Loss):
    r"""Supervised contrastive loss on several labels of a sample, each on embeddings of its own.

    .. math:: \sum_k \lambda_k \, \mathrm{SupCon}(z_k, y_k),

    with a weight :math:`\lambda_k`, embeddings :math:`z_k` (of one encoder and a projector for each task) and labels
    :math:`y_k` for each task k; :class:`SupConLoss` says what it makes of unknown labels, of anchors without a
    positive, and of all arguments but the first.

    Args:
        weights: Weight of each task, finite and at least 0.
        temperature: Divides the cosine similarities; positive.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Under distributed training, contrast with the samples of all processes.
        memory: For each task, how many samples of earlier batches to contrast with in training.

    Attributes:
        weights: Weight of each task.

    Shape:
        for each task, embeddings ``(V * B, D)``, all views stacked, labels ``(V * B,)`` int64; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, tasks are missing or unknown, a shape does not fit, or, on a CPU,
            embeddings are not finite.

    Source:
        Moummad and Farrugia, "Learning audio features with metadata and contrastive learning", 2022, equation 3; the
        weights are those of the released code, on the class and on the combination of sex and age group.

    Example:
        >>> loss = MultiSupConLoss({"class": 0.75, "sex": 0.25}, temperature=1.0)
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss({"class": z, "sex": z}, {"class": torch.tensor([0, 0, 1]), "sex": torch.tensor([0, 1, 1])})
        tensor(0.4857)
    """

    def __init__(
        self,
        weights: dict[str, float] = _PUBLISHED,
        temperature: float = 0.06,
        denominator: Denominator = "all",
        gather: bool = False,
        memory: int = 0,
    ) -> None:
        super().__init__()
        _check_weights(weights)
        _check_names(weights)
        self.weights = dict(weights)
        self.losses = nn.ModuleDict({task: SupConLoss(temperature, denominator, gather, memory) for task in weights})

    def forward(self, embeddings_by_task: Mapping[str, Tensor], labels_by_task: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum over the tasks, a scalar."""
        return self.total(self.terms(embeddings_by_task, labels_by_task))

    def terms(
        self, embeddings_by_task: Mapping[str, Tensor], labels_by_task: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the loss of each task, a scalar without its weight; :meth:`total` makes :meth:`forward` of them."""
        _check_tasks(self.weights, embeddings_by_task, labels_by_task)
        return {task: loss(embeddings_by_task[task], labels_by_task[task]) for task, loss in self.losses.items()}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of :meth:`terms`, a scalar."""
        return _total(self.weights, terms)

    @property
    def left_out(self) -> dict[str, Tensor]:
        """For each task, how many anchors of this process the latest call left out."""
        return {task: loss.left_out for task, loss in self.losses.items()}  # type: ignore[misc]  # a SupConLoss each


class HybridSupConLoss(_ClassWeighted):
    r"""Cross-entropy and supervised contrastive loss at once: ``ce_weight * CE + supcon_weight * SupCon``.

    The released code has :math:`\alpha` on SupCon and :math:`1 - \alpha` on the cross-entropy; equation 4 of the paper
    has them the other way round. Both are the same at the published 0.5; here each has a weight of its own.

    Labels of -1 take part in neither. :class:`CrossEntropy` says what it makes of the class weights, and
    :class:`SupConLoss` of anchors without a positive, and of *denominator*, *gather* and *memory*. *gather* leaves the
    cross-entropy to each process. Class weights and memory are kept in the state dict.

    Args:
        ce_weight: Weight of the cross-entropy, finite and at least 0.
        supcon_weight: Weight of the supervised contrastive loss, finite and at least 0.
        temperature: Divides the cosine similarities; positive.
        weight: For the cross-entropy one weight per class, ``"balanced"``, or ``None`` for equal weights.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Under distributed training, contrast with the samples of all processes.
        memory: How many samples of earlier batches to contrast with in training.

    Attributes:
        weights: Weight of the terms ``"ce"`` and ``"supcon"``.

    Shape:
        logits ``(V * B, C)`` and embeddings ``(V * B, D)``, all views stacked, labels ``(V * B,)`` int64; returns a
        scalar.

    Raises:
        ValueError: If an argument has no meaning, a shape does not fit, or, on a CPU, embeddings are not finite.
        LabelError: If the number of class weights is not the number of classes, or a class has no example to weigh it
            by.
        RuntimeError: If ``"balanced"`` is called before it has class counts.

    Source:
        Moummad and Farrugia, "Learning audio features with metadata and contrastive learning", 2022, equation 4.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> HybridSupConLoss(temperature=1.0)(2 * z, z, torch.tensor([0, 0, 1]))
        tensor(0.2201)
    """

    def __init__(
        self,
        ce_weight: float = 0.5,
        supcon_weight: float = 0.5,
        temperature: float = 0.06,
        weight: list[float] | Literal["balanced"] | None = None,
        denominator: Denominator = "all",
        gather: bool = False,
        memory: int = 0,
    ) -> None:
        super().__init__(weight)
        self.weights = {"ce": ce_weight, "supcon": supcon_weight}
        _check_weights(self.weights)
        self.sup_con = SupConLoss(temperature, denominator, gather, memory)

    def forward(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of the two, a scalar."""
        return self.total(self.terms(logits, embeddings, labels))

    def terms(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return ``"ce"`` and ``"supcon"``, scalars without their weights; :meth:`total` makes the loss of them."""
        return {"ce": cross_entropy(logits, labels, self._weight()), "supcon": self.sup_con(embeddings, labels)}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of :meth:`terms`, a scalar."""
        return _total(self.weights, terms)

    @property
    def left_out(self) -> Tensor:
        """How many anchors of this process the latest call left out of the supervised contrastive loss."""
        return self.sup_con.left_out


def _total(weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()


def _check_weights(weights: Mapping[str, float]) -> None:
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be finite and at least 0, one of them positive, got {dict(weights)!r}")


def _check_names(weights: Mapping[str, float]) -> None:
    for task in weights:
        if not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(f"a task must have a name without '.' that torch.nn.ModuleDict can hold, got {task!r}")


def _check_tasks(weights: Mapping[str, float], embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
    if not weights.keys() == embeddings.keys() == labels.keys():
        raise ValueError(
            f"the tasks with a weight are {sorted(weights)}, but there are embeddings of {sorted(embeddings)} "
            f"and labels of {sorted(labels)}; give both for each, and no others"
        )
