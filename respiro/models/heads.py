"""Heads on embeddings ``(B, D)``: to logits ``(B, C)``, or into the space where a contrastive loss compares."""

from __future__ import annotations

from torch import Tensor, nn

from respiro.component import Component

__all__ = ["LinearHead", "Projector"]


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


class Projector(Component):
    """Linear, batch norm, ReLU, linear: embeddings into the space where a contrastive loss compares them.

    It is used in training alone. Batch norm needs at least two samples while training.

    Args:
        in_features: Size of the embedding.
        hidden_features: Size between the two linear layers; *in_features* by default.
        out_features: Size of the projection; *in_features* by default.

    Shape:
        embeddings ``(B, in_features)``; returns projections ``(B, out_features)``.

    Source:
        Bae et al., Interspeech 2023, section 2.3.

    Example:
        >>> import torch
        >>> Projector(768)(torch.zeros(2, 768)).shape
        torch.Size([2, 768])
    """

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        self.in_features = in_features
        self.num_features = in_features if out_features is None else out_features
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, self.num_features)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the projections ``(B, out_features)``."""
        projections: Tensor = self.layers(embeddings)
        return projections
