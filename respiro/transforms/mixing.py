"""Mixing: every sample of a batch gets parts of another, and the share that it keeps is told to the loss.

Call it in training steps only: unlike augmentation it mixes in eval mode too, because what comes out no longer belongs
to one label. What is random is drawn on the CPU and then moved, so that a seed gives the same draw on every device and
nothing waits for a GPU. Partners are a permutation of the batch, in which a sample may be its own partner; under
distributed training each process mixes within its own part of the batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from respiro.component import Mixed, Transform, check_partners
from respiro.errors import check_choice
from respiro.transforms._checks import check_floating

__all__ = ["CutMix", "Mixup", "PatchMix", "patch_mix"]

Mode = Literal["patch", "time", "freq", "block"]


def patch_mix(tokens: Tensor, index: Tensor, mask: Tensor) -> Mixed:
    """Replace the masked tokens of each sample by those of its partner, at the same places.

    The share of its own that a sample keeps is counted from the mask.

    Args:
        tokens: ``(B, N, D)``, floating point; stays as it is.
        index: Partner of each sample ``(B,)``, int64.
        mask: True = taken from the partner, bool; ``(N,)`` for the whole batch or ``(B, N)``, one per sample.

    Returns:
        The mixed tokens ``(B, N, D)``, the partners ``(B,)`` and the share kept, float32 ``()`` or ``(B,)``; all on the
        device of the tokens.

    Raises:
        ValueError: If a shape or type does not fit, or a partner is not in the batch.

    Source:
        Bae et al., "Patch-Mix contrastive learning with Audio Spectrogram Transformer on respiratory sound
        classification", Interspeech 2023.

    Example:
        >>> tokens = torch.tensor([[[1.0], [2.0], [3.0]], [[10.0], [20.0], [30.0]]])
        >>> mixed = patch_mix(tokens, torch.tensor([1, 0]), torch.tensor([True, False, False]))
        >>> mixed.x[..., 0]
        tensor([[10.,  2.,  3.],
                [ 1., 20., 30.]])
        >>> mixed.lam
        tensor(0.6667)
    """
    check_floating("tokens", "(B, N, D)", tokens)
    batch, count, _ = tokens.shape
    check_partners(index, batch)
    if mask.dtype != torch.bool or mask.shape not in ((count,), (batch, count)):
        raise ValueError(
            f"mask must be bool of shape ({count},) or ({batch}, {count}) for {batch} samples of {count} tokens, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    index, mask = (draw.to(tokens.device, non_blocking=True) for draw in (index, mask))
    own = (~mask).sum(-1, dtype=torch.float32) / count
    return Mixed(torch.where(mask.unsqueeze(-1), tokens[index], tokens), index, own)


class PatchMix(Transform):
    """Patch-Mix: replace some patches of each spectrogram by those of a partner, as tokens of a transformer.

    The share λ of its own that a sample is to keep is drawn from Beta(*beta*, *beta*); as many tokens as make up 1 - λ,
    rounded down to what *mode* can replace, come from the partner. The λ that is returned is the share really kept.

    Args:
        mode: What is replaced: ``"patch"`` random tokens; ``"time"`` random columns, so all frequencies of some
            moments; ``"freq"`` random rows; ``"block"`` one rectangle whose sides are sqrt(1 - λ) of the grid's, as in
            CutMix, around a random token and cut off at the edges, so that more than λ is kept on average.
        beta: Parameter of the Beta distribution; 1 is uniform, a smaller one keeps nearly all or nearly nothing.
        per_sample: Draw λ and the tokens anew for each sample. The paper draws them once per batch.

    Shape:
        tokens ``(B, N, D)`` with ``B >= 2``, grid ``(freq, time)`` with ``freq * time = N``; token ``f * time + t`` is
        row ``f``, column ``t``. Returns :class:`respiro.component.Mixed`: tokens ``(B, N, D)``, partners ``(B,)``,
        share kept ``()`` or, per sample, ``(B,)``.

    Raises:
        ValueError: If an argument has no meaning, the grid does not hold the tokens, or the batch has one sample.

    Source:
        Bae et al., "Patch-Mix contrastive learning with Audio Spectrogram Transformer on respiratory sound
        classification", Interspeech 2023; modes ``"patch"`` and ``"time"``.

    Example:
        >>> tokens = torch.zeros(8, 12 * 79, 768)
        >>> mixed = PatchMix("time", per_sample=True)(tokens, grid=(12, 79))
        >>> mixed.x.shape, mixed.index.shape, mixed.lam.shape
        (torch.Size([8, 948, 768]), torch.Size([8]), torch.Size([8]))
    """

    mixes = "tokens"

    def __init__(self, mode: Mode = "patch", beta: float = 1.0, per_sample: bool = False) -> None:
        super().__init__()
        check_choice("mode", mode, get_args(Mode))
        _check_beta(beta)
        self.mode: Mode = mode
        self.beta = beta
        self.per_sample = per_sample

    def forward(self, tokens: Tensor, grid: tuple[int, int], generator: torch.Generator | None = None) -> Mixed:
        """Return the mixed tokens, the partners and the share that was kept."""
        check_floating("tokens", "(B, N, D)", tokens)
        if len(grid) != 2 or grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"grid must be (freq, time) of {tokens.shape[1]} tokens in all, got {grid!r}")
        return patch_mix(tokens, *self.draw(len(tokens), grid, generator))

    def draw(
        self, batch: int, grid: tuple[int, int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw what :func:`patch_mix` takes: partners ``(batch,)`` and mask ``(N,)`` or ``(batch, N)``, on the CPU.

        Args:
            batch: Number of samples, at least two.
            grid: Tokens along frequency and along time.
            generator: On the CPU; ``None`` is torch's global one.

        Raises:
            ValueError: If there are fewer than two samples, or the grid is empty.
        """
        if min(grid) < 1:
            raise ValueError(
                f"grid must have a row and a column at least, got {grid!r}; pad clips shorter than a patch"
            )
        index, lam = _draw_partners(batch, self.beta, self.per_sample, generator)
        mask = _draw_mask(self.mode, 1 - lam, grid, generator).flatten(1)
        return index, mask if self.per_sample else mask[0]


