"""PANNs: CNN6, CNN10 and CNN14 (Kong et al., 2020), without their front end and classifier.

Parameters bear the names of the released AudioSet checkpoints (``conv_block1.conv1.weight``, ``conv_block1.bn1.*``).
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from respiro.component import Backbone

__all__ = ["CNN6", "CNN10", "CNN14"]

Orientation = Literal["freq_first", "time_first"]


class ConvBlock(nn.Module):
    """Convolutions without bias, each followed by batch norm and ReLU; then average pooling.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of each convolution.
        kernel_size: Side of the kernels; odd, the size of the map is kept.
        convolutions: Number of convolutions, 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, convolutions: int) -> None:
        super().__init__()
        self.convolutions = convolutions
        for index in range(1, convolutions + 1):
            conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
            nn.init.xavier_uniform_(conv.weight)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(out_channels))
            in_channels = out_channels

    def forward(self, x: Tensor, pool: int = 2) -> Tensor:
        """Return the map ``(B, out_channels, H // pool, W // pool)``."""
        for index in range(1, self.convolutions + 1):
            x = F.relu_(getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x)))
        return F.avg_pool2d(x, pool) if pool > 1 else x


def pool_map(x: Tensor) -> Tensor:
    """Return mean over the last axis, then maximum plus mean over the one before: ``(B, C, H, W)`` to ``(B, C)``."""
    x = x.mean(3)
    return x.amax(2) + x.mean(2)


class _PANN(Backbone):
    """Stack of :class:`ConvBlock` s and the pooling that turns a map into an embedding."""

    widths: ClassVar[tuple[int, ...]]
    pools: ClassVar[tuple[int, ...]]
    kernel_size: ClassVar[int]
    convolutions: ClassVar[int]

    def __init__(self, orientation: Orientation = "freq_first", dropout: float = 0.0) -> None:
        super().__init__()
        if orientation not in get_args(Orientation):
            raise ValueError(f"orientation must be 'freq_first' or 'time_first', got {orientation!r}")
        self.orientation = orientation
        self.num_features = self.widths[-1]
        self.dropout = nn.Dropout(dropout)
        for number, (inputs, outputs) in enumerate(zip((1, *self.widths), self.widths, strict=False), start=1):
            self.add_module(f"conv_block{number}", ConvBlock(inputs, outputs, self.kernel_size, self.convolutions))

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings ``(B, num_features)``."""
        x = self._image(features)
        for number, pool in enumerate(self.pools, start=1):
            x = self.dropout(getattr(self, f"conv_block{number}")(x, pool))
        return pool_map(x)

    def _image(self, features: Tensor) -> Tensor:
        if features.ndim != 3:
            raise ValueError(f"features must have shape (B, T, F), got {tuple(features.shape)}")
        smallest = 2 ** sum(pool > 1 for pool in self.pools)
        if min(features.shape[1:]) < smallest:
            raise ValueError(
                f"features have {features.shape[1]} frames of {features.shape[2]} bins, but {type(self).__name__} "
                f"needs at least {smallest} of each; use longer clips, a shorter hop or more mel bins"
            )
        return (features.transpose(1, 2) if self.orientation == "freq_first" else features).unsqueeze(1)


class CNN6(_PANN):
    """CNN6 of the PANNs: four blocks of one 5×5 convolution (4.3 million parameters).

    The embedding is the mean over one axis of the last map, then the maximum plus the mean over the other.

    Args:
        orientation: ``"freq_first"`` sees images ``(F, T)``, averages over time and then pools over frequency, as all
            released ICBHI code of Moummad and Farrugia (2022) does. ``"time_first"`` sees images ``(T, F)``, averages
            over frequency and then pools over time, as PANNs does; AudioSet kernels then lie as they were trained.
        dropout: Share of the values dropped after each block in training; PANNs used 0.2.

    Shape:
        features ``(B, T, F)``, T and F at least 16; returns embeddings ``(B, 512)``.

    Raises:
        ValueError: If *orientation* is unknown, or the features are too small for the pooling.

    Source:
        Kong et al., "PANNs: large-scale pretrained audio neural networks for audio pattern recognition", IEEE/ACM
        TASLP 28, 2020.

    Example:
        >>> import torch
        >>> CNN6().eval()(torch.zeros(2, 32, 64)).shape
        torch.Size([2, 512])
    """

    widths = (64, 128, 256, 512)
    pools = (2, 2, 2, 2)
    kernel_size = 5
    convolutions = 1


class CNN10(_PANN):
    """CNN10 of the PANNs: four blocks of two 3×3 convolutions (4.7 million parameters).

    Args:
        orientation: As in :class:`CNN6`.
        dropout: As in :class:`CNN6`.

    Shape:
        features ``(B, T, F)``, T and F at least 16; returns embeddings ``(B, 512)``.
    """

    widths = (64, 128, 256, 512)
    pools = (2, 2, 2, 2)
    kernel_size = 3
    convolutions = 2


class CNN14(_PANN):
    """CNN14 of the PANNs: six blocks of two 3×3 convolutions (75.5 million parameters).

    Args:
        orientation: As in :class:`CNN6`.
        dropout: As in :class:`CNN6`.

    Shape:
        features ``(B, T, F)``, T and F at least 32; returns embeddings ``(B, 2048)``.
    """

    widths = (64, 128, 256, 512, 1024, 2048)
    pools = (2, 2, 2, 2, 2, 1)
    kernel_size = 3
    convolutions = 2
