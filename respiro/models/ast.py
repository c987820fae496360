"""The Audio Spectrogram Transformer (Gong et al., 2021) on timm's distilled DeiT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from respiro.component import TokenBackbone
from respiro.errors import check_choice
from respiro.models import _ast_weights
from respiro.models.weights import Converted

__all__ = ["AST"]

Size = Literal["tiny224", "small224", "base224", "base384"]
PosEmbedMode = Literal["correct", "reference"]

_PATCH = 16


class AST(TokenBackbone):
    """Vision transformer on overlapping patches of a spectrogram; the embedding is that of its two class tokens.

    A 16×16 convolution cuts the spectrogram ``(F, T)`` into patches; class and distillation token are put before them,
    a learnt position is added to each, and after the transformer the mean of the two tokens is the embedding. Weights
    are random; :func:`respiro.models.load_weights` fills them from AudioSet or ImageNet. Parameters bear the names of
    the released checkpoints (``v.blocks.0.attn.qkv.weight``).

    Args:
        size: Width and depth, and the ImageNet model it can start from: ``"base384"`` (86 million parameters, as
            published), ``"base224"``, ``"small224"`` (22 million) or ``"tiny224"`` (5.5 million).
        num_mel_bins: Mel bins F of the features.
        frames: Frames T of the features; 798 is 8 s of :class:`respiro.transforms.KaldiFbank`, 498 is 5 s.
        stride: Step from patch to patch, one number or (bins, frames); less than 16 makes patches overlap.
        pos_embed_mode: How pretrained position tables are fitted to the grid. ``"correct"``: to (frequency, time).
            ``"reference"``: to the transposed grid, as the released Patch-Mix code does, though its tokens are ordered
            as in ``"correct"``; for comparison with its scores. Its checkpoints hold fitted positions already, which
            are loaded as they are in either mode.

    Shape:
        features ``(B, T, F)``; returns embeddings ``(B, num_features)``, 768 of base, 384 of small, 192 of tiny.

    Attributes:
        grid: Patches along (frequency, time); token ``f * grid[1] + t`` is patch ``(f, t)``.

    Raises:
        ValueError: If an option is unknown, the spectrogram is smaller than one patch, or features have another size
            than the model was built for.

    Source:
        Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021; Bae et al., "Patch-Mix contrastive
        learning with Audio Spectrogram Transformer on respiratory sound classification", Interspeech 2023.

    Example:
        >>> ast = AST("tiny224", num_mel_bins=64, frames=98, stride=16).eval()
        >>> ast.grid, ast(torch.zeros(2, 98, 64)).shape
        ((4, 6), torch.Size([2, 192]))
    """

    def __init__(
        self,
        size: Size = "base384",
        num_mel_bins: int = 128,
        frames: int = 798,
        stride: int | Sequence[int] = 10,
        pos_embed_mode: PosEmbedMode = "correct",
    ) -> None:
        super().__init__()
        check_choice("size", size, get_args(Size))
        check_choice("pos_embed_mode", pos_embed_mode, get_args(PosEmbedMode))
        steps = tuple(stride) if isinstance(stride, Sequence) else (stride, stride)
        if len(steps) != 2 or not all(isinstance(step, int) and step >= 1 for step in steps):
            raise ValueError(f"stride must be one or two whole numbers of at least 1, got {stride!r}")
        if min(num_mel_bins, frames) < _PATCH:
            raise ValueError(
                f"a spectrogram of {num_mel_bins} mel bins and {frames} frames is smaller than one patch of "
                f"{_PATCH} by {_PATCH}; use more mel bins or longer clips"
            )
        import timm

        self.size = size
        self.num_mel_bins = num_mel_bins
        self.frames = frames
        self.pos_embed_mode = pos_embed_mode
        self.grid = (1 + (num_mel_bins - _PATCH) // steps[0], 1 + (frames - _PATCH) // steps[1])
        base, pixels = size[:-3], size[-3:]
        # Its own positions and patches are those of a square image and of three colours; ours take their place.
        v: Any = timm.create_model(f"deit_{base}_distilled_patch16_{pixels}", pretrained=False, num_classes=0)
        self.num_features = int(v.embed_dim)
        v.patch_embed.proj = nn.Conv2d(1, self.num_features, _PATCH, steps)
        v.pos_embed = nn.Parameter(torch.empty(1, 2 + math.prod(self.grid), self.num_features))
        nn.init.trunc_normal_(v.pos_embed, std=0.02)
        self.v = v

    def embed_patches(self, features: Tensor) -> Tensor:
        """Return the patch embeddings ``(B, grid[0] * grid[1], num_features)``, without positions or class tokens."""
        if features.ndim != 3 or tuple(features.shape[1:]) != (self.frames, self.num_mel_bins):
            raise ValueError(
                f"features must have shape (B, {self.frames}, {self.num_mel_bins}), got {tuple(features.shape)}. "
                f"AST takes features=KaldiFbank(num_mel_bins={self.num_mel_bins}), which gives 100 * seconds - 2 "
                f"frames; build it with AST(frames=...) for another duration of the clips"
            )
        patches: Tensor = self.v.patch_embed.proj(features.transpose(1, 2).unsqueeze(1))
        return patches.flatten(2).transpose(1, 2)

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings ``(B, num_features)`` of patch embeddings, mixed or not."""
        v = self.v
        classes = torch.cat([v.cls_token, v.dist_token], dim=1).expand(len(tokens), -1, -1)
        x: Tensor = v.pos_drop(torch.cat([classes, tokens], dim=1) + v.pos_embed)
        return v.norm(v.blocks(x))[:, :2].mean(1)  # type: ignore[no-any-return]  # timm is untyped

    def convert_weights(self, tensors: Mapping[str, Tensor]) -> Converted:
        """Return the tensors of a published file as this model holds them, for :func:`respiro.models.load_weights`."""
        return _ast_weights.convert(tensors, self.grid, self.pos_embed_mode)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the transformer blocks, which all ways through the model share, with ``torch.compile``."""
        self.v.blocks.compile(*args, **kwargs)
