"""Angular margins of face recognition, all in radians: ArcFace, CosFace and AdaFace.

Each loss takes the cosines ``(B, C)`` of the embeddings and the class directions, makes that of the true class harder
to reach, and takes the cross-entropy of the scaled result, in float32 even under autocast; float64 stays. Labels of -1
are ignored. Margins are for training alone: prediction takes the largest cosine.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from respiro.component import Loss
from respiro.errors import check_choice
from respiro.losses._angles import Moved, turned, with_margin
from respiro.losses._checks import check_angle, check_cosine_margin, check_not_negative, check_positive
from respiro.losses.classification import IGNORED

__all__ = ["AdaFaceLoss", "ArcFaceLoss", "CosFaceLoss", "ada_face_loss", "arc_face_loss", "cos_face_loss"]

Beyond = Literal["fallback", "clip", "none"]


def arc_face_loss(
    cosines: Tensor, labels: Tensor, scale: float = 64.0, margin: float = 0.5, beyond: Beyond = "fallback"
) -> Tensor:
    """Return the mean cross-entropy with ``cos(theta + margin)`` for the true class. See :class:`ArcFaceLoss`.

    Example:
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2], [0.3, 0.3, 0.3]])
        >>> arc_face_loss(cosines, torch.tensor([0, 1]), scale=10.0, margin=0.2)
        tensor(1.3774)
    """
    check_angle("margin", margin)
    check_choice("beyond", beyond, get_args(Beyond))

    def move(own: Tensor) -> Moved:
        cosine, slope = turned(own, margin, edge=1e-4 if beyond == "clip" else None)
        if beyond != "fallback":
            return cosine, slope
        past = own < -math.cos(margin)  # theta > pi - margin
        fallback = own - margin * math.sin(margin)
        return fallback.where(past, cosine), slope.masked_fill(past, 1.0)

    return with_margin(cosines, labels, scale, move)


def cos_face_loss(cosines: Tensor, labels: Tensor, scale: float = 64.0, margin: float = 0.35) -> Tensor:
    """Return the mean cross-entropy with ``cos(theta) - margin`` for the true class. See :class:`CosFaceLoss`.

    Example:
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2], [0.3, 0.3, 0.3]])
        >>> cos_face_loss(cosines, torch.tensor([0, 1]), scale=10.0, margin=0.2)
        tensor(1.4048)
    """
    check_cosine_margin("margin", margin)
    return with_margin(cosines, labels, scale, lambda own: (own - margin, None))


def ada_face_loss(
    cosines: Tensor, labels: Tensor, strength: Tensor, scale: float = 64.0, margin: float = 0.4, eps: float = 1e-3
) -> Tensor:
    """Return the mean cross-entropy with ``cos(theta - margin * strength) - (margin + margin * strength)``.

    See :class:`AdaFaceLoss`, which takes the *strength* ``(B,)`` of each sample, in [-1, 1], from its norm.

    Example:
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2], [0.3, 0.3, 0.3]])
        >>> ada_face_loss(cosines, torch.tensor([0, 1]), strength=torch.tensor([1.0, -1.0]), scale=10.0, margin=0.2)
        tensor(1.4008)
    """
    check_angle("margin", margin)
    if strength.shape != labels.shape:
        raise ValueError(f"strength must have the shape of labels, {tuple(labels.shape)}, got {tuple(strength.shape)}")

    def move(own: Tensor) -> Moved:
        angular = margin * strength.detach().to(own)
        cosine, slope = turned(own, -angular, nearest=eps, edge=eps)
        return cosine - (margin + angular), slope

    return with_margin(cosines, labels, scale, move)


class ArcFaceLoss(Loss):
    """Additive angular margin: ``scale * cos(theta + margin)`` for the true class, ``scale * cos(theta)`` for others.

    Args:
        scale: Factor on all cosines; positive.
        margin: Radians, in [0, pi).
        beyond: What becomes of angles that the margin takes past pi, where the cosine would rise again:
            ``"fallback"`` takes ``cos(theta) - margin * sin(margin)``, which is no rise for margins up to 2.33,
            ``"clip"`` stays at pi, ``"none"`` lets it rise.

    Shape:
        cosines ``(B, C)`` in [-1, 1], labels ``(B,)`` int64, -1 = ignored; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, or the cosines lie outside [-1, 1] (looked at on a CPU only).
        LabelError: If a label is no class.

    Source:
        Deng et al., "ArcFace: additive angular margin loss for deep face recognition", CVPR 2019, equation 3.

    Example:
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2], [0.3, 0.3, 0.3]])
        >>> ArcFaceLoss(scale=10.0, margin=0.2)(cosines, torch.tensor([0, 1]))
        tensor(1.3774)
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.5, beyond: Beyond = "fallback") -> None:
        super().__init__()
        self.scale = check_positive("scale", scale)
        self.margin = check_angle("margin", margin)
        check_choice("beyond", beyond, get_args(Beyond))
        self.beyond: Beyond = beyond

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        return arc_face_loss(cosines, labels, self.scale, self.margin, self.beyond)


