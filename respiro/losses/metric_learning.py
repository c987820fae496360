"""Metric learning beside a classification loss: samples near the centre of their class, and far from other classes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from respiro.component import Loss, unit
from respiro.errors import LabelError, check_choice
from respiro.losses._checks import check_positive
from respiro.losses._embeddings import UNKNOWN, check_embeddings, check_labels

__all__ = ["CenterLoss", "TripletLoss", "center_loss", "triplet_loss"]

Mining = Literal["hard", "semihard"]


def center_loss(embeddings: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Return half the mean squared distance of the samples to the centres of their classes; see :class:`CenterLoss`.

    Args:
        embeddings: ``(B, D)``.
        labels: Classes ``(B,)``, int64, -1 = unknown.
        centers: One centre per class ``(C, D)``.

    Returns:
        A scalar.

    Raises:
        LabelError: If a label is no class (on a CPU).
        ValueError: If the shapes do not fit each other.

    Example:
        >>> z = torch.tensor([[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]])
        >>> center_loss(z, torch.tensor([0, 1, -1]), centers=torch.zeros(2, 2))
        tensor(6.5000)
    """
    check_embeddings(embeddings=embeddings)
    check_labels(labels, len(embeddings))
    if centers.ndim != 2 or centers.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"centers must have shape (C, {embeddings.shape[1]}), as embeddings have {embeddings.shape[1]} numbers "
            f"each, got {tuple(centers.shape)}"
        )
    # On a CPU only: on a GPU the check would wait for all that is under way, and torch stops at such a label anyway.
    if labels.device.type == "cpu" and len(labels) and labels.max() >= len(centers):
        raise LabelError(f"labels must lie in [-1, {len(centers)}) for {len(centers)} centres, got {labels.tolist()}")
    z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    known = labels != UNKNOWN
    squares = (z - centers.to(z.dtype)[labels.clamp(min=0)]).square().sum(1)
    return squares.where(known, 0.0).sum() / (2 * known.sum().clamp(min=1))


def triplet_loss(embeddings: Tensor, labels: Tensor, margin: float = 0.3, mining: Mining = "hard") -> Tensor:
    """Return how far, on average, a negative is from being farther than a positive; see :class:`TripletLoss`.

    Args:
        embeddings: ``(B, D)``, of any length.
        labels: Classes ``(B,)``, int64, -1 = unknown.
        margin: By how much the negative shall be farther, at least 0; two unit vectors are at most 2 apart.
        mining: ``"hard"`` or ``"semihard"``.

    Returns:
        A scalar.

    Raises:
        ValueError: If an argument has no meaning or does not fit the others.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> triplet_loss(z, torch.tensor([0, 0, 1]))
        tensor(0.1500)
    """
    _check_settings(margin, mining)
    check_embeddings(embeddings=embeddings)
    check_labels(labels, len(embeddings))
    z = unit(embeddings)
    # Not by a matrix product, which loses small distances to rounding; its gradient at a distance of 0 is 0.
    distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    known = labels != UNKNOWN
    same = ((labels[:, None] == labels) & known).fill_diagonal_(False)
    other = (labels[:, None] != labels) & known  # of an unlabelled anchor too, which has no positive
    negatives = distances.masked_fill(~other, float("inf")).sort(dim=1).values  # the nearest first
    if mining == "hard":
        positive = distances.masked_fill(~same, 0.0).sort(dim=1).values[:, -1:]
        negative = negatives[:, :1]
        same = same.any(dim=1, keepdim=True)  # one triplet for each anchor
    else:
        positive = distances
        farther = torch.searchsorted(negatives.detach(), distances.detach(), right=True)
        farthest = other.sum(dim=1, keepdim=True) - 1
        negative = negatives.gather(1, farther.minimum(farthest).clamp(min=0))
    usable = same & other.any(dim=1, keepdim=True)
    losses = (margin + positive - negative).relu().where(usable, 0.0)
    return losses.sum() / usable.sum().clamp(min=1)


