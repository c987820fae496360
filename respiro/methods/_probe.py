"""Heads that are fitted to embeddings at once, the encoder held still, instead of trained step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from respiro.component import eval_mode
from respiro.errors import LabelError
from respiro.losses import cross_entropy
from respiro.methods.classifier import SoundClassifier
from respiro.metrics._counts import rates_for
from respiro.models import LinearHead
from respiro.models.heads import KNNHead

__all__ = ["Embedded", "Probe", "check_counts", "embedded", "fit_head", "scorer"]

Probe = Literal["logistic", "adam", "knn"]


class Embedded(NamedTuple):
    """Embeddings ``(N, D)`` float32 and labels ``(N,)`` int64 of one side of a data set, on the CPU."""

    embeddings: Tensor
    labels: Tensor


@torch.no_grad()
def embedded(model: SoundClassifier, loader: DataLoader[Any]) -> Embedded:
    """Pass the data set of a loader through the encoder once, clean, in order; each process does its share."""
    trainer: Any = model.trainer
    data: Any = loader.dataset
    rank, world = trainer.global_rank, trainer.world_size
    share = Subset(data, range(rank, len(data), world))
    if world > 1:
        for statistics in model.backbone.buffers():  # of batch norm, which each process has of its own batches
            dist.broadcast(statistics, 0)
    embeddings, labels = [], []
    # In the precision that the head will meet.
    with eval_mode(model), trainer.precision_plugin.forward_context():
        for batch in DataLoader(share, loader.batch_size, num_workers=loader.num_workers):
            waveform = trainer.precision_plugin.convert_input(batch["waveform"])
            embeddings.append(model._embeddings(batch | {"waveform": waveform}))
            labels.append(batch["label"])
    own = Embedded(torch.cat(embeddings), torch.cat(labels))
    return own if world == 1 else _gathered(own, len(data), world)


def _gathered(own: Embedded, total: int, world: int) -> Embedded:
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, tuple(own))
    embeddings = own.embeddings.new_empty(total, own.embeddings.shape[1])
    labels = own.labels.new_empty(total)
    for rank, (some, of_some) in enumerate(shares):
        embeddings[rank::world], labels[rank::world] = some, of_some
    return Embedded(embeddings, labels)


def fit_head(
    probe: Probe,
    train: Embedded,
    classes: Sequence[str],
    score: Callable[[LinearHead], float] | None = None,
    strength: float = 0.01,
    neighbors: int = 20,
) -> LinearHead | KNNHead:
    """Return a head fitted to the train side, every class weighing alike; labels of -1 are left out.

    Args:
        probe: ``"logistic"``, ``"adam"`` or ``"knn"``, see :class:`respiro.methods.LinearProbe`.
        train: To fit to.
        classes: Class names.
        score: Of a head on other data, by which ``"adam"`` chooses the epoch; without it the last is taken.
        strength: Inverse of the regularisation of ``"logistic"``.
        neighbors: Of ``"knn"``.

    Raises:
        LabelError: If a class has no sample.
        ValueError: If an embedding is not finite.
    """
    known = train.labels >= 0
    train = Embedded(train.embeddings[known], train.labels[known])
    check_counts(train.labels.bincount(minlength=len(classes)).tolist(), classes)
    if not train.embeddings.isfinite().all():
        raise ValueError("embeddings of the train side are not finite; lower lr, or look at the waveforms")
    # Drawing must neither differ between processes nor disturb what the training draws.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        if probe == "knn":
            return _nearest(train, len(classes), neighbors)
        if probe == "logistic":
            return _logistic(train, len(classes), strength)
        return _adam(train, len(classes), score)


def scorer(val: Embedded, classes: tuple[str, ...], scoring: str) -> Callable[[LinearHead], float]:
    """Return the function that scores a head on *val*."""

    def score(head: LinearHead) -> float:
        with torch.no_grad():
            predicted = head(val.embeddings).argmax(1)
        size, known = len(classes), val.labels >= 0
        pairs = val.labels[known] * size + predicted[known]
        confmat = pairs.bincount(minlength=size**2).reshape(size, size)
        return rates_for(confmat, scoring, classes)["score"].item()

    return score


def check_counts(counts: Sequence[int], classes: Sequence[str]) -> None:
    """Raise a :class:`LabelError` if a class has no sample."""
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise LabelError(
                f"no cycle of the train side has the class {name!r}, so no classifier of it can be fitted; "
                f"choose labels that occur"
            )


def _logistic(train: Embedded, num_classes: int, strength: float) -> LinearHead:
    """Multinomial logistic regression on standardised embeddings, which the weights then take in."""
    from sklearn.linear_model import LogisticRegression

    x = train.embeddings.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = std.where(std > 0, 1.0)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
    model.fit(((x - mean) / std).numpy(), train.labels.numpy())
    weight, bias = torch.from_numpy(model.coef_) / std, torch.from_numpy(model.intercept_)
    if num_classes == 2:  # scikit-learn gives one row, the second class against the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = LinearHead(x.shape[1], num_classes)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias - weight @ mean)
    return head


def _adam(
    train: Embedded,
    num_classes: int,
    score: Callable[[LinearHead], float] | None,
    epochs: int = 100,
    batch: int = 128,
) -> LinearHead:
    """Adam with a learning rate of 0.1 and balanced weights (Moummad and Farrugia, 2022, released code)."""
    head = LinearHead(train.embeddings.shape[1], num_classes)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1, weight_decay=1e-4)
    weight = 1 / train.labels.bincount(minlength=num_classes)
    best, kept = float("-inf"), head
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(train.labels)), batch):
            optimizer.zero_grad()
            loss = cross_entropy(head(train.embeddings[rows]), train.labels[rows], weight)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if score is not None and (reached := score(head)) > best:
            best, kept = reached, copy.deepcopy(head)
    return kept


def _nearest(train: Embedded, num_classes: int, neighbors: int) -> KNNHead:
    samples, features = train.embeddings.shape
    head = KNNHead(features, num_classes, samples, min(neighbors, samples))
    head.remember(train.embeddings, train.labels)
    return head