class Mixup(Transform):
    """Mixup: each spectrogram becomes λ times itself plus 1 - λ times a partner, with λ from Beta(*beta*, *beta*).

    Args:
        beta: Parameter of the Beta distribution; 1 is uniform, a smaller one keeps nearly all or nearly nothing.
        per_sample: Draw λ for each sample instead of once per batch.
        p: Probability that a sample is mixed; the others stay as they are, and keep a share of 1.

    Shape:
        features ``(B, T, F)`` with ``B >= 2``. Returns :class:`respiro.component.Mixed`: features ``(B, T, F)``,
        partners ``(B,)``, share kept ``()`` or, per sample or with *p* below 1, ``(B,)``.

    Raises:
        ValueError: If *beta* is not positive, *p* does not lie in [0, 1], the features have another shape, or the batch
            has one sample.

    Source:
        Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018.

    Example:
        >>> features = torch.tensor([0.0, 1.0]).expand(4, 798, 2)
        >>> torch.equal(Mixup(beta=0.4)(features).x, features)  # a mean of equal values
        True
    """

    mixes = "features"

    def __init__(self, beta: float = 1.0, per_sample: bool = False, p: float = 1.0) -> None:
        super().__init__()
        _check_beta(beta)
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p!r}")
        self.beta = beta
        self.per_sample = per_sample
        self.p = p

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Mixed:
        """Return the mixed features, the partners and the share that was kept."""
        check_floating("features", "(B, T, F)", features)
        index, lam = _draw_partners(len(features), self.beta, self.per_sample, generator)
        if self.p < 1:
            chosen = torch.rand(len(features), generator=generator, dtype=torch.float32) < self.p
            lam = lam.where(chosen, 1.0)
        index, lam = (draw.to(features.device, non_blocking=True) for draw in (index, lam.float()))
        own = lam.view(-1, 1, 1)  # has dimensions, so that half-precision features are mixed in float32
        mixed = own * features + (1 - own) * features[index]
        return Mixed(mixed.to(features.dtype), index, lam if self.per_sample or self.p < 1 else lam[0])


