"""Margins that depend on how rare a class is, and on the quality of the sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from respiro.losses._angles import Moved, turned, with_margin
from respiro.losses._checks import check_angle, check_cosine_margin, check_positive
from respiro.losses._counts import ClassCounted, check_counts, counts_for, log_prior
from respiro.losses.classification import check_labels

__all__ = ["DualFactorAngularMarginLoss", "LDAMLoss", "dual_factor_angular_margin_loss", "ldam_loss"]


def ldam_loss(
    cosines: Tensor,
    labels: Tensor,
    class_counts: Tensor | Sequence[int],
    max_margin: float = 0.5,
    scale: float = 30.0,
) -> Tensor:
    """Return the mean cross-entropy with ``cos(theta) - margin`` for the true class, larger for rare classes.

    See :class:`LDAMLoss`.

    Example:
        >>> import torch
        >>> cosines = torch.tensor([[0.6, 0.1], [0.3, 0.3]])
        >>> ldam_loss(cosines, torch.tensor([0, 1]), class_counts=[160, 10], scale=10.0)
        tensor(2.5428)
    """
    check_cosine_margin("max_margin", max_margin)

    def move(own: Tensor) -> Moved:
        counts = counts_for(cosines, class_counts)
        margins = max_margin * (counts.min() / counts) ** 0.25
        return own - _of_labels(margins, labels), None

    return with_margin(cosines, labels, scale, move)


def dual_factor_angular_margin_loss(
    cosines: Tensor,
    labels: Tensor,
    quality: Tensor,
    class_counts: Tensor | Sequence[int],
    kappa: float = 0.5,
    gamma: float = 0.5,
    target_margin: float = 0.2,
    scale: float = 15.0,
) -> Tensor:
    """Return the mean cross-entropy with ``cos(theta + m_d)`` for the true class.

    See :class:`DualFactorAngularMarginLoss`.

    Example:
        >>> import torch
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2, 0.3]], dtype=torch.float64)
        >>> counts = [2063, 1215, 501, 363]
        >>> dual_factor_angular_margin_loss(cosines, torch.tensor([0]), torch.tensor([0.5]), counts).item()
        0.1030...
    """
    _check_factors(kappa, gamma, target_margin)
    _check_quality(quality, labels)

    def move(own: Tensor) -> Moved:
        prior = log_prior(class_counts, cosines)
        margin = _dual_margin(labels, quality.detach().to(own), prior, kappa, gamma, target_margin)
        return turned(own, margin, edge=1e-3)

    return with_margin(cosines, labels, scale, move)


def _dual_margin(
    labels: Tensor, quality: Tensor, log_prior: Tensor, kappa: float, gamma: float, target_margin: float
) -> Tensor:
    """Equations 3 to 5: ``gamma m_q + (1 - gamma) m_c``, radians ``(B,)``."""
    by_class = -(1 - gamma) * target_margin / math.log(len(log_prior)) * log_prior
    return gamma * kappa * quality + _of_labels(by_class, labels)


def _of_labels(by_class: Tensor, labels: Tensor) -> Tensor:
    """Return the value of each label's class ``(B,)``; that of an ignored label has no meaning."""
    return by_class.index_select(0, labels.clamp(min=0))  # several times as fast as by_class[labels]


class LDAMLoss(ClassCounted):
    """Label-distribution-aware margin: a cosine margin in proportion to ``n ** (-1/4)``, ``max_margin`` for the rarest.

    Args:
        class_counts: Train samples of each class; by default the datamodule gives them before training.
        max_margin: Margin of the rarest class, a difference of cosines, in [0, 2).
        scale: Factor on all cosines; positive.

    Shape:
        cosines ``(B, C)`` in [-1, 1], labels ``(B,)`` int64, -1 = ignored; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, or the cosines lie outside [-1, 1] (looked at on a CPU only).
        LabelError: If a label is no class, a class has no train sample, or the counts are for another number of
            classes.
        RuntimeError: If it is called before it has class counts.

    Source:
        Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019, equations 10
        to 12. The deferred re-weighting of the paper is no part of it.

    Example:
        >>> import torch
        >>> cosines = torch.tensor([[0.6, 0.1], [0.3, 0.3]])
        >>> LDAMLoss(class_counts=[160, 10], scale=10.0)(cosines, torch.tensor([0, 1]))
        tensor(2.5428)
    """

    def __init__(self, class_counts: Sequence[int] | None = None, max_margin: float = 0.5, scale: float = 30.0) -> None:
        super().__init__(class_counts)
        self.max_margin = check_cosine_margin("max_margin", max_margin)
        self.scale = check_positive("scale", scale)

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        return ldam_loss(cosines, labels, self.known_counts(), self.max_margin, self.scale)


