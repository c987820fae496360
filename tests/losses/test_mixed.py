from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from respiro.component import Loss, build, describe
from respiro.errors import LabelError
from respiro.losses.classification import CrossEntropy, MixedCrossEntropy, cross_entropy, mixed_cross_entropy

WEIGHT = [0.5, 2.0, 1.0]
INDEX = torch.tensor([3, 0, 2, 5, 1, 4])  # the third is its own partner
PER_SAMPLE = [0.0, 1.0, 0.3, 0.5, 0.9, 0.123]


def random_logits(count: int = 6, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def loop(
    logits: Tensor, labels: list[int], index: list[int], lam: list[float], weight: list[float], smoothing: float
) -> float:
    """The two weighted means, sample by sample and class by class."""
    loss = 0.0
    for targets, shares in [(labels, lam), ([labels[j] for j in index], [1 - share for share in lam])]:
        total = divisor = 0.0
        for row, target, share in zip(logits.tolist(), targets, shares, strict=True):
            if target == -1:
                continue
            log_sum = math.log(sum(math.exp(value) for value in row))
            for c, value in enumerate(row):
                wanted = (1 - smoothing) * (c == target) + smoothing / len(row)
                total -= share * wanted * weight[c] * (value - log_sum)
            divisor += weight[target]
        loss += total / divisor if divisor else 0.0
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smoothed"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
@pytest.mark.parametrize("lam", [0.0, 0.371, 1.0, PER_SAMPLE], ids=["lam-0", "lam", "lam-1", "lam-per-sample"])
@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 0, 1, 2], [1] * 6, [0, -1, 2, -1, -1, 1]], ids=["all", "one-class", "some-unknown"]
)
def test_mixed_cross_entropy_is_its_equation(
    labels: list[int], lam: float | list[float], weight: list[float] | None, smoothing: float
) -> None:
    share = torch.tensor(lam, dtype=torch.float64)
    loss = mixed_cross_entropy(random_logits(), torch.tensor(labels), INDEX, share, weight, smoothing)
    shares = lam if isinstance(lam, list) else [lam] * 6
    expected = loop(random_logits(), labels, INDEX.tolist(), shares, weight or [1.0] * 3, smoothing)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("tag", ["ce", "wce"])
