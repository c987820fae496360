from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.component import Loss, build, describe
from respiro.errors import LabelError
from respiro.losses import CrossEntropy, LogitAdjustedCrossEntropy, cross_entropy, logit_adjusted_cross_entropy

WEIGHT = [0.5, 2.0, 1.0]


def random_logits(count: int = 6, classes: int = 3) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def loop(logits: Tensor, labels: list[int], weight: list[float], smoothing: float) -> float:
    """Weighted mean over the labelled rows of the smoothed cross-entropy, term by term."""
    total = divisor = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        if label == -1:
            continue
        log_sum = math.log(sum(math.exp(value) for value in row))
        for index, value in enumerate(row):
            target = (1 - smoothing) * (index == label) + smoothing / len(row)
            total -= target * weight[index] * (value - log_sum)
        divisor += weight[label]
    return total / divisor


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smoothed"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 0, 1, 2], [1] * 6, [0, -1, 2, -1, -1, 1]], ids=["all", "one-class", "some-unknown"]
)
def test_cross_entropy_is_its_equation(labels: list[int], weight: list[float] | None, smoothing: float) -> None:
    loss = cross_entropy(random_logits(), torch.tensor(labels), weight, smoothing)
    assert loss.item() == pytest.approx(loop(random_logits(), labels, weight or [1.0] * 3, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smoothed"])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    labels, weight = torch.tensor([0, 1, -1, 2, 2, 1]), torch.tensor(WEIGHT, dtype=torch.float64)
    expected = F.cross_entropy(random_logits(), labels, weight, ignore_index=-1, label_smoothing=smoothing)
    torch.testing.assert_close(CrossEntropy(WEIGHT, smoothing)(random_logits(), labels), expected)


def test_gradient_is_right() -> None:
    logits, labels = random_logits().requires_grad_(), torch.tensor([0, 1, 2, -1, 1, 0])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, WEIGHT, 0.1), (logits,))


