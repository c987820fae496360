"""The forms in which weights for AST are published, and how each becomes AST's own state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.models.weights import Converted

__all__ = ["convert", "fit_positions"]

Grid = tuple[int, int]

#: Patches of AudioSet's 128 mel bins and 1024 frames.
_AUDIOSET: Grid = (12, 101)
_SIZES = {192: "tiny", 384: "small", 768: "base"}
#: Classifiers of ImageNet and AudioSet, by the names of the released code.
_UNUSED = ("v.head.", "v.head_dist.", "mlp_head.")


class _Layout(NamedTuple):
    """One form of file: its names become those of the released code by these replacements, one after the other."""

    text: str
    renames: tuple[tuple[str, str], ...]
    grid: Grid | None = None  #: of the position table, where it is to be fitted to the model's
    image: bool = False  #: a model of square images in colour


_LAYOUTS = (
    _Layout("a state dict of AST", ()),
    _Layout("the released AudioSet file", ((r"^module\.", ""),), _AUDIOSET),
    _Layout(
        "the AudioSet file of Hugging Face",
        (
            (r"^audio_spectrogram_transformer\.", "v."),
            (r"^v\.embeddings\.", "v."),
            (r"^v\.distillation_token", "v.dist_token"),
            (r"^v\.position_embeddings", "v.pos_embed"),
            (r"^v\.patch_embeddings\.projection", "v.patch_embed.proj"),
            (r"^v\.encoder\.layer\.", "v.blocks."),
            (r"^v\.layernorm\.", "v.norm."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.attention\.", ".attn."),
            (r"\.attention\.output\.dense\.", ".attn.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"^classifier\.layernorm\.", "mlp_head.0."),
            (r"^classifier\.dense\.", "mlp_head.1."),
        ),
        _AUDIOSET,
    ),
    _Layout(
        "a checkpoint of the released Patch-Mix code",
        (
            (r"^model\.(module\.)?", ""),
            (r"^classifier\.(module\.)?0\.", "head.norm."),
            (r"^classifier\.(module\.)?1\.", "head.linear."),
        ),
    ),
    _Layout("a DeiT of ImageNet", ((r"^(model\.)?", "v."),), image=True),
)


def convert(tensors: Mapping[str, Tensor], grid: Grid, pos_embed_mode: str) -> Converted:
    """Return the tensors of a file under AST's names, its positions and patches made for AST's grid.

    Args:
        tensors: All tensors of the file.
        grid: Patches of the model along (frequency, time).
        pos_embed_mode: ``"correct"`` or ``"reference"``, see :class:`respiro.models.AST`. Positions that were trained
            for a grid of their own (a state dict of AST, a checkpoint of Patch-Mix) are taken as they are.
    """
    weights = [name for name in tensors if not name.startswith("optimizer.")]
    for layout in _LAYOUTS:
        names = {_rename(name, layout): name for name in weights}
        if "v.cls_token" in names:
            break
    else:
        return Converted(dict(tensors))
    known = (*_UNUSED, "head.")
    encoder = {name: tensors[file_name] for name, file_name in names.items() if not name.startswith(known)}
    _join_attention(encoder)
    if "v.pos_embed" in encoder:
        source = _square(encoder["v.pos_embed"]) if layout.image else layout.grid
        target = grid if pos_embed_mode == "correct" else grid[::-1]
        encoder["v.pos_embed"] = fit_positions(encoder["v.pos_embed"], source, target)
    if layout.image and "v.patch_embed.proj.weight" in encoder:
        encoder["v.patch_embed.proj.weight"] = _sum_colours(encoder["v.patch_embed.proj.weight"])
    width = encoder["v.cls_token"].shape[-1:].numel()
    return Converted(
        encoder,
        head={name.removeprefix("head."): names[name] for name in names if name.startswith("head.")},
        unused=[names[name] for name in names if name.startswith(_UNUSED)],
        looks_like=f"{layout.text}, size {_SIZES.get(width, 'unknown')} ({width} features)",
    )


def fit_positions(table: Tensor, source: Grid | None, target: Grid) -> Tensor:
    """Fit the positions of a grid of patches to another: cut out the middle, or stretch where the other is larger.

    Time comes first, then frequency; the positions of the two class tokens stay. Stretching is bilinear, without
    aligned corners.

    Args:
        table: ``(1, 2 + source[0] * source[1], D)``; one of another size is returned as it is.
        source: Rows and columns of the table.
        target: Rows and columns to be.

    Returns:
        ``(1, 2 + target[0] * target[1], D)``, float32.

    Source:
        Gong et al., Interspeech 2021, section 2.2, and their released code, which stretches AudioSet's columns and cuts
        ImageNet's where the number stays the same: either leaves them as they are.
    """
    if source is None or table.ndim != 3 or table.shape[:2] != (1, 2 + math.prod(source)) or not table.numel():
        return table
    classes, patches = table[:, :2].float(), table[:, 2:].float()
    image = patches.transpose(1, 2).reshape(1, -1, *source)
    for dim in (3, 2):
        image = _fit(image, dim, target[dim - 2])
    return torch.cat([classes, image.flatten(2).transpose(1, 2)], dim=1)


def _fit(image: Tensor, dim: int, size: int) -> Tensor:
    """Cut the middle out of one axis of an image ``(B, D, rows, columns)``, or stretch it."""
    if size <= image.shape[dim]:
        return image.narrow(dim, image.shape[dim] // 2 - size // 2, size)
    shape = [size if axis == dim else image.shape[axis] for axis in (2, 3)]
    return F.interpolate(image, size=shape, mode="bilinear", align_corners=False)


def _rename(name: str, layout: _Layout) -> str:
    for pattern, replacement in layout.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _join_attention(encoder: dict[str, Tensor]) -> None:
    """Stack the query, key and value layers of Hugging Face to the one layer they are in the released code."""
    for query in [name for name in encoder if ".attn.query." in name]:
        parts = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        rows = [encoder[part] for part in parts if part in encoder]
        if len(rows) == 3 and rows[0].ndim and len({part.shape for part in rows}) == 1:
            encoder[query.replace(".query.", ".qkv.")] = torch.cat([encoder.pop(part) for part in parts])


def _sum_colours(weight: Tensor) -> Tensor:
    """Make a convolution on colours ``(D, 3, 16, 16)`` one on a single channel, which answers to grey as before."""
    return weight.float().sum(dim=1, keepdim=True) if weight.ndim == 4 else weight


def _square(table: Tensor) -> Grid | None:
    side = math.isqrt(max(0, table.shape[1] - 2)) if table.ndim == 3 else 0
    return (side, side) if side else None