class CenterLoss(Loss):
    r"""Centre loss: each sample shall lie near the centre of its class, and the centre follows its samples.

    With embeddings :math:`z_i`, of which *B* have a label, and centres :math:`c_k`,

    .. math:: \frac{1}{2B} \sum_i \lVert z_i - c_{y_i} \rVert^2.

    Labels of -1 are ignored; a batch without any other label gives 0, with a gradient of 0 for embeddings and centres.
    Embeddings are taken as they are, not scaled to length 1. Computed in float32 even under autocast.

    The centres begin at zero and learn by their gradient, which is that of the mean over the batch: a class that makes
    up a share *p* of the labelled samples moves ``rate * p`` of the way to the mean of its samples. (The paper divides
    by the samples of the class plus 1 instead.) They are parameters, so that they are in the state dict, and their
    gradients are averaged over distributed processes. In a loop of your own, either call :meth:`step` after
    ``backward`` and leave them out of all optimisers, or give them to an optimiser of their own.

    Args:
        num_classes: Number of classes.
        num_features: Length *D* of an embedding.
        rate: Learning rate of the centres in :meth:`step`; positive.

    Attributes:
        centers: Parameter ``(num_classes, num_features)``.

    Shape:
        embeddings ``(B, D)``, labels ``(B,)`` int64; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, a shape does not fit, or, on a CPU, embeddings are not finite.
        LabelError: If a label is no class (on a CPU).

    Source:
        Wen et al., "A discriminative feature learning approach for deep face recognition", ECCV 2016, equation 2.

    Example:
        >>> loss = CenterLoss(num_classes=2, num_features=2)
        >>> loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0, 1])).backward()
        >>> loss.step()
        >>> loss.centers.data
        tensor([[0.7500, 1.0000],
                [0.0000, 0.2500]])
    """

    def __init__(self, num_classes: int, num_features: int, rate: float = 0.5) -> None:
        super().__init__()
        if num_classes < 1 or num_features < 1:
            raise ValueError(f"num_classes and num_features must be positive, got {num_classes!r} and {num_features!r}")
        self.rate = check_positive("rate", rate)
        self.centers = nn.Parameter(torch.zeros(num_classes, num_features))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the batch, a scalar."""
        return center_loss(embeddings, labels, self.centers)

    @torch.no_grad()
    def step(self, scale: float | Tensor = 1.0) -> None:
        """Move the centres by their gradient: ``centers -= rate * centers.grad / scale``.

        Without a gradient nothing happens. The gradient stays as it is: clear it as you do those of the network.

        Args:
            scale: Weight that this loss had in the total, times that of a gradient scaler that has not been undone, so
                that neither slows the centres down; positive, a number or a scalar tensor.

        Raises:
            ValueError: If *scale* is a number that is not positive and finite.
        """
        if not isinstance(scale, Tensor):
            check_positive("scale", scale)
        if self.centers.grad is not None:
            self.centers.sub_(self.centers.grad * (self.rate / scale))


class TripletLoss(Loss):
    r"""Triplet loss: a sample of another class shall be farther than one of the same class, by a margin.

    With the Euclidean distances *d* between embeddings scaled to length 1, the mean over triplets of an anchor *a*, a
    positive *p* (another sample of its class) and a negative *n* (a sample of another class) of

    .. math:: \max(0, m + d_{ap} - d_{an}).

    ``"hard"`` makes one triplet for each anchor, of its farthest positive and its nearest negative. ``"semihard"``
    makes one for each anchor and positive, with the nearest negative that is farther than this positive, or the
    farthest negative where none is. Triplets that keep the margin count in the mean, with 0.

    A label of -1 is unknown: such a sample takes no part. Anchors without a positive or without a negative are skipped;
    a batch without any other, such as one of a single class, gives 0, with a gradient of 0. It takes batches with
    several samples of several classes. An embedding of zeros stays zero, with a gradient of zero. Identical embeddings
    give *margin*, and no gradient that would part them. Computed in float32 even under autocast. Under distributed
    training each process mines in its own batch.

    Args:
        margin: By how much the negative shall be farther, finite and at least 0; two unit vectors are at most 2 apart.
        mining: ``"hard"`` or ``"semihard"``.

    Shape:
        embeddings ``(B, D)``, labels ``(B,)`` int64; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, a shape does not fit, or, on a CPU, embeddings are not finite.

    Source:
        ``"hard"``: Hermans et al., "In defense of the triplet loss for person re-identification", 2017, equation 5, on
        unit vectors. ``"semihard"``: after Schroff et al., "FaceNet: A unified embedding for face recognition and
        clustering", CVPR 2015, section 3.2, who take squared distances and leave open which of the farther negatives.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
        >>> TripletLoss(margin=0.3)(z, torch.tensor([0, 0, 1]))
        tensor(0.1500)
    """

    def __init__(self, margin: float = 0.3, mining: Mining = "hard") -> None:
        super().__init__()
        _check_settings(margin, mining)
        self.margin = margin
        self.mining: Mining = mining

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the triplets, a scalar."""
        return triplet_loss(embeddings, labels, self.margin, self.mining)


def _check_settings(margin: float, mining: str) -> None:
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be finite and at least 0, got {margin!r}")
    check_choice("mining", mining, get_args(Mining))
