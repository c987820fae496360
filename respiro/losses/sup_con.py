"""Supervised contrastive learning: samples of one label shall lie together, those of others apart."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from respiro.component import Loss
from respiro.errors import check_choice
from respiro.losses._checks import check_positive
from respiro.losses._contrast import Denominator, Samples, contrast
from respiro.losses._embeddings import check_embeddings
from respiro.losses._gather import gather_with_grad

__all__ = ["NTXentLoss", "SupConLoss", "nt_xent_loss", "sup_con_loss"]


def sup_con_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float = 0.06,
    denominator: Denominator = "all",
    gather: bool = False,
) -> Tensor:
    """Return the supervised contrastive loss of a batch; see :class:`SupConLoss`.

    Args:
        embeddings: All views of all samples ``(V * B, D)``, of any length.
        labels: Their labels ``(V * B,)``, int64, -1 = unknown.
        temperature: Divides the cosine similarities; positive.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Contrast with the samples of all processes.

    Returns:
        A scalar.

    Raises:
        ValueError: If an argument has no meaning or does not fit the others.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> sup_con_loss(z, torch.tensor([0, 0, 1]), temperature=1.0)
        tensor(0.3133)
    """
    _check_settings(temperature, denominator)
    return contrast(embeddings, labels, temperature, denominator, gather).loss


def nt_xent_loss(view1: Tensor, view2: Tensor, temperature: float = 0.06, gather: bool = False) -> Tensor:
    """Return the loss of SimCLR on two views of a batch; see :class:`NTXentLoss`.

    Args:
        view1: Embeddings of the first view of each sample ``(B, D)``.
        view2: Embeddings of the second view ``(B, D)``.
        temperature: Divides the cosine similarities; positive.
        gather: Contrast with the samples of all processes.

    Returns:
        A scalar.

    Raises:
        ValueError: If an argument has no meaning or does not fit the others.

    Example:
        >>> nt_xent_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.5514)
    """
    check_embeddings(view1=view1, view2=view2)
    if view1.shape != view2.shape:
        raise ValueError(
            f"view1 and view2 must have the same shape, got {tuple(view1.shape)} and {tuple(view2.shape)}; "
            f"they are two views of the same samples"
        )
    samples = torch.arange(len(view1), device=view1.device)
    first = gather_with_grad(samples)[1] if gather else 0  # so that no sample of another process has the same number
    return sup_con_loss(torch.cat([view1, view2]), (samples + first).repeat(2), temperature, gather=gather)


class SupConLoss(Loss):
    r"""Supervised contrastive loss: the other samples of a label against all other samples.

    With the cosine similarity :math:`s_{ia}` of samples i and a, divided by the temperature, and the positives P(i),
    which are the other samples that have the label of i,

    .. math:: \frac{1}{N} \sum_i \Big[ \log \sum_{a \in A(i)} e^{s_{ia}}
              - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip} \Big].

    A(i) is all samples but i, as in the released code, or with ``"negatives"`` the samples of another label, as in
    equation 2 of the paper (which sums over i): this one has no lower bound.

    A label of -1 is unknown: such a sample takes no part. Anchors without a positive, and with ``"negatives"`` those
    without a negative, are left out of the mean; :attr:`left_out` counts them. A batch without any other anchor gives
    0, with a gradient of 0. A batch of one class is nothing special to ``"all"``: its samples are told apart. An
    embedding of zeros has a similarity of 0 to all others, and a gradient of zero. Computed in float32 even under
    autocast, a block of anchors at a time, so that the memory grows with the batch and not with its square.

    Args:
        temperature: Divides the cosine similarities; positive.
        denominator: ``"all"`` or ``"negatives"``.
        gather: Under distributed training, contrast with the samples of all processes, which must hold batches of
            equal size. The mean over the processes is then the loss of one process that holds the whole batch, and so
            are the gradients. Without other processes nothing changes.
        memory: How many samples of earlier batches to contrast with in training, as positives and negatives but never
            as anchors, and without a gradient. In eval mode a batch is contrasted with itself alone. The memory is
            kept in the state dict; without *gather*, each process has one of its own.

    Attributes:
        left_out: Number of anchors of this process that the latest call left out, a scalar tensor; those of unknown
            label do not count.

    Shape:
        embeddings ``(V * B, D)``, all views stacked, labels ``(V * B,)`` int64; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, a shape does not fit, or, on a CPU, embeddings are not finite.

    Source:
        Khosla et al., "Supervised contrastive learning", NeurIPS 2020, L_out; Moummad and Farrugia, "Learning audio
        features with metadata and contrastive learning", 2022, temperature 0.06, equation 2; the memory: Wang et al.,
        "Cross-batch memory for embedding learning", CVPR 2020.

    Example:
        >>> loss = SupConLoss(temperature=1.0)
        >>> loss(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.3133)
        >>> loss.left_out
        tensor(1)
    """

    left_out: Tensor

    def __init__(
        self, temperature: float = 0.06, denominator: Denominator = "all", gather: bool = False, memory: int = 0
    ) -> None:
        super().__init__()
        _check_settings(temperature, denominator)
        if not isinstance(memory, int) or memory < 0:
            raise ValueError(f"memory must be a whole number of samples, 0 for none, got {memory!r}")
        self.temperature = temperature
        self.denominator: Denominator = denominator
        self.gather = gather
        self.memory = memory
        self.left_out = torch.tensor(0)
        # No buffers: DistributedDataParallel would give every process the memory of the first.
        self._remembered: Samples | None = None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the anchors, a scalar; in training with gradients, remember the batch."""
        remembered = self._remembered if self.training else None
        loss, self.left_out, batch = contrast(
            embeddings, labels, self.temperature, self.denominator, self.gather, remembered
        )
        if self.memory and self.training and torch.is_grad_enabled():
            self._remembered = self._latest(batch)
        return loss

    def _latest(self, batch: Samples) -> Samples:
        """Return the memory after this batch, the oldest first."""
        embeddings, labels = (x.detach() for x in batch)
        if self._remembered is not None:
            embeddings = torch.cat([self._remembered.embeddings.to(embeddings), embeddings])
            labels = torch.cat([self._remembered.labels.to(labels), labels])
        return Samples(embeddings[-self.memory :], labels[-self.memory :])

    # Not in buffers, whose size a strict load would have to know beforehand.
    def get_extra_state(self) -> dict[str, Tensor] | None:
        """Return the memory, or ``None`` while it is empty."""
        return None if self._remembered is None else {k: x.clone() for k, x in self._remembered._asdict().items()}

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        """Take the memory from a checkpoint, as many samples as this loss keeps."""
        self._remembered = None
        if state is not None and self.memory:
            self._remembered = Samples(**{name: x[-self.memory :] for name, x in state.items()})


