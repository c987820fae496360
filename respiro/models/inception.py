"""Inception-residual network with attention over time and frequency: one branch of the system of Ngo, Pham et al."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from respiro.component import Backbone

__all__ = ["InceptionResidual"]


class InceptionResidual(Backbone):
    """Inception blocks with shortcuts, then attention over frequencies and over moments (3.7 million parameters).

    A reconstruction: the paper names the parts, the numbers are ours. Batch norm, then a block for each width: four
    branches (1×1; 1×1, 3×3; 1×1, 1×5, 5×1; 3×3 maximum, 1×1), side by side, then a 1×1 convolution, plus a 1×1
    shortcut; each block is followed by ReLU, 2×2 maximum pooling and dropout of whole maps. Of the last map the mean
    over time gives a token for each frequency, the mean over frequency one for each moment. Self-attention goes over
    either kind; their mean plus their maximum go through a linear layer with batch norm, ReLU and dropout. Nothing
    depends on the size of the spectrogram.

    Args:
        widths: Channels of the blocks, each divisible by 4, the last one by *num_heads*.
        num_features: Size of the embedding.
        num_heads: Heads of each self-attention.
        dropout: Share of the maps that are dropped after each block in training, one number for each.
        embedding_dropout: Share of the embedding that is dropped in training.

    Shape:
        features ``(B, T, F)``, T and F at least ``2 ** len(widths)``; returns embeddings ``(B, num_features)``, none
        negative. A training batch needs two samples, for the batch norm of the embeddings.

    Raises:
        ValueError: If a number does not fit, or the features are too small for the pooling.

    Source:
        Ngo, Pham et al., arXiv 2303.04104, as a reconstruction: the widths, kernels, heads and rates are not in it.

    Example:
        >>> InceptionResidual().eval()(torch.zeros(2, 154, 124)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        num_features: int = 512,
        num_heads: int = 8,
        dropout: Sequence[float] = (0.10, 0.15, 0.20, 0.25),
        embedding_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        _check(widths, num_heads, dropout)
        self.num_features = num_features
        self.norm = nn.BatchNorm2d(1)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(InceptionBlock(inputs, outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(p))
                for inputs, outputs, p in zip((1, *widths), widths, dropout, strict=False)
            )
        )
        self.over_frequency = TokenAttention(widths[-1], num_heads)
        self.over_time = TokenAttention(widths[-1], num_heads)
        self.embedding = nn.Sequential(
            nn.Linear(2 * widths[-1], num_features),
            nn.BatchNorm1d(num_features),
            nn.ReLU(),
            nn.Dropout(embedding_dropout),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings ``(B, num_features)``."""
        x = self.blocks(self.norm(self._image(features)))
        over_frequency = self.over_frequency(x.mean(3).transpose(1, 2))
        over_time = self.over_time(x.mean(2).transpose(1, 2))
        embeddings: Tensor = self.embedding(torch.cat([over_frequency, over_time], dim=1))
        return embeddings

    def _image(self, features: Tensor) -> Tensor:
        if features.ndim != 3:
            raise ValueError(f"features must have shape (B, T, F), got {tuple(features.shape)}")
        smallest = 2 ** len(self.blocks)
        if min(features.shape[1:]) < smallest:
            raise ValueError(
                f"features have {features.shape[1]} frames of {features.shape[2]} bins, but InceptionResidual with "
                f"{len(self.blocks)} blocks needs at least {smallest} of each; use longer clips, a shorter hop, more "
                f"bins or fewer widths"
            )
        return features.transpose(1, 2).unsqueeze(1)


class InceptionBlock(nn.Module):
    """Four branches of a quarter of the channels each, joined by a 1×1 convolution, plus a 1×1 shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; divisible by 4.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        # The first convolutions of three branches take the same input: one of three times the width does for all.
        self.reduce = _conv(in_channels, 3 * quarter, (1, 1))
        self.square = _conv(quarter, quarter, (3, 3))
        self.cross = nn.Sequential(_conv(quarter, quarter, (1, 5)), _conv(quarter, quarter, (5, 1)))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(in_channels, quarter, (1, 1)))
        self.join = _conv(out_channels, out_channels, (1, 1), relu=False)
        self.shortcut = _conv(in_channels, out_channels, (1, 1), relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map ``(B, out_channels, H, W)`` of ``(B, in_channels, H, W)``, before its ReLU."""
        point, square, cross = self.reduce(x).chunk(3, dim=1)
        joined = torch.cat([point, self.square(square), self.cross(cross), self.pool(x)], dim=1)
        output: Tensor = self.join(joined) + self.shortcut(x)
        return output


class TokenAttention(nn.Module):
    """Self-attention with a shortcut and layer norm, then mean plus maximum over the tokens.

    Args:
        channels: Size of a token.
        num_heads: Number of heads; divides *channels*.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one vector ``(B, C)`` for tokens ``(B, N, C)``."""
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.norm(tokens + attended)
        return tokens.mean(1) + tokens.amax(1)


def _conv(in_channels: int, out_channels: int, kernel: tuple[int, int], relu: bool = True) -> nn.Sequential:
    """Return a convolution that keeps the size, with batch norm, and ReLU if asked for."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    layers = [nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


def _check(widths: Sequence[int], num_heads: int, dropout: Sequence[float]) -> None:
    if not widths or any(width < 4 or width % 4 for width in widths):
        raise ValueError(f"widths must be divisible by 4, got {tuple(widths)!r}")
    if num_heads < 1 or widths[-1] % num_heads:
        raise ValueError(f"num_heads must divide the last width, {widths[-1]}, got {num_heads!r}")
    if len(dropout) != len(widths):
        raise ValueError(f"dropout must have a number for each of {len(widths)} widths, got {tuple(dropout)!r}")