class CutMix(Transform):
    """CutMix: a rectangle of each spectrogram is replaced by that of a partner.

    Its sides are sqrt(1 - λ) of the spectrogram's, with λ from Beta(*beta*, *beta*), around a random point and cut off
    at the edges, so that more than λ is kept on average. The λ that is returned is the share really kept.

    Args:
        beta: Parameter of the Beta distribution; 1 is uniform, a smaller one keeps nearly all or nearly nothing.
        per_sample: Draw λ and the rectangle for each sample instead of once per batch.

    Shape:
        features ``(B, T, F)`` with ``B >= 2``. Returns :class:`respiro.component.Mixed`: features ``(B, T, F)``,
        partners ``(B,)``, share kept ``()`` or, per sample, ``(B,)``.

    Raises:
        ValueError: If *beta* is not positive, the features have another shape, or the batch has one sample.

    Source:
        Yun et al., "CutMix: Regularization strategy to train strong classifiers with localizable features", ICCV 2019.

    Example:
        >>> mixed = CutMix()(torch.zeros(4, 798, 128))
        >>> mixed.x.shape, mixed.index.shape, mixed.lam.shape
        (torch.Size([4, 798, 128]), torch.Size([4]), torch.Size([]))
    """

    mixes = "features"

    def __init__(self, beta: float = 1.0, per_sample: bool = False) -> None:
        super().__init__()
        self._patch_mix = PatchMix("block", beta, per_sample)

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Mixed:
        """Return the mixed features, the partners and the share that was kept."""
        check_floating("features", "(B, T, F)", features)
        batch, frames, bins = features.shape
        # Each value is a patch of its own, in a grid of frames and bins.
        mixed = self._patch_mix(features.reshape(batch, frames * bins, 1), (frames, bins), generator)
        return Mixed(mixed.x.view(features.shape), mixed.index, mixed.lam)


def _draw_partners(
    batch: int, beta: float, per_sample: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return a permutation ``(B,)`` and the share to keep, float64 ``(B,)`` per sample, else ``(1,)``."""
    if batch < 2:
        raise ValueError(
            f"mixing needs at least two samples, got {batch}; give the datamodule drop_last=True or another batch_size"
        )
    # torch's own Beta distribution takes no generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    lam = np.random.default_rng(seed).beta(beta, beta, batch if per_sample else 1)
    return torch.randperm(batch, generator=generator), torch.from_numpy(lam)


def _draw_mask(mode: Mode, share: Tensor, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Return masks ``(M, freq, time)`` of about the shares ``(M,)`` of the grid."""
    freq, time = grid
    if mode == "patch":
        return _some(freq * time, share, generator).view(-1, freq, time)
    if mode == "time":
        return _some(time, share, generator)[:, None].expand(-1, freq, -1)
    if mode == "freq":
        return _some(freq, share, generator)[..., None].expand(-1, -1, time)
    rows, columns = (_interval(size, share.sqrt(), generator) for size in grid)
    return rows[..., None] & columns[:, None]


def _some(size: int, share: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mark ``int(size * share)`` random places of *size* in each row ``(M, size)``."""
    permutations = torch.rand(len(share), size, generator=generator, dtype=torch.float32).argsort(1)
    return permutations < (size * share).long()[:, None]


def _interval(size: int, share: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mark *share* of *size* places around a random one in each row ``(M, size)``, cut off at the ends."""
    length = (size * share).round().long()
    start = torch.randint(size, (len(share),), generator=generator) - length // 2
    after_start = torch.arange(size) - start[:, None]
    return (after_start >= 0) & (after_start < length[:, None])


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta!r}")