class DualFactorAngularMarginLoss(ClassCounted):
    """Angular margin that grows with the quality of the sample and the rarity of its class (DFAM).

    ``scale * cos(theta + m_d)`` for the true class, ``scale * cos(theta)`` for others, where
    ``m_d = gamma * m_q + (1 - gamma) * m_c``, ``m_q = kappa * quality`` and ``m_c = -target_margin * log(pi) / log(C)``
    with the class's share ``pi`` of the train samples: classes that are all alike have ``m_c = target_margin``. Cosines
    of the true class are kept 1e-6 away from 1 and -1, angles with their margin 0.001 away from 0 and pi.

    Args:
        class_counts: Train samples of each class; by default the datamodule gives them before training.
        kappa: Radians, the margin of a sample of quality 1; in [0, pi).
        gamma: Share of quality in the margin, in [0, 1].
        target_margin: Radians, the class margin under equal counts; in [0, pi).
        scale: Factor on all cosines; positive.

    Shape:
        cosines ``(B, C)`` in [-1, 1], labels ``(B,)`` int64, -1 = ignored, quality ``(B,)`` in [0, 1]; returns a
        scalar.

    Raises:
        ValueError: If an argument has no meaning, the largest margin would reach pi, or, looked at on a CPU only, the
            cosines lie outside [-1, 1] or a quality outside [0, 1].
        LabelError: If a label is no class, a class has no train sample, or the counts are for another number of
            classes.
        RuntimeError: If it is called before it has class counts.

    Source:
        Kim et al., "Quality adaptive angular margin learning for respiratory sound classification" (QLung), Interspeech
        2026, arXiv 2606.11915, equations 3 to 6.

    Example:
        >>> import torch
        >>> loss = DualFactorAngularMarginLoss(class_counts=[2063, 1215, 501, 363])
        >>> loss.margin(torch.tensor([0, 3]), quality=torch.tensor([0.5, 1.0]))
        tensor([0.1753, 0.4256])
    """

    def __init__(
        self,
        class_counts: Sequence[int] | None = None,
        kappa: float = 0.5,
        gamma: float = 0.5,
        target_margin: float = 0.2,
        scale: float = 15.0,
    ) -> None:
        super().__init__(class_counts)
        _check_factors(kappa, gamma, target_margin)
        self.kappa, self.gamma, self.target_margin = float(kappa), float(gamma), float(target_margin)
        self.scale = check_positive("scale", scale)
        if class_counts is not None:
            self._check_largest(class_counts)

    def use_class_counts(self, counts: Sequence[int]) -> None:
        """Receive the class counts of the train split; counts that were given by hand stay as they are."""
        if not self.given:
            self._check_largest(counts)
        super().use_class_counts(counts)

    def _check_largest(self, counts: Sequence[int]) -> None:
        rarest = min(found := check_counts(counts)) / sum(found)
        by_class = -self.target_margin * math.log(rarest) / math.log(len(found))
        if (largest := self.gamma * self.kappa + (1 - self.gamma) * by_class) >= math.pi:
            raise ValueError(
                f"the rarest class has a share of {rarest:.2g}, whose margin at quality 1 is {largest:.4g}, past pi; "
                f"lower kappa or target_margin"
            )

    def margin(self, labels: Tensor, quality: Tensor) -> Tensor:
        """Return the margin ``m_d`` of each sample ``(B,)``, radians; that of an ignored label has no meaning.

        Args:
            labels: ``(B,)`` int64.
            quality: ``(B,)``, in [0, 1].
        """
        _check_quality(quality, labels)
        counts = self.known_counts()
        by_class = quality[:, None].expand(-1, len(counts))
        check_labels(labels, by_class, "class_counts")
        prior = log_prior(counts, by_class)
        return _dual_margin(labels, quality.to(prior), prior, self.kappa, self.gamma, self.target_margin)

    def forward(self, cosines: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        factors = self.kappa, self.gamma, self.target_margin
        return dual_factor_angular_margin_loss(cosines, labels, quality, self.known_counts(), *factors, self.scale)


def _check_factors(kappa: float, gamma: float, target_margin: float) -> None:
    check_angle("kappa", kappa)
    check_angle("target_margin", target_margin)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma!r}")


def _check_quality(quality: Tensor, labels: Tensor) -> None:
    if not isinstance(quality, Tensor):
        raise TypeError(f"quality must be a tensor of one value for each label, got {type(quality).__name__}")
    if quality.shape != labels.shape or not quality.is_floating_point():
        raise ValueError(
            f"quality must be floating point of shape {tuple(labels.shape)}, one for each label, got {quality.dtype} "
            f"of shape {tuple(quality.shape)}"
        )
    # On a CPU only: on a GPU the look would wait for all that is under way, and the loss becomes NaN anyway.
    if quality.device.type != "cpu" or not len(quality):
        return
    lowest, highest = (value.item() for value in quality.detach().aminmax())
    if not 0 <= lowest <= highest <= 1:
        hint = ""
        if math.isnan(lowest):
            hint = "; NaN means that it was not computed: call add_quality(AudioQuality(...)) of the data set first"
        raise ValueError(f"quality must lie in [0, 1], got {lowest:g} to {highest:g}{hint}")