class CosFaceLoss(Loss):
    """Additive cosine margin: ``scale * (cos(theta) - margin)`` for the true class, ``scale * cos(theta)`` for others.

    Args:
        scale: Factor on all cosines; positive.
        margin: Difference of cosines, in [0, 2).

    Shape:
        cosines ``(B, C)`` in [-1, 1], labels ``(B,)`` int64, -1 = ignored; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, or the cosines lie outside [-1, 1] (looked at on a CPU only).
        LabelError: If a label is no class.

    Source:
        Wang et al., "CosFace: large margin cosine loss for deep face recognition", CVPR 2018, equation 4.

    Example:
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2], [0.3, 0.3, 0.3]])
        >>> CosFaceLoss(scale=10.0, margin=0.2)(cosines, torch.tensor([0, 1]))
        tensor(1.4048)
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.35) -> None:
        super().__init__()
        self.scale = check_positive("scale", scale)
        self.margin = check_cosine_margin("margin", margin)

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        return cos_face_loss(cosines, labels, self.scale, self.margin)


class AdaFaceLoss(Loss):
    """Margin that adapts to the norm of the embedding, which stands for the quality of the sample.

    ``scale * (cos(theta - margin * s) - (margin + margin * s))`` for the true class, where
    ``s = clip(h * (norm - mean) / (std + eps), -1, 1)``: an additive angular margin for the smallest norms, an additive
    cosine margin for the largest. Mean and standard deviation of the norms (clipped to [0.001, 100], without gradient)
    are moving averages over the train batches, without ignored samples and norms that are not finite; in eval mode, and
    by a batch that has fewer than two others, they are not moved. Among several processes each moves them by its own
    batches, from those of process 0, which DistributedDataParallel hands out before every step.

    Args:
        scale: Factor on all cosines; positive.
        margin: Radians, in [0, pi).
        h: How far a norm moves the margin; not negative.
        momentum: Share of the batch in the moving averages, in (0, 1]; 1 takes those of the batch alone.
        eps: Keeps cosines off 1 and -1, angles off 0 and pi, and the deviation off 0; in (0, 0.1).

    Shape:
        cosines ``(B, C)`` in [-1, 1], labels ``(B,)`` int64, -1 = ignored, norms ``(B,)``; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, there are not as many norms as labels, or the cosines lie outside
            [-1, 1] (looked at on a CPU only).
        LabelError: If a label is no class.

    Source:
        Kim et al., "AdaFace: quality adaptive margin for face recognition", CVPR 2022, equations 14 to 17; the first
        averages, 20 and 100, are those of the released code.

    Example:
        >>> cosines = torch.tensor([[0.6, 0.1, -0.2], [0.3, 0.3, 0.3]])
        >>> AdaFaceLoss(scale=10.0, margin=0.2)(cosines, torch.tensor([0, 1]), norms=torch.tensor([12.0, 9.0]))
        tensor(1.3987)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, scale: float = 64.0, margin: float = 0.4, h: float = 0.333, momentum: float = 1.0, eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.scale = check_positive("scale", scale)
        self.margin = check_angle("margin", margin)
        self.h = check_not_negative("h", h)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum!r}")
        if not 0 < eps < 0.1:
            raise ValueError(f"eps must be in (0, 0.1), got {eps!r}")
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, cosines: Tensor, labels: Tensor, norms: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        if norms.shape != labels.shape:
            raise ValueError(f"norms must have the shape of labels, {tuple(labels.shape)}, got {tuple(norms.shape)}")
        return ada_face_loss(cosines, labels, self._strength(norms.detach(), labels), self.scale, self.margin, self.eps)

    def _strength(self, norms: Tensor, labels: Tensor) -> Tensor:
        norms = norms.to(torch.promote_types(norms.dtype, torch.float32))
        counts = (labels != IGNORED) & norms.isfinite()
        norms = norms.clamp(0.001, 100)
        mean, std = self.mean.to(norms), self.std.to(norms)
        if self.training:
            # Sums, as picking the samples out would wait for a GPU.
            number = counts.sum()
            batch_mean = norms.where(counts, 0.0).sum() / number
            batch_std = ((norms - batch_mean).where(counts, 0.0).square().sum() / (number - 1)).sqrt()
            mean = torch.lerp(mean, batch_mean, self.momentum).where(number > 1, mean)
            std = torch.lerp(std, batch_std, self.momentum).where(number > 1, std)
            self.mean.copy_(mean)
            self.std.copy_(std)
        return (self.h * (norms - mean) / (std + self.eps)).clamp(-1, 1)
