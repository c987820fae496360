"""PANNs: CNN6, CNN10 and CNN14 (Kong et al., 2020), without their front end and classifier.

Parameters bear the names of the released AudioSet checkpoints (``conv_block1.conv1.weight``, ``conv_block1.bn1.*``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from respiro.component import Backbone
from respiro.models import _panns_weights
from respiro.models.weights import Converted

__all__ = ["CNN6", "CNN10", "CNN14"]

Orientation = Literal["freq_first", "time_first"]

#: Mel bins of PANNs' features, each of which its first batch norm scales.
_MEL_BINS = 64


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

    def __init__(self, orientation: Orientation = "freq_first", dropout: float = 0.0, bn0: bool = False) -> None:
        super().__init__()
        if orientation not in get_args(Orientation):
            raise ValueError(f"orientation must be 'freq_first' or 'time_first', got {orientation!r}")
        self.orientation = orientation
        self.num_features = self.widths[-1]
        self.dropout = nn.Dropout(dropout)
        self.bn0 = nn.BatchNorm1d(_MEL_BINS) if bn0 else None
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
        x = features.transpose(1, 2)
        if self.bn0 is not None:
            if x.shape[1] != _MEL_BINS:
                raise ValueError(
                    f"features must have the {_MEL_BINS} mel bins that bn0 scales, got {x.shape[1]}; "
                    f"use {_MEL_BINS} mel bins, or bn0=False"
                )
            x = self.bn0(x)
        return (x if self.orientation == "freq_first" else x.transpose(1, 2)).unsqueeze(1)

    def convert_weights(self, tensors: Mapping[str, Tensor]) -> Converted:
        """Return the tensors of a file as this model holds them, for :func:`respiro.models.load_weights`."""
        return _panns_weights.convert(tensors, bn0=self.bn0 is not None)


class CNN6(_PANN):
    """CNN6 of the PANNs: four blocks of one 5×5 convolution (4.3 million parameters).

    The embedding is the mean over one axis of the last map, then the maximum plus the mean over the other. Weights are
    random; :func:`respiro.models.load_weights` fills them from AudioSet, from a state dict, or from a checkpoint of the
    released code of Moummad and Farrugia (2022).

    Args:
        orientation: ``"freq_first"`` sees images ``(F, T)``, averages over time and then pools over frequency, as all
            released ICBHI code of Moummad and Farrugia (2022) does; AudioSet kernels are loaded as they are, and so lie
            transposed. ``"time_first"`` sees images ``(T, F)``, averages over frequency and then pools over time, as
            PANNs does; AudioSet kernels then lie as they were trained.
        dropout: Share of the values dropped after each block in training; PANNs used 0.2.
        bn0: Whether each of 64 mel bins passes PANNs' first batch norm before the blocks. PANNs were trained with it on
            log-mel spectrograms in dB, not standardised; the code of Moummad and Farrugia leaves it out.

    Shape:
        features ``(B, T, F)``, T and F at least 16, F 64 with *bn0*; returns embeddings ``(B, 512)``.

    Raises:
        ValueError: If *orientation* is unknown, the features are too small for the pooling, or have other than 64 mel
            bins with *bn0*.

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
        bn0: As in :class:`CNN6`.

    Shape:
        features ``(B, T, F)``, T and F at least 16, F 64 with *bn0*; returns embeddings ``(B, 512)``.
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
        bn0: As in :class:`CNN6`.

    Shape:
        features ``(B, T, F)``, T and F at least 32, F 64 with *bn0*; returns embeddings ``(B, 2048)``.
    """

    widths = (64, 128, 256, 512, 1024, 2048)
    pools = (2, 2, 2, 2, 2, 1)
    kernel_size = 3
    convolutions = 2