class NTXentLoss(Loss):
    r"""Loss of SimCLR (normalised temperature-scaled cross-entropy): the other view of a sample against all others.

    :class:`SupConLoss` with every sample a class of its own: with the cosine similarity :math:`s_{ia}` of views i and
    a, divided by the temperature, and the other view p(i) of the same sample,

    .. math:: \frac{1}{2B} \sum_i \Big[ \log \sum_{a \neq i} e^{s_{ia}} - s_{i,p(i)} \Big].

    An embedding of zeros has a similarity of 0 to all others, and a gradient of zero. Computed in float32 even under
    autocast.

    Args:
        temperature: Divides the cosine similarities; positive.
        gather: Under distributed training, contrast with the samples of all processes, as :class:`SupConLoss` does.

    Shape:
        view1 and view2 ``(B, D)``; returns a scalar.

    Raises:
        ValueError: If an argument has no meaning, a shape does not fit, or, on a CPU, embeddings are not finite.

    Source:
        Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020, equation 1.

    Example:
        >>> NTXentLoss(temperature=1.0)(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor(0.5514)
    """

    def __init__(self, temperature: float = 0.06, gather: bool = False) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.gather = gather

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """Return the mean over both views of all samples, a scalar."""
        return nt_xent_loss(view1, view2, self.temperature, self.gather)


def _check_settings(temperature: float, denominator: str) -> None:
    check_positive("temperature", temperature)
    check_choice("denominator", denominator, get_args(Denominator))
