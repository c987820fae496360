"""Contrastive objectives on mixed batches."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from respiro.component import Loss, unit
from respiro.errors import check_choice
from respiro.losses._checks import check_positive
from respiro.losses._embeddings import UNKNOWN, check_embeddings
from respiro.losses._gather import gather_with_grad
from respiro.losses._mixed import check_mixed

__all__ = ["PatchMixContrastiveLoss", "patch_mix_contrastive_loss"]

Negatives = Literal["all", "different-label"]


def patch_mix_contrastive_loss(
    mixed: Tensor,
    clean: Tensor,
    index: Tensor,
    lam: Tensor | float,
    labels: Tensor | None = None,
    temperature: float = 0.06,
    negatives: Negatives = "all",
    gather: bool = False,
) -> Tensor:
    """Return the Patch-Mix contrastive loss of a batch; see :class:`PatchMixContrastiveLoss`.

    Args:
        mixed: Embeddings of the mixed samples ``(B, D)``.
        clean: Embeddings of the samples as they were ``(B, D)``; detach them to keep them as fixed targets.
        index: Partner of each sample ``(B,)``, int64.
        lam: Share of its own that a sample kept, in [0, 1]; one for the batch ``()`` or one per sample ``(B,)``.
        labels: Classes ``(B,)``, int64, -1 = unknown; only ``"different-label"`` uses them.
        temperature: Divides the cosine similarities; positive.
        negatives: ``"all"`` or ``"different-label"``.
        gather: Contrast with the clean samples of all processes.

    Returns:
        A scalar.

    Raises:
        ValueError: If an argument has no meaning or does not fit the others.

    Example:
        >>> z = torch.eye(2)
        >>> patch_mix_contrastive_loss(z, z, torch.tensor([1, 0]), 0.75, temperature=1.0)
        tensor(0.5633)
    """
    _check_settings(temperature, negatives)
    _check_pairs(mixed, clean)
    batch = len(clean)
    check_mixed(index, lam, batch)
    with torch.autocast(clean.device.type, enabled=False):
        anchors = unit(mixed)
        targets, offset = gather_with_grad(unit(clean)) if gather else (unit(clean), 0)
        if len(targets) < 2:  # here, as a process that stops before it gathers leaves the others waiting
            raise ValueError(f"contrasting needs at least two samples, got {batch}; give the datamodule drop_last=True")
        own = torch.arange(batch, device=clean.device) + offset
        pairs = torch.stack([own, index + offset], dim=1)
        logits = anchors @ targets.T / temperature
        if negatives == "different-label":
            logits = logits.masked_fill(_false_negatives(labels, pairs, gather), float("-inf"))
        log_own, log_partner = logits.log_softmax(1).gather(1, pairs).unbind(1)
        lam = lam.to(logits) if isinstance(lam, Tensor) else lam
        return -(lam * log_own + (1 - lam) * log_partner).mean()


class PatchMixContrastiveLoss(Loss):
    r"""Patch-Mix contrastive loss: a mixed sample shall lie between the two samples that it was mixed from.

    With the cosine similarity :math:`s_{ij}` of mixed sample i and clean sample j, divided by the temperature,

    .. math:: -\frac{1}{B} \sum_i \Big[ \lambda s_{i,i} + (1 - \lambda) s_{i,\mathrm{index}(i)}
              - \log \sum_{j \in D(i)} e^{s_{ij}} \Big].

    A sample that is its own partner has the one target. D(i) is the whole batch, or with ``"different-label"`` the
    samples of another class than i, i itself and its partner; where a batch holds one class only, these two are all
    there is. A label of -1 is unknown and never the same as another. Computed in float32 even under autocast.

    Args:
        temperature: Divides the cosine similarities; positive.
        negatives: ``"all"``, or ``"different-label"`` to not push samples of one class apart; it needs labels.
        gather: Under distributed training, contrast with the clean samples of all processes, which must hold batches
            of equal size; partners stay within the process. The mean over the processes is then the loss of one
            process that holds the whole batch, and so are the gradients. Without other processes nothing changes.

    Shape:
        mixed and clean ``(B, D)`` with ``B >= 2``, index ``(B,)`` int64, lam ``()`` or ``(B,)``, labels ``(B,)`` int64;
        returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, a shape does not fit, labels are needed and missing, or, on a CPU,
            embeddings are not finite.

    Source:
        Bae et al., "Patch-Mix contrastive learning with Audio Spectrogram Transformer on respiratory sound
        classification", Interspeech 2023; temperature 0.06, all negatives.

    Example:
        >>> mixed = clean = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> PatchMixContrastiveLoss(temperature=1.0)(mixed, clean, index=torch.tensor([0, 2, 1]), lam=torch.tensor(0.5))
        tensor(0.9011)
    """

    def __init__(self, temperature: float = 0.06, negatives: Negatives = "all", gather: bool = False) -> None:
        super().__init__()
        _check_settings(temperature, negatives)
        self.temperature = temperature
        self.negatives: Negatives = negatives
        self.gather = gather

    def forward(
        self, mixed: Tensor, clean: Tensor, index: Tensor, lam: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """Return the mean over the mixed samples, a scalar."""
        return patch_mix_contrastive_loss(
            mixed, clean, index, lam, labels, self.temperature, self.negatives, self.gather
        )


def _false_negatives(labels: Tensor | None, pairs: Tensor, gather: bool) -> Tensor:
    """Mark the targets of the class of each row, except its own *pairs* ``(B, 2)``: ``(B, targets)``."""
    if labels is None or labels.shape != pairs.shape[:1]:
        got = "None" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"negatives='different-label' needs labels of shape ({len(pairs)},), got {got}")
    of_targets = gather_with_grad(labels)[0] if gather else labels
    same = (labels[:, None] == of_targets) & (labels[:, None] != UNKNOWN)
    return same.scatter(1, pairs, False)


def _check_settings(temperature: float, negatives: str) -> None:
    check_positive("temperature", temperature)
    check_choice("negatives", negatives, get_args(Negatives))


def _check_pairs(mixed: Tensor, clean: Tensor) -> None:
    check_embeddings(mixed=mixed, clean=clean)
    if mixed.shape != clean.shape:
        raise ValueError(
            f"mixed and clean must have the same shape, got {tuple(mixed.shape)} and {tuple(clean.shape)}; a projector "
            f"on the mixed ones alone must have as many out_features as the backbone has num_features"
        )
