"""Several spectrograms of one sound, each through a branch of its own, joined into one embedding."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from respiro.component import Backbone, unit
from respiro.errors import check_choice

__all__ = ["SpectrogramFusion"]

Combination = Literal["linear", "concat", "mean", "learned", "gated", "product"]


class SpectrogramFusion(Backbone):
    """Branches side by side, each on the bins of its own front end, and what joins their embeddings.

    The front ends stand side by side in :class:`respiro.transforms.StackedFeatures`, so that augmentation, mixing and
    caches meet one spectrogram; this takes it apart again.

    With embeddings ``e_i`` of ``n`` branches, and a linear head ``V z + c`` on the result ``z``:

    ============= ==========================================================================================
    combination   z
    ============= ==========================================================================================
    ``"linear"``  ``ReLU(1/n Σ W_i e_i / |e_i| + b)``: equal weight and length, so that no branch outweighs
    ``"learned"`` the same with weights ``softmax(a)`` that are trained in the place of ``1/n``
    ``"gated"``   the same with weights ``softmax(G [e_1/|e_1|, …] + g)`` for each sample
    ``"concat"``  ``ReLU(W [e_1, …, e_n] + b)``, lengths and all
    ``"mean"``    ``[e_1, …, e_n] / n``: the head's logits are the mean of a head's on each branch
    ``"product"`` ``[e_1, …, e_n]``: the head's logits are the sum, so the scores are the product of the scores of a
                  head on each branch, scaled to sum to 1
    ============= ==========================================================================================

    Args:
        branches: Encoder of each front end's features ``(B, T, F_i)``.
        bins: Bins ``F_i`` of each front end, in their order: ``StackedFeatures(...).bins``.
        combination: How the embeddings become one.
        num_features: Size of the result; with ``"mean"`` and ``"product"`` it is that of all embeddings together.

    Shape:
        features ``(B, T, sum(bins))``; returns embeddings ``(B, num_features)``. An embedding of zeros stays zero.

    Raises:
        ValueError: If the combination is unknown, there is no branch, or not one number of bins for each; when called,
            if the features have other bins.
        TypeError: If *branches* or *bins* is no list, or a branch has no ``num_features``.

    Source:
        Ngo, Pham et al., arXiv 2303.04104, whose second version joins its branches linearly while training instead of
        concatenating them; the equations are a reconstruction.

    Example:
        >>> from respiro.models import CNN6, InceptionResidual
        >>> fusion = SpectrogramFusion([InceptionResidual(), CNN6()], bins=[124, 64]).eval()
        >>> fusion(torch.zeros(2, 154, 124 + 64)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        branches: list[Backbone],
        bins: list[int],
        combination: Combination = "linear",
        num_features: int = 512,
    ) -> None:
        super().__init__()
        check_choice("combination", combination, get_args(Combination))
        for name, value in (("branches", branches), ("bins", bins)):
            if not isinstance(value, list | tuple | nn.ModuleList):
                raise TypeError(f"{name} must be a list with an entry for each branch, got {type(value).__name__}")
        if not branches or len(bins) != len(branches) or any(count < 1 for count in bins):
            raise ValueError(f"bins must have a positive number for each of {len(branches)} branches, got {bins!r}")
        self.branches = nn.ModuleList(branches)
        self.bins = list(bins)
        self.combination = combination
        self.sizes = [_size(branch) for branch in branches]
        if combination in ("mean", "product"):
            self.num_features = sum(self.sizes)
            return
        self.num_features = num_features
        # One bias for all, where there are several projections.
        self.bias = nn.Parameter(torch.zeros(num_features))
        inputs = [sum(self.sizes)] if combination == "concat" else self.sizes
        self.projections = nn.ModuleList(_projection(size, num_features, combination != "concat") for size in inputs)
        if combination == "learned":
            self.balance = nn.Parameter(torch.zeros(len(branches)))
        if combination == "gated":
            self.gate = nn.Linear(sum(self.sizes), len(branches))

    def forward(self, features: Tensor) -> Tensor:
        """Return the joined embeddings ``(B, num_features)``."""
        return self.combine(self.embed_branches(features))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each branch, which all ways through the model share, with ``torch.compile``."""
        for branch in self.branches:
            branch.compile(*args, **kwargs)

    def embed_branches(self, features: Tensor) -> list[Tensor]:
        """Return the embedding ``(B, D_i)`` of each branch."""
        if features.ndim != 3 or features.shape[2] != sum(self.bins):
            raise ValueError(
                f"features must have shape (B, T, {sum(self.bins)}), {self.bins} bins for each branch, got "
                f"{tuple(features.shape)}; give StackedFeatures the front ends of these branches, in their order"
            )
        parts = torch.split(features, self.bins, dim=2)
        return [branch(part) for branch, part in zip(self.branches, parts, strict=True)]

    def combine(self, embeddings: list[Tensor]) -> Tensor:
        """Join the embeddings of the branches, each ``(B, D_i)``, into one ``(B, num_features)``."""
        if self.combination == "product":
            return torch.cat(embeddings, dim=1)
        if self.combination == "mean":
            return torch.cat(embeddings, dim=1) / len(embeddings)
        if self.combination == "concat":
            return torch.relu(self.projections[0](torch.cat(embeddings, dim=1)) + self.bias)
        directions = [unit(embedding).to(embedding.dtype) for embedding in embeddings]
        projected = torch.stack([W(e) for W, e in zip(self.projections, directions, strict=True)], dim=2)
        joined = (projected * self._weights(directions)).sum(2)
        return torch.relu(joined + self.bias)

    def _weights(self, directions: list[Tensor]) -> Tensor:
        """Return the weight of each branch, for the batch ``(n,)`` or for each sample ``(B, 1, n)``."""
        if self.combination == "learned":
            return self.balance.softmax(0)
        if self.combination == "gated":
            gates: Tensor = self.gate(torch.cat(directions, dim=1)).softmax(1)
            return gates.unsqueeze(1)
        count = len(directions)
        return directions[0].new_full((count,), 1 / count)


def _projection(in_features: int, out_features: int, of_unit_vectors: bool) -> nn.Linear:
    projection = nn.Linear(in_features, out_features, bias=False)
    if of_unit_vectors:  # of which torch's default weights would leave next to nothing
        nn.init.uniform_(projection.weight, -1.0, 1.0)
    return projection


def _size(branch: Any) -> int:
    if not hasattr(branch, "num_features"):
        raise TypeError(f"{type(branch).__name__} has no num_features, the size of its embedding; give it that one")
    return int(branch.num_features)
