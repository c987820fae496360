"""Augmentation of spectrograms ``(B, T, F)``: batched, a draw of its own for every sample, on any device.

Nothing here asks the device for a value, so a GPU is never waited for.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from respiro.component import Transform
from respiro.errors import check_choice
from respiro.transforms._checks import check_floating, full_precision

__all__ = ["SpecAugment", "spec_augment"]

Fill = Literal["mean", "zero"]
Gate = Literal["uniform", "normal", "normal-batch"]
PolicyName = Literal["LB", "LD", "SM", "SS", "icbhi_sup", "icbhi_ast_sup"]


class _Policy(NamedTuple):
    """Numbers of a policy, in the order of the papers: W, F, m_F, T, p, m_T."""

    time_warp: int
    freq_width: int
    freq_masks: int
    time_width: int
    p: float
    time_masks: int


_POLICIES = {
    "LB": _Policy(80, 27, 1, 100, 1.0, 1),
    "LD": _Policy(80, 27, 2, 100, 1.0, 2),
    "SM": _Policy(40, 15, 2, 70, 0.2, 2),
    "SS": _Policy(40, 27, 2, 70, 0.2, 2),
    "icbhi_sup": _Policy(0, 20, 2, 50, 1.0, 2),
    "icbhi_ast_sup": _Policy(0, 48, 2, 160, 1.0, 2),
}


def spec_augment(features: Tensor, freq_masks: Tensor, time_masks: Tensor, fill: Fill | float = "mean") -> Tensor:
    """Mask bands of frequency, then stretches of time, at given positions.

    ``"mean"`` fills the frequency masks with the mean of the sample, and the time masks with its mean after that; both
    are taken in float32 at least, and are constants to the gradient. A mask that leaves the spectrogram is cut.

    Args:
        features: Spectrograms ``(B, T, F)``; never changed.
        freq_masks: Masks ``(B, m, 2)``, int64: first bin and width of each. ``m`` may be 0.
        time_masks: Masks ``(B, n, 2)``, int64: first frame and width of each. ``n`` may be 0.
        fill: ``"mean"``, ``"zero"`` or a number.

    Returns:
        A masked copy ``(B, T, F)``, in the type of *features*.

    Raises:
        ValueError: If a shape is not one of the above, or *fill* is neither a name nor a finite number.

    Source:
        Park et al., "SpecAugment", Interspeech 2019, section 2; the fill by Bae et al., "Patch-Mix Contrastive
        Learning", Interspeech 2023.

    Example:
        >>> features = torch.arange(6.0).reshape(1, 2, 3)
        >>> spec_augment(features, torch.tensor([[[1, 2]]]), torch.tensor([[[0, 1]]]), fill="zero")
        tensor([[[0., 0., 0.],
                 [3., 0., 0.]]])
    """
    _check_fill(fill)
    check_floating("features", "(B, T, F)", features)
    _check_masks("freq_masks", freq_masks, len(features))
    _check_masks("time_masks", time_masks, len(features))
    return _mask(_mask(features, freq_masks, 2, fill), time_masks, 1, fill)


class SpecAugment(Transform):
    """Roll, time warp, frequency masks and time masks at random, drawn for every sample by itself, while training.

    A mask has a width of ``int(U(0, bound))``, so its bound is never reached, and begins anywhere it fits. In eval mode
    the input itself is returned; while training a new tensor is, and the input is never changed.

    The policies are ``LB``, ``LD``, ``SM`` and ``SS`` of SpecAugment, and ``icbhi_sup`` and ``icbhi_ast_sup`` of
    Patch-Mix; any number passed by name replaces the policy's. The widths are in bins and frames of the features: those
    of ``icbhi_ast_sup`` are for 798 frames of 128 bins.

    ============= ========= ========== ========== ========== ========== ===
    policy        time_warp freq_width freq_masks time_width time_masks p
    ============= ========= ========== ========== ========== ========== ===
    LB            80        27         1          100        1          1
    LD            80        27         2          100        2          1
    SM            40        15         2          70         2          0.2
    SS            40        27         2          70         2          0.2
    icbhi_sup     0         20         2          50         2          1
    icbhi_ast_sup 0         48         2          160        2          1
    ============= ========= ========== ========== ========== ========== ===

    Two things differ from the SpecAugment paper. Its *p* limits the share of the time that one mask hides; here, as in
    the released code of Patch-Mix, *p* is the probability that a sample is augmented at all. Its spline warp is
    replaced by a piecewise linear one: a random frame moves by up to *time_warp* frames, and what lies on
    either side of it is stretched or squeezed evenly.

    Args:
        policy: Name of a policy.
        p: Probability that a sample is augmented, in [0, 1].
        fill: What masks are filled with, ``"mean"``, ``"zero"`` or a number; see :func:`spec_augment`. The released
            code of Moummad and Farrugia fills with 0 before it standardises, which with the mean and standard deviation
            of :class:`respiro.transforms.LogMelSpectrogram` is ``fill=-14.47`` here.
        gate: Which samples are augmented: ``"uniform"`` those where *p* exceeds a uniform number, each with probability
            *p*. ``"normal"`` compares with a standard normal number, as the released code of Patch-Mix does: at ``p=1``
            that is a probability of 0.8413, at ``p=0`` one of 0.5. ``"normal-batch"`` draws one such number for the
            whole batch, as the released code of Moummad and Farrugia does.
        freq_masks: Number of frequency masks.
        freq_width: Bound of their width in bins.
        time_masks: Number of time masks.
        time_width: Bound of their width in frames.
        time_warp: Largest distance of the time warp in frames; 0 for none.
        to_end: Whether masks may reach the last bin and the last frame. With ``False`` a mask begins at
            ``int(U(0, size - v))``, where ``v`` is its width before it is rounded down, so that they never do: the
            released code of Moummad and Farrugia, and torchaudio.
        roll: Whether a sample is first rolled in time by any number of frames; what leaves at its end enters at its
            beginning.

    Shape:
        features ``(B, T, F)``; returns the same. The generator must be on the device of the features.

    Raises:
        ValueError: If an option is unknown or out of range; when called, if a bound exceeds the size of the features.

    Source:
        Park et al., "SpecAugment", Interspeech 2019, table 1; Bae et al., "Patch-Mix Contrastive Learning with Audio
        Spectrogram Transformer on Respiratory Sound Classification", Interspeech 2023 (released code); Moummad and
        Farrugia, "Pretraining respiratory sound representations using metadata and contrastive learning", WASPAA 2023
        (released code).

    Example:
        >>> augment = SpecAugment("icbhi_ast_sup", time_width=40, fill="zero")
        >>> features = torch.ones(8, 98, 128)
        >>> masked = augment(features, generator=torch.Generator().manual_seed(0))
        >>> masked.shape, 0 < masked.mean() < 1, augment.eval()(features) is features
        (torch.Size([8, 98, 128]), tensor(True), True)
    """

    def __init__(
        self,
        policy: PolicyName = "icbhi_ast_sup",
        p: float | None = None,
        fill: Fill | float = "mean",
        gate: Gate = "uniform",
        freq_masks: int | None = None,
        freq_width: int | None = None,
        time_masks: int | None = None,
        time_width: int | None = None,
        time_warp: int | None = None,
        to_end: bool = True,
        roll: bool = False,
    ) -> None:
        super().__init__()
        check_choice("policy", policy, get_args(PolicyName))
        check_choice("gate", gate, get_args(Gate))
        _check_fill(fill)
        given = _POLICIES[policy]
        self.p = given.p if p is None else p
        self.fill = fill
        self.gate = gate
        self.freq_masks = given.freq_masks if freq_masks is None else freq_masks
        self.freq_width = given.freq_width if freq_width is None else freq_width
        self.time_masks = given.time_masks if time_masks is None else time_masks
        self.time_width = given.time_width if time_width is None else time_width
        self.time_warp = given.time_warp if time_warp is None else time_warp
        self.to_end = to_end
        self.roll = roll
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {self.p!r}")
        for name in ("freq_masks", "freq_width", "time_masks", "time_width", "time_warp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")

    def forward(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the features, warped and masked while training ``(B, T, F)``."""
        if not self.training:
            return features
        check_floating("features", "(B, T, F)", features)
        samples, frames, bins = features.shape
        self._check_bounds(frames, bins)
        draw = torch.rand if self.gate == "uniform" else torch.randn
        drawn = 1 if self.gate == "normal-batch" else samples
        applied = draw(drawn, dtype=torch.float32, device=features.device, generator=generator) < self.p
        applied = applied.expand(samples)
        if self.roll:
            shift = torch.randint(frames, (samples, 1), device=features.device, generator=generator)
            features = _roll(features, shift * applied[:, None])
        if self.time_warp:
            features = _warp(features, *_draw_warp(applied, self.time_warp, frames, generator))
        freq_masks = _draw_masks(applied, self.freq_masks, self.freq_width, bins, self.to_end, generator)
        time_masks = _draw_masks(applied, self.time_masks, self.time_width, frames, self.to_end, generator)
        return spec_augment(features, freq_masks, time_masks, self.fill)

    def _check_bounds(self, frames: int, bins: int) -> None:
        if self.freq_masks and self.freq_width > bins:
            raise ValueError(
                f"freq_width is {self.freq_width}, but the features have {bins} bins; pass SpecAugment a freq_width of "
                f"at most that"
            )
        if self.time_masks and self.time_width > frames:
            raise ValueError(
                f"time_width is {self.time_width}, but the features have {frames} frames; pass SpecAugment a "
                f"time_width of at most that"
            )
        if self.time_warp and 2 * self.time_warp >= frames:
            raise ValueError(
                f"time_warp is {self.time_warp}, but the features have {frames} frames; pass SpecAugment a time_warp "
                f"of less than half of that"
            )


