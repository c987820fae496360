"""Classification heads: embeddings ``(B, D)`` to logits ``(B, C)``."""

from __future__ import annotations

from torch import Tensor, nn

from respiro.component import Component

__all__ = ["LinearHead"]


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