def test_mixed_cross_entropy_reproduces_the_released_code(golden: Path, tag: str) -> None:
    vectors = {name: torch.from_numpy(value) for name, value in np.load(golden / "patchmix" / "losses.npz").items()}
    logits, own = vectors["mix_logits"].requires_grad_(), vectors["mix_y_a"]
    # The vectors hold the partners' labels, not the partners: any sample with that label will do.
    index = torch.tensor([own.tolist().index(label) if label in own else 0 for label in vectors["mix_y_b"]])
    labels = own.clone()
    assert torch.equal(labels[index], vectors["mix_y_b"])
    loss = MixedCrossEntropy(vectors["class_weights"].tolist() if tag == "wce" else None)
    value = loss(logits, labels, index, vectors["mix_lam"])
    value.backward()
    torch.testing.assert_close(value, vectors[f"mix_{tag}_loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.grad, vectors[f"mix_{tag}_grad"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smoothed"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
def test_nothing_mixed_is_plain_cross_entropy(weight: list[float] | None, smoothing: float) -> None:
    labels = torch.tensor([0, 1, -1, 2, 2, 1])
    mixed, plain = MixedCrossEntropy(weight, smoothing), CrossEntropy(weight, smoothing)
    expected = plain(random_logits(), labels)
    for lam in (torch.tensor(1.0), torch.ones(6)):
        assert mixed(random_logits(), labels, INDEX, lam).item() == pytest.approx(expected.item(), rel=1e-14)
    # A partner of itself has one label, whatever the share.
    torch.testing.assert_close(mixed(random_logits(), labels, torch.arange(6), 0.3), expected)
    everything = mixed(random_logits(), labels, INDEX, torch.tensor(0.0))
    assert everything.item() == pytest.approx(plain(random_logits(), labels[INDEX]).item(), rel=1e-14)


def test_equal_shares_per_sample_are_one_share() -> None:
    labels, lam = torch.tensor([0, 1, -1, 2, 2, 1]), torch.tensor(0.371, dtype=torch.float64)
    once = mixed_cross_entropy(random_logits(), labels, INDEX, lam, WEIGHT, 0.1)
    torch.testing.assert_close(mixed_cross_entropy(random_logits(), labels, INDEX, lam.expand(6), WEIGHT, 0.1), once)
    torch.testing.assert_close(mixed_cross_entropy(random_logits(), labels, INDEX, 0.371, WEIGHT, 0.1), once)


@pytest.mark.parametrize("lam", [0.371, PER_SAMPLE], ids=["per-batch", "per-sample"])
def test_gradient_is_right(lam: float | list[float]) -> None:
    logits, labels = random_logits().requires_grad_(), torch.tensor([0, 1, 2, -1, 1, 0])
    share = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, share: mixed_cross_entropy(x, labels, INDEX, share.clamp(0, 1), WEIGHT, 0.1),
        (logits, share) if isinstance(lam, float) else (logits, share.detach()),
    )


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
def test_a_batch_without_labels_gives_zero_with_gradient(weight: list[float] | None) -> None:
    logits = random_logits().requires_grad_()
    loss = mixed_cross_entropy(logits, torch.full((6,), -1), INDEX, 0.4, weight)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("lam", [torch.tensor(0.25), torch.tensor([0.25, 0.25])], ids=["per-batch", "per-sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computes_half_precision_logits_in_float32(dtype: torch.dtype, lam: Tensor) -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0], [300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = MixedCrossEntropy()(logits, torch.tensor([1, 0]), torch.tensor([1, 0]), lam)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(300)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("share", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_type_of_the_share_changes_nothing_of_the_loss(dtype: torch.dtype, share: torch.dtype) -> None:
    loss = mixed_cross_entropy(
        random_logits().to(dtype), torch.zeros(6, dtype=torch.int64), INDEX, torch.full((6,), 0.5, dtype=share)
    )
    assert loss.dtype == dtype


@pytest.mark.parametrize("cls", [CrossEntropy, MixedCrossEntropy])
def test_balanced_weights_are_those_of_scikit_learn(cls: Callable[[str], Any]) -> None:
    compute_class_weight = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    loss = cls("balanced")
    loss.use_class_counts([30, 10, 7])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=[0] * 30 + [1] * 10 + [2] * 7)
    torch.testing.assert_close(loss.class_weight, torch.tensor(expected, dtype=torch.float32))


def test_balanced_weights_weigh_both_terms_and_are_restored() -> None:
    trained = MixedCrossEntropy("balanced", label_smoothing=0.1)
    trained.use_class_counts([30, 10, 7])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    value = trained(random_logits(), labels, INDEX, 0.4)
    weight = [47 / 90, 47 / 30, 47 / 21]
    expected = loop(random_logits(), labels.tolist(), INDEX.tolist(), [0.4] * 6, weight, 0.1)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    restored = build(describe(trained), Loss, "loss")
    restored.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
    assert torch.equal(restored(random_logits(), labels, INDEX, 0.4), value)


def test_balanced_weights_need_counts() -> None:
    with pytest.raises(RuntimeError, match=r"^MixedCrossEntropy\(weight='balanced'\) has no class counts yet"):
        MixedCrossEntropy("balanced")(random_logits(), torch.zeros(6, dtype=torch.int64), INDEX, 0.5)


@pytest.mark.parametrize("label", [-2, 3])
def test_labels_that_are_no_class(label: int) -> None:
    with pytest.raises(LabelError, match=r"labels must lie in \[-1, 3\) for logits of 3 classes"):
        mixed_cross_entropy(random_logits(), torch.tensor([0, 0, label, 0, 0, 0]), INDEX, 0.5)


def test_wrong_number_of_weights() -> None:
    with pytest.raises(LabelError, match="there are 3 class weights for logits of 4 classes"):
        MixedCrossEntropy(WEIGHT)(random_logits(6, 4), torch.zeros(6, dtype=torch.int64), INDEX, 0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lam": -0.1}, r"lam must lie in \[0, 1\], got -0.1"),
        ({"lam": torch.tensor([0.5] * 5 + [1.5])}, r"lam must lie in \[0, 1\], got \[0.5, .*, 1.5\]"),
        ({"lam": float("nan")}, r"lam must lie in \[0, 1\], got nan"),
        ({"lam": torch.full((5,), 0.5)}, r"lam must be one share, or one for each of 6 samples, got shape \(5,\)"),
        ({"lam": torch.full((6, 1), 0.5)}, r"lam must be one share.*got shape \(6, 1\)"),
        ({"index": INDEX[:5]}, r"index must be int64 of shape \(6,\).*got torch.int64 of shape \(5,\)"),
        ({"index": INDEX.float()}, "index must be int64 .* got torch.float32"),
        ({"index": INDEX + 1}, "index must name samples of the batch, 0 to 5, got"),
        ({"index": INDEX - 1}, "index must name samples of the batch, 0 to 5, got"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, r"and labels \(B,\), got \(6, 3\) and \(7,\)"),
        ({"logits": torch.zeros(6)}, r"logits must have shape \(B, C\) and labels \(B,\), got \(6,\) and \(6,\)"),
    ],
    ids=[
        *["lam-negative", "lam-above-1", "lam-nan", "lam-shape", "lam-column"],
        *["index-shape", "index-type", "index-beyond", "index-negative", "labels-shape", "logits-shape"],
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    arguments = {"logits": random_logits(), "labels": torch.zeros(6, dtype=torch.int64), "index": INDEX, "lam": 0.5}
    with pytest.raises(ValueError, match=message):
        mixed_cross_entropy(**{**arguments, **changed})


def test_labels_that_do_not_fit_plain_cross_entropy() -> None:
    with pytest.raises(
        ValueError, match=r"logits must have shape \(B, C\) and labels \(B,\), got \(6, 3\) and \(6, 3\)"
    ):
        cross_entropy(random_logits(), torch.zeros(6, 3, dtype=torch.int64))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 1.5"):
        MixedCrossEntropy(label_smoothing=1.5)
    with pytest.raises(
        ValueError, match="weight must be 'balanced', None or finite numbers of at least 0, got 'inverse'"
    ):
        MixedCrossEntropy("inverse")  # type: ignore[arg-type]  # what a config file may hold
