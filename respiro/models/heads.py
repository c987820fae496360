"""Heads on embeddings ``(B, D)``: to logits ``(B, C)``, or into the space where a contrastive loss compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from respiro.component import Component, unit

__all__ = ["CosineHead", "KNNHead", "LinearHead", "Projector"]


class LinearHead(Component):
    """One linear layer, with layer norm and dropout before it if asked for.

    Args:
        in_features: Size of the embedding.
        num_classes: Number of classes.
        dropout: Share of the embedding that is dropped in training.
        layer_norm: Normalise the embedding first, as the head of the Audio Spectrogram Transformer does.

    Shape:
        embeddings ``(B, in_features)``; returns logits ``(B, num_classes)``.

    Example:
        >>> import torch
        >>> LinearHead(512, num_classes=4)(torch.zeros(2, 512)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.0, layer_norm: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = num_classes
        self.norm = nn.LayerNorm(in_features) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)``."""
        logits: Tensor = self.linear(self.dropout(self.norm(embeddings)))
        return logits

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Return the cosines ``(B, num_classes)`` of what the linear layer gets and the weights of each class."""
        return self.logits_and_cosines(embeddings)[1]

    def logits_and_cosines(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ``(B, num_classes)``, of the same dropped embeddings."""
        kept = self.dropout(self.norm(embeddings))
        return self.linear(kept), _cosines(kept, self.linear.weight)


class CosineHead(Component):
    """Angular classifier: the scaled cosines of the embedding and a direction per class, without a bias.

    It is computed in float32 even under autocast (float64 stays). An embedding of zeros has no direction: its cosines
    are 0. Alone with cross-entropy this is NormFace.

    Args:
        in_features: Size of the embedding.
        num_classes: Number of classes.
        scale: Factor on the cosines; positive.

    Shape:
        embeddings ``(B, in_features)``; returns logits ``(B, num_classes)``.

    Raises:
        ValueError: If *scale* is not positive and finite.

    Source:
        Kim et al., QLung, Interspeech 2026, equation 1; Wang et al., NormFace, ACM Multimedia 2017.

    Example:
        >>> import torch
        >>> head = CosineHead(512, num_classes=4)
        >>> logits = head(torch.randn(2, 512))
        >>> bool((logits.abs() <= 37).all())
        True
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 37.0) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale!r}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.scale = float(scale)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)``."""
        return self.scale * self.cosines(embeddings)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Return the cosines ``(B, num_classes)`` of the embeddings and the direction of each class."""
        return _cosines(embeddings, self.weight)

    def logits_and_cosines(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ``(B, num_classes)``, computed once."""
        cosines = self.cosines(embeddings)
        return self.scale * cosines, cosines


def _cosines(embeddings: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, enabled=False):
        directions = unit(embeddings)
        return directions @ unit(weight).to(directions.dtype).T


class Projector(Component):
    """Linear, batch norm, ReLU, linear: embeddings into the space where a contrastive loss compares them.

    It is used in training alone. Batch norm needs at least two samples while training. That of Moummad and Farrugia is
    ``Projector(512, out_features=128, batch_norm=False)``.

    Args:
        in_features: Size of the embedding.
        hidden_features: Size between the two linear layers; *in_features* by default.
        out_features: Size of the projection; *in_features* by default.
        batch_norm: Whether there is a batch norm between the first linear layer and the ReLU.

    Shape:
        embeddings ``(B, in_features)``; returns projections ``(B, out_features)``.

    Source:
        Bae et al., Interspeech 2023, section 2.3; without batch norm Moummad and Farrugia, WASPAA 2023 (released code).

    Example:
        >>> import torch
        >>> Projector(768)(torch.zeros(2, 768)).shape
        torch.Size([2, 768])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        self.in_features = in_features
        self.num_features = in_features if out_features is None else out_features
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden), *norm, nn.ReLU(), nn.Linear(hidden, self.num_features)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the projections ``(B, out_features)``."""
        projections: Tensor = self.layers(embeddings)
        return projections


class KNNHead(Component):
    """Vote of the nearest training samples by cosine similarity; nothing is trained, :meth:`remember` fills it.

    A neighbour's vote weighs one by the number of samples of its class, so that all classes count alike. The share of
    the votes that a class has is smoothed as if one more neighbour had voted for all classes alike, so that no logit is
    infinite; the softmax of the logits is these shares. Of samples that are equally near, the first ones count.

    Args:
        in_features: Size of the embedding.
        num_classes: Number of classes.
        num_samples: Number of training samples.
        neighbors: Number of nearest samples that vote.

    Shape:
        embeddings ``(B, in_features)``; returns logits ``(B, num_classes)``. One matrix ``(B, num_samples)`` of
        similarities is made. They are computed in float32 even under autocast (float64 stays float64).

    Raises:
        ValueError: If *neighbors* is not between 1 and *num_samples*; when called on a CPU, if nothing is remembered.

    Example:
        >>> import torch
        >>> head = KNNHead(2, num_classes=2, num_samples=3, neighbors=1)
        >>> head.remember(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]]), torch.tensor([0, 1, 1]))
        >>> head(torch.tensor([[5.0, 1.0], [1.0, 5.0]])).softmax(1)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    embeddings: Tensor
    labels: Tensor

    def __init__(self, in_features: int, num_classes: int, num_samples: int, neighbors: int = 20) -> None:
        super().__init__()
        if not 1 <= neighbors <= num_samples:
            raise ValueError(f"neighbors must be between 1 and num_samples, {num_samples!r}, got {neighbors!r}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.neighbors = neighbors
        self.register_buffer("embeddings", torch.zeros(num_samples, in_features))
        self.register_buffer("labels", torch.full((num_samples,), -1))

    @torch.no_grad()
    def remember(self, embeddings: Tensor, labels: Tensor) -> None:
        """Keep the training samples, their embeddings scaled to unit length.

        Args:
            embeddings: ``(num_samples, in_features)``, finite.
            labels: ``(num_samples,)`` int64, each 0 to ``num_classes - 1``.

        Raises:
            ValueError: If a shape or a value is not one of the above.
        """
        if embeddings.shape != self.embeddings.shape:
            raise ValueError(
                f"embeddings must have shape {tuple(self.embeddings.shape)}, got {tuple(embeddings.shape)}"
            )
        if not embeddings.isfinite().all():
            row = int((~embeddings.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"embeddings must be finite, but row {row} is not; check the model that made them")
        if labels.shape != self.labels.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 of shape {tuple(self.labels.shape)}, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"labels must be 0 to {self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        self.embeddings.copy_(normalize(embeddings.to(self.embeddings.dtype), dim=1))
        self.labels.copy_(labels)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)``."""
        if self.labels.device.type == "cpu" and self.labels[0] < 0:
            raise ValueError("KNNHead has no training samples; give them to remember(embeddings, labels) first")
        with torch.autocast(embeddings.device.type, enabled=False):
            exact = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            similarity = normalize(exact, dim=1) @ self.embeddings.to(exact.dtype).T
        nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, : self.neighbors]
        member = (self.labels[:, None] == torch.arange(self.num_classes, device=self.labels.device)).to(exact.dtype)
        share = normalize((member / member.sum(0).clamp(min=1))[nearest].sum(1), p=1, dim=1)
        return ((self.neighbors * share + 1 / self.num_classes) / (self.neighbors + 1)).log()