@pytest.mark.parametrize(
    ("labels", "weight"),
    [([-1, -1, -1], None), ([-1, -1, -1], WEIGHT), ([1, 1, -1], [1.0, 0.0, 1.0]), ([], None)],
    ids=["unknown", "unknown-weighted", "zero-weight", "empty"],
)
def test_a_batch_without_labels_gives_zero_with_gradient(labels: list[int], weight: list[float] | None) -> None:
    logits = random_logits(len(labels)).requires_grad_()
    loss = cross_entropy(logits, torch.tensor(labels, dtype=torch.int64), weight)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_batch_of_one() -> None:
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_half_precision_logits_in_float32(dtype: torch.dtype) -> None:
    logits, labels = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = CrossEntropy(WEIGHT)(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(600)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    compute_class_weight = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = [0] * 2063 + [1] * 1215 + [2] * 501 + [3] * 363
    loss = CrossEntropy("balanced")
    loss.use_class_counts([2063, 1215, 501, 363])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    torch.testing.assert_close(loss.class_weight, torch.tensor(expected, dtype=torch.float32))


def test_the_scale_of_the_weights_has_no_effect() -> None:
    published = CrossEntropy([0.080007, 0.135847, 0.329450, 0.454696])  # inverse frequencies that add up to 1
    balanced = CrossEntropy("balanced")
    balanced.use_class_counts([2063, 1215, 501, 363])
    logits, labels = random_logits(8, 4), torch.tensor([0, 1, 2, 3, 0, 1, 0, 0])
    torch.testing.assert_close(balanced(logits, labels), published(logits, labels), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["none", "given"])
def test_class_counts_change_only_balanced_weights(weight: list[float] | None) -> None:
    loss = CrossEntropy(weight)
    loss.use_class_counts([5, 0, 1])
    assert (None if loss.class_weight is None else loss.class_weight.tolist()) == weight


def test_balanced_weights_are_restored_without_class_counts() -> None:
    trained = CrossEntropy("balanced", label_smoothing=0.1)
    trained.use_class_counts([30, 10, 7])
    state: Any = copy.deepcopy(trained.state_dict())
    assert state == {"_extra_state": trained.class_weight.tolist()}  # type: ignore[union-attr]
    restored = build(describe(trained), Loss, "loss")
    restored.load_state_dict(state, strict=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(restored(random_logits(), labels), trained(random_logits(), labels))


def test_a_checkpoint_does_not_replace_weights_given_by_hand() -> None:
    loss = CrossEntropy(WEIGHT)
    loss.load_state_dict(CrossEntropy([9.0, 9.0, 9.0]).state_dict())
    assert loss.class_weight is not None
    assert loss.class_weight.tolist() == WEIGHT


def test_a_state_from_before_the_counts_is_accepted() -> None:
    loss = CrossEntropy("balanced")
    loss.load_state_dict(CrossEntropy("balanced").state_dict())
    with pytest.raises(RuntimeError, match="has no class counts yet; call use_class_counts"):
        loss(random_logits(), torch.zeros(6, dtype=torch.int64))


def test_the_weights_move_with_the_loss() -> None:
    loss = CrossEntropy("balanced")
    loss.use_class_counts([1, 2])
    assert loss.to("meta").class_weight.device.type == "meta"  # type: ignore[union-attr]


def test_a_class_without_examples_is_named() -> None:
    with pytest.raises(LabelError, match="class 1 has 0 cycles in the train split"):
        CrossEntropy("balanced").use_class_counts([5, 0, 1])


@pytest.mark.parametrize("label", [-2, 4])
def test_labels_that_are_no_class(label: int) -> None:
    with pytest.raises(LabelError, match=r"labels must lie in \[-1, 4\) for logits of 4 classes"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([0, label]))


def test_wrong_number_of_weights() -> None:
    with pytest.raises(LabelError, match="there are 3 class weights for logits of 4 classes"):
        CrossEntropy(WEIGHT)(random_logits(6, 4), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": "inverse"}, "weight must be 'balanced', None or finite numbers of at least 0, got 'inverse'"),
        ({"weight": [1.0, -1.0]}, r"got \[1.0, -1.0\]"),
        ({"weight": [1.0, float("nan")]}, r"got \[1.0, nan\]"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    ],
    ids=["name", "negative", "nan", "smoothing"],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropy(**arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smoothed"])
def test_equal_weights_change_nothing(smoothing: float) -> None:
    logits, labels = random_logits().requires_grad_(), torch.tensor([0, 1, -1, 2, 2, 1])
    plain, weighted = (cross_entropy(logits, labels, weight, smoothing) for weight in (None, [1.0, 1.0, 1.0]))
    torch.testing.assert_close(plain, weighted)
    torch.testing.assert_close(torch.autograd.grad(plain, logits), torch.autograd.grad(weighted, logits))


# ----------------------------------------------------------------------------------------------------- logit adjustment

COUNTS = [30, 10, 5]


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5])
def test_logit_adjustment_is_its_equation(tau: float) -> None:
    labels = [0, -1, 2, 0, 1, 2]
    adjusted = random_logits() + torch.tensor([tau * math.log(count / 45) for count in COUNTS], dtype=torch.float64)
    loss = LogitAdjustedCrossEntropy(COUNTS, tau)(random_logits(), torch.tensor(labels))
    assert loss.item() == pytest.approx(loop(adjusted, labels, [1.0] * 3, 0.0))
    assert logit_adjusted_cross_entropy(random_logits(), torch.tensor(labels), COUNTS, tau) == loss


@pytest.mark.parametrize("classes", [4, 7])
def test_logit_adjustment_gives_the_reference_values(golden: Path, classes: int) -> None:
    with np.load(golden / "qlung" / f"margins{classes}.npz") as file:
        vectors = {name: torch.from_numpy(file[name]) for name in file}
    loss = LogitAdjustedCrossEntropy(vectors["class_counts"].tolist())
    logits, labels, expected = vectors["raw_logits"], vectors["label"], vectors["logit_adjusted_loss"]
    rows = torch.stack([loss(logits[row : row + 1], labels[row : row + 1]) for row in range(len(labels))])
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss(logits, labels), expected.mean(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss.adjust(logits), vectors["logit_adjusted_posthoc"], rtol=1e-9, atol=1e-11)


def test_logit_adjustment_afterwards_undoes_that_in_training() -> None:
    """A model that has learnt the adjusted logits by plain cross-entropy is adjusted to the bare ones."""
    loss = LogitAdjustedCrossEntropy(COUNTS, tau=1.5)
    learnt = random_logits() + 1.5 * (torch.tensor(COUNTS, dtype=torch.float64) / 45).log()
    torch.testing.assert_close(loss.adjust(learnt), random_logits())


def test_gradient_of_logit_adjustment() -> None:
    logits, labels, loss = (
        random_logits().requires_grad_(),
        torch.tensor([0, 1, 2, -1, 1, 0]),
        LogitAdjustedCrossEntropy(COUNTS),
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (logits,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels), (logits,))


@pytest.mark.parametrize("labels", [[], [-1, -1]], ids=["empty", "unknown"])
def test_logit_adjustment_of_a_batch_without_labels(labels: list[int]) -> None:
    logits = random_logits(len(labels)).requires_grad_()
    loss = LogitAdjustedCrossEntropy(COUNTS)(logits, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logit_adjustment_keeps_the_prior_exact_in_half_precision(dtype: torch.dtype) -> None:
    logits, labels, loss = (
        random_logits().to(dtype),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        LogitAdjustedCrossEntropy(COUNTS),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found, adjusted = loss(logits, labels), loss.adjust(logits)
    assert (found.dtype, adjusted.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found, loss(logits.float(), labels))
    torch.testing.assert_close(adjusted, loss.adjust(logits.float()))


@pytest.mark.parametrize("tau", [-1.0, float("inf"), float("nan")])
def test_logit_adjustment_without_a_meaning(tau: float) -> None:
    with pytest.raises(ValueError, match=f"tau must be finite and not negative, got {tau}"):
        LogitAdjustedCrossEntropy(COUNTS, tau)


@pytest.mark.parametrize("label", [-2, 3])
def test_logit_adjustment_of_labels_that_are_no_class(label: int) -> None:
    with pytest.raises(LabelError, match=r"labels must lie in \[-1, 3\) for logits of 3 classes"):
        LogitAdjustedCrossEntropy(COUNTS)(random_logits(2), torch.tensor([0, label]))
