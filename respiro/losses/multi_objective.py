"""Classification together with metric learning and auxiliary heads, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from respiro.component import Loss
from respiro.errors import check_choice
from respiro.losses._embeddings import UNKNOWN
from respiro.losses.classification import MixedCrossEntropy
from respiro.losses.metric_learning import CenterLoss, TripletLoss

__all__ = ["MultiObjectiveLoss"]


class MultiObjectiveLoss(Loss):
    r"""Classification, centre and triplet loss, and classification by each branch of a network, weighted and added.

    .. math:: L = L_{cls} + \lambda_c L_{centre} + \lambda_t L_{triplet} + \lambda_a \sum_b L_{cls}(b),

    where *b* are the branches, each with logits of its own. A term without a loss, or with a weight of 0, is left out
    altogether; a call without *branch_logits* has no auxiliary term. With all three left out, the classification alone
    remains.

    A mixed batch has the partner *index* of each sample and the share *lam* it kept of itself; its classification loss
    must be a :class:`MixedCrossEntropy`, which without class weights has the gradient of the KL divergence of the
    predictions from the mixed labels. The metric terms take only the samples that were not mixed: the others count as
    unlabelled there. A :class:`MixedCrossEntropy` gets a batch that is not mixed with each sample as its own partner,
    which makes it a :class:`CrossEntropy`.

    With ``weighting="uncertainty"`` the total is :math:`\sum_k \lambda_k (e^{-s_k} L_k + s_k)`, with a learned
    log-variance :math:`s_k`, 0 at first, for each term in use. It can be negative. A term that stays at 0, such as that
    of triplets without a usable anchor, lowers its :math:`s_k` all the while.

    :class:`MixedCrossEntropy`, :class:`CenterLoss` and :class:`TripletLoss` say what they make of labels of -1 and of a
    batch of one class. Class weights, centres and log-variances are kept in the state dict.

    Args:
        classification: Default :class:`MixedCrossEntropy` with balanced class weights; or a :class:`CrossEntropy` or
            another loss on ``(logits, labels)``, for batches that are not mixed.
        center: Loss with the centres of the classes.
        triplet: Loss on triplets.
        center_weight: Weight of *center*, finite and at least 0.
        triplet_weight: Weight of *triplet*, finite and at least 0.
        auxiliary_weight: Weight of the sum over the branches, finite and at least 0.
        weighting: ``"fixed"``, or ``"uncertainty"`` to learn the weights too.

    Attributes:
        weights: Weight of each term in use: ``"classification"`` (1), ``"center"``, ``"triplet"``, ``"auxiliary"``.
        log_variances: The :math:`s_k` by term; empty with ``"fixed"``.

    Shape:
        logits ``(B, C)``, embeddings ``(B, D)``, labels ``(B,)`` int64, branch_logits any number of ``(B, C)``,
        index ``(B,)`` int64, lam ``()`` or ``(B,)``; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning or does not fit the others.
        TypeError: If a mixed batch comes to a classification loss that is no :class:`MixedCrossEntropy`.
        LabelError: If a label is no class, or a class has no example to weigh it by.
        RuntimeError: If ``"balanced"`` is called before it has class counts.

    Source:
        Reconstruction of the loss of Ngo et al., "An Inception-residual-based architecture with multi-objective loss
        for detecting respiratory anomalies", 2023, whose terms and weights are not published. Uncertainty: after
        Kendall et al., "Multi-task learning using uncertainty to weigh losses", CVPR 2018, in one form for all terms.

    Example:
        >>> loss = MultiObjectiveLoss(MixedCrossEntropy(), CenterLoss(2, 2), TripletLoss())
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> loss.terms(z, z, torch.tensor([0, 0, 1]))
        {'classification': tensor(0.6466), 'center': tensor(0.5000, ...), 'triplet': tensor(0.1500)}
        >>> loss.weights
        {'classification': 1.0, 'center': 0.005, 'triplet': 0.1, 'auxiliary': 0.3}
    """

    def __init__(
        self,
        classification: Loss | None = None,
        center: CenterLoss | None = None,
        triplet: TripletLoss | None = None,
        center_weight: float = 0.005,
        triplet_weight: float = 0.1,
        auxiliary_weight: float = 0.3,
        weighting: Literal["fixed", "uncertainty"] = "fixed",
    ) -> None:
        super().__init__()
        check_choice("weighting", weighting, ("fixed", "uncertainty"))
        given = {"center": center_weight, "triplet": triplet_weight, "auxiliary": auxiliary_weight}
        for name, weight in given.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}_weight must be finite and at least 0, got {weight!r}")
        self.classification = MixedCrossEntropy("balanced") if classification is None else classification
        # Centres that are not used would stop DistributedDataParallel.
        self.center = center if center_weight else None
        self.triplet = triplet if triplet_weight else None
        used = {"center": self.center is not None, "triplet": self.triplet is not None, "auxiliary": auxiliary_weight}
        self.weights = {"classification": 1.0} | {name: weight for name, weight in given.items() if used[name]}
        learned = self.weights if weighting == "uncertainty" else {}
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in learned})

    def use_class_counts(self, counts: Sequence[int]) -> None:
        """Hand the class counts of the train split on to the classification loss."""
        if isinstance(self.classification, Loss):
            self.classification.use_class_counts(counts)

    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        branch_logits: Sequence[Tensor] = (),
        index: Tensor | None = None,
        lam: Tensor | float | None = None,
    ) -> Tensor:
        """Return the weighted sum of the terms, a scalar."""
        return self.total(self.terms(logits, embeddings, labels, branch_logits, index, lam))

    def terms(
        self,
        logits: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        branch_logits: Sequence[Tensor] = (),
        index: Tensor | None = None,
        lam: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Return the terms in use, scalars without their weights; :meth:`total` makes :meth:`forward` of them."""
        if (index is None) != (lam is None):
            raise ValueError("index and lam belong together: give both for a mixed batch, or neither")
        terms = {"classification": self._classify(logits, labels, index, lam)}
        unmixed = labels
        if lam is not None:
            unmixed = labels.masked_fill(torch.as_tensor(lam, device=labels.device) < 1, UNKNOWN)
        if self.center is not None:
            terms["center"] = self.center(embeddings, unmixed)
        if self.triplet is not None:
            terms["triplet"] = self.triplet(embeddings, unmixed)
        if "auxiliary" in self.weights and len(branch_logits):
            branches = [self._classify(branch, labels, index, lam) for branch in branch_logits]
            terms["auxiliary"] = torch.stack(branches).sum()
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of :meth:`terms`, a scalar."""
        parts = [self.weights[name] * self._certain(name, term) for name, term in terms.items()]
        # In the graph though the term is absent: a parameter outside it would stop DistributedDataParallel.
        parts += [0.0 * s for name, s in self.log_variances.items() if name not in terms]
        return torch.stack(parts).sum()

    def step_centers(self) -> None:
        """Move the centres at their own rate, whatever weight their term has: :meth:`CenterLoss.step`, after backward.

        Where weights are learned, call it while they are those of the backward pass, or one step further.
        """
        if self.center is not None:
            learned = torch.exp(-self.log_variances["center"]) if "center" in self.log_variances else 1.0
            self.center.step(self.weights["center"] * learned)

    def _certain(self, name: str, term: Tensor) -> Tensor:
        if name not in self.log_variances:
            return term
        log_variance: Tensor = self.log_variances[name]
        return torch.exp(-log_variance) * term + log_variance

    def _classify(self, logits: Tensor, labels: Tensor, index: Tensor | None, lam: Tensor | float | None) -> Tensor:
        """Return the classification loss of one set of logits."""
        loss: Tensor
        if not isinstance(self.classification, MixedCrossEntropy):
            if index is not None:
                raise TypeError(
                    f"a mixed batch needs MixedCrossEntropy as classification, got "
                    f"{type(self.classification).__name__}; pass classification=MixedCrossEntropy(...), or do not mix"
                )
            loss = self.classification(logits, labels)
        elif index is None:
            own = torch.arange(len(labels), device=labels.device)
            loss = self.classification(logits, labels, own, 1.0)
        else:
            loss = self.classification(logits, labels, index, lam)
        return loss
