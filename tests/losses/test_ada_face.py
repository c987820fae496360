"""The averages of AdaFace: what moves them, what leaves them alone, and that they last."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.component import Loss, build, describe
from respiro.losses import AdaFaceLoss, ada_face_loss

LABELS = torch.tensor([0, 1, 2, 3, 0, 3, 1, 2])


def cosines(rows: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(rows, 4, generator=generator, dtype=torch.float64) * 1.9 - 0.95).to(dtype)


def norms(seed: int, rows: int = 8) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 30


def test_ada_face_follows_the_norms_in_training_alone() -> None:
    loss, x, y = AdaFaceLoss(momentum=0.1), cosines(dtype=torch.float32), LABELS
    mean, std = 20.0, 100.0
    for seed in range(3):
        loss(x, y, norms(seed))
        mean = 0.9 * mean + 0.1 * norms(seed).mean().item()
        std = 0.9 * std + 0.1 * np.std(norms(seed).numpy(), ddof=1)
    assert (loss.mean.item(), loss.std.item()) == pytest.approx((mean, std), rel=1e-5)
    loss.eval()(x, y, norms(7))
    assert (loss.mean.item(), loss.std.item()) == pytest.approx((mean, std), rel=1e-5)


def test_a_batch_of_one_keeps_the_averages() -> None:
    loss = AdaFaceLoss()
    value = loss(cosines(1), torch.tensor([0]), torch.tensor([3.0]))
    assert value.isfinite()
    assert (loss.mean.item(), loss.std.item()) == (20.0, 100.0)


def test_norms_get_no_gradient() -> None:
    length = norms(0).requires_grad_()
    x = cosines().requires_grad_()
    AdaFaceLoss()(x, LABELS, length).backward()
    assert x.grad is not None
    assert length.grad is None


def test_extreme_norms_are_clipped() -> None:
    x, y = cosines(), LABELS
    extreme = torch.tensor([0.0, 1e6, 5, 6, 7, 8, 9, 10])
    clipped = extreme.clamp(0.001, 100)
    assert torch.equal(AdaFaceLoss()(x, y, extreme), AdaFaceLoss()(x, y, clipped))


@pytest.mark.parametrize("copy_of", ["state", "deepcopy", "pickle"])
def test_the_averages_survive(copy_of: str) -> None:
    loss, x, y = AdaFaceLoss(momentum=0.3, h=0.5), cosines(), LABELS
    loss(x, y, norms(0))
    if copy_of == "state":
        again: Any = build(describe(loss), Loss, "loss")
        again.load_state_dict(copy.deepcopy(loss.state_dict()), strict=True)
    else:
        again = copy.deepcopy(loss) if copy_of == "deepcopy" else pickle.loads(pickle.dumps(loss))
    assert (again.mean.item(), again.std.item()) == (loss.mean.item(), loss.std.item())
    assert again.eval()(x, y, norms(1)) == loss.eval()(x, y, norms(1))


@pytest.mark.parametrize("momentum", [1.0, 0.25])
def test_ignored_samples_and_broken_norms_do_not_count(momentum: float) -> None:
    loss, plain = AdaFaceLoss(momentum=momentum), AdaFaceLoss(momentum=momentum)
    lengths = torch.tensor([10.0, 12.0, 90.0, 15.0, torch.nan, torch.inf, 11.0, 90.0])
    labels = torch.tensor([0, 1, -1, 3, 0, 3, 1, -1])
    counted = torch.tensor([0, 1, 3, 6])
    loss(cosines(), labels, lengths)
    plain(cosines()[counted], labels[counted], lengths[counted])
    assert (loss.mean.item(), loss.std.item()) == pytest.approx((plain.mean.item(), plain.std.item()), rel=1e-6)
    assert plain.mean.item() == pytest.approx((1 - momentum) * 20 + momentum * 12)


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [
        ([torch.nan, torch.nan, 9.0], [0, 1, 2]),
        ([8.0, 7.0, 9.0], [-1, -1, 2]),
        ([8.0, 7.0, 9.0], [-1, -1, -1]),
    ],
    ids=["broken", "ignored", "all-ignored"],
)
def test_fewer_than_two_samples_keep_the_averages(lengths: list[float], labels: list[int]) -> None:
    loss = AdaFaceLoss()
    loss(cosines(3), torch.tensor(labels), torch.tensor(lengths))
    assert (loss.mean.item(), loss.std.item()) == (20.0, 100.0)


def test_an_ignored_sample_without_a_norm_pulls_nothing() -> None:
    x = cosines(2).requires_grad_()
    ada_face_loss(x, torch.tensor([0, -1]), torch.tensor([0.5, torch.nan])).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_averages_stay_exact_when_it_is_cast(dtype: torch.dtype) -> None:
    loss = AdaFaceLoss(momentum=0.01).to(dtype)
    for seed in range(400):
        loss(cosines(dtype=dtype), LABELS, norms(seed))
    expected = AdaFaceLoss(momentum=0.01)
    for seed in range(400):
        expected(cosines(), LABELS, norms(seed))
    assert loss.mean.dtype == torch.float32
    assert torch.equal(loss.mean, expected.mean)