# A sample that the gate leaves out gets widths and a distance of 0, which change nothing. Numbers are drawn as float32
# whatever torch's default is: bfloat16, which a trainer may make the default, has only 256 steps.


def _draw_masks(
    applied: Tensor, count: int, bound: int, size: int, to_end: bool, generator: Generator | None
) -> Tensor:
    """Return the first position and the width of *count* masks per sample ``(B, count, 2)``."""
    draw = partial(torch.rand, len(applied), count, dtype=torch.float32, device=applied.device, generator=generator)
    drawn = draw() * bound
    width = drawn.long() * applied[:, None]
    start = (draw() * (size - width + 1 if to_end else size - drawn)).long()
    return torch.stack([start, width], dim=-1)


def _draw_warp(applied: Tensor, bound: int, frames: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Return the frame to move ``(B, 1)`` and where it goes ``(B, 1)``."""
    draw = partial(torch.randint, size=(len(applied), 1), device=applied.device, generator=generator)
    origin = draw(bound, frames - bound)
    return origin, origin + draw(-bound, bound + 1) * applied[:, None]


def _roll(features: Tensor, shift: Tensor) -> Tensor:
    """Move every frame *shift* ``(B, 1)`` frames later, around the end."""
    frame = torch.arange(features.shape[1], device=features.device)
    sample = torch.arange(len(features), device=features.device)[:, None]
    return features[sample, (frame - shift) % len(frame)]


def _warp(features: Tensor, origin: Tensor, goal: Tensor) -> Tensor:
    """Move frame *origin* to *goal*, and stretch or squeeze what lies before and behind it evenly."""
    last = features.shape[1] - 1
    frame = torch.arange(last + 1, dtype=torch.float32, device=features.device)
    # At a goal at either end, that part has no length, and only the goal itself is read.
    before = frame * (origin / goal.clamp(min=1).float())
    behind = origin + (frame - goal) * ((last - origin) / (last - goal).clamp(min=1).float())
    source = torch.where(frame < goal, before, behind)
    left = source.long().clamp(max=last)
    right = (left + 1).clamp(max=last)
    sample = torch.arange(len(features), device=features.device)[:, None]
    exact = full_precision(features)
    weight = (source - left)[:, :, None].to(exact.dtype)
    return torch.lerp(exact[sample, left], exact[sample, right], weight).to(features.dtype)


def _mask(features: Tensor, masks: Tensor, dim: int, fill: Fill | float) -> Tensor:
    """Return the features with the masks ``(B, m, 2)`` along *dim* filled."""
    start, width = masks[..., None].unbind(2)
    position = torch.arange(features.shape[dim], device=features.device)
    hidden = ((start <= position) & (position < start + width)).any(1).unsqueeze(3 - dim)
    if fill != "mean":
        return features.masked_fill(hidden, 0.0 if fill == "zero" else fill)
    mean = full_precision(features.detach()).mean((1, 2), keepdim=True)
    return torch.where(hidden, mean.to(features.dtype), features)


def _check_masks(name: str, masks: Tensor, samples: int) -> None:
    if masks.ndim != 3 or masks.shape[0] != samples or masks.shape[2] != 2:
        raise ValueError(f"{name} must have shape ({samples}, m, 2) for {samples} samples, got {tuple(masks.shape)}")


def _check_fill(fill: object) -> None:
    if fill not in get_args(Fill) and not (isinstance(fill, float | int) and math.isfinite(fill)):
        raise ValueError(f"fill must be 'mean', 'zero' or a finite number, got {fill!r}")
