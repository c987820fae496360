"""Margins by class and by quality: against their equations, the published numbers and the reference vectors."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.component import Loss, build, describe
from respiro.errors import LabelError
from respiro.losses import (
    DualFactorAngularMarginLoss,
    LDAMLoss,
    LogitAdjustedCrossEntropy,
    cross_entropy,
    dual_factor_angular_margin_loss,
    ldam_loss,
)
from respiro.models import CosineHead

ICBHI = [2063, 1215, 501, 363]
SPRSOUND_BINARY = [5159, 1497]
LABELS = [0, -1, 2, 3, 1, 3, -1, 0]
KINDS: list[Any] = [LDAMLoss, LogitAdjustedCrossEntropy, DualFactorAngularMarginLoss]
PRECISE = {"rtol": 1e-9, "atol": 1e-11}
each_kind = pytest.mark.parametrize("kind", KINDS)


def cosines(rows: int = 8, classes: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 1.9 - 0.95


def qualities(rows: int = 8) -> Tensor:
    return torch.linspace(0, 1, rows, dtype=torch.float64)


def given(kind: Any) -> tuple[Tensor, ...]:
    """What a loss is called with."""
    arguments = cosines(), torch.tensor(LABELS)
    return (*arguments, qualities()) if kind is DualFactorAngularMarginLoss else arguments


# ------------------------------------------------------------------------------------------------------- the equations


def softmax_loss(values: list[float], label: int, scale: float) -> float:
    return math.log(sum(math.exp(scale * (value - values[label])) for value in values))


def test_ldam_is_its_equation() -> None:
    losses = []
    for values, label in zip(cosines().tolist(), LABELS, strict=True):
        if label != -1:
            values[label] -= 0.5 * ICBHI[label] ** -0.25 / max(count**-0.25 for count in ICBHI)
            losses.append(softmax_loss(values, label, 30.0))
    found = LDAMLoss(ICBHI)(cosines(), torch.tensor(LABELS))
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert ldam_loss(cosines(), torch.tensor(LABELS), ICBHI) == found


def test_dual_factor_is_its_equations() -> None:
    losses = []
    for values, label, quality in zip(cosines().tolist(), LABELS, qualities().tolist(), strict=True):
        if label != -1:
            by_class = 0.3 / math.log(4) * -math.log(ICBHI[label] / sum(ICBHI))
            margin = 0.4 * (0.6 * quality) + (1 - 0.4) * by_class
            angle = min(max(math.acos(values[label]) + margin, 1e-3), math.pi - 1e-3)
            values[label] = math.cos(angle)
            losses.append(softmax_loss(values, label, 10.0))
    loss = DualFactorAngularMarginLoss(ICBHI, kappa=0.6, gamma=0.4, target_margin=0.3, scale=10.0)
    found = loss(cosines(), torch.tensor(LABELS), qualities())
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert found == dual_factor_angular_margin_loss(
        cosines(), torch.tensor(LABELS), qualities(), ICBHI, 0.6, 0.4, 0.3, 10.0
    )


def test_quality_gets_no_gradient() -> None:
    quality, x = qualities().requires_grad_(), cosines().requires_grad_()
    DualFactorAngularMarginLoss(ICBHI)(x, torch.tensor(LABELS), quality).backward()
    assert x.grad is not None
    assert quality.grad is None


# ------------------------------------------------------------------------------------------------ the published numbers


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (ICBHI, [0.1006, 0.1769, 0.3047, 0.3512]),
        (None, [0.0262, 0.5283, 0.2764, 0.6265, 0.5048, 0.2043, 0.5552]),
        (SPRSOUND_BINARY, [0.0735, 0.4305]),
    ],
    ids=["icbhi", "sprsound", "sprsound-binary"],
)
def test_class_margins(counts: list[int] | None, expected: list[float], golden: Path) -> None:
    if counts is None:
        counts = np.load(golden / "qlung" / "loss_sprsound7.npz")["class_counts"].tolist()
    loss = DualFactorAngularMarginLoss(counts, gamma=0.0)
    margins = loss.margin(torch.arange(len(expected)), torch.zeros(len(expected)))
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        (0.0, [0.0503, 0.0885, 0.1524, 0.1756]),
        (0.5, [0.1753, 0.2135, 0.2774, 0.3006]),
        (1.0, [0.3003, 0.3385, 0.4024, 0.4256]),
    ],
)
def test_margins_of_icbhi(quality: float, expected: list[float]) -> None:
    margins = DualFactorAngularMarginLoss(ICBHI).margin(torch.arange(4), torch.full((4,), quality))
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=0, atol=1e-4)


def test_margins_of_ldam() -> None:
    """By the loss of two equal cosines, which is ``log(1 + exp(scale * margin))``."""
    for label, expected in enumerate([0.324, 0.370, 0.461, 0.500]):
        x = torch.full((1, 4), -1.0, dtype=torch.float64)
        x[0, label] = x[0, (label + 1) % 4] = 0.9
        found = LDAMLoss(ICBHI, scale=30.0)(x, torch.tensor([label])).item()
        assert math.log(math.expm1(found)) / 30 == pytest.approx(expected, abs=5e-4)


WORKED = [
    ([0.6, 0.1, -0.2, 0.3], 0, 0.5, 0.175279, 0.000015, 0.103068, 0.041242),
    ([0.6, 0.1, -0.2, 0.3], 3, 0.5, 0.300614, 11.100015, 8.939515, 14.675821),
    ([0.6, 0.1, -0.2, 0.3], 3, 1.0, 0.425614, 11.100015, 10.809987, 15.424010),
    ([0.3, 0.3, 0.3, 0.3], 1, 0.0, 0.088469, 1.386294, 2.468940, 2.373870),
    ([0.2, 0.5, -0.4, 0.1], 1, 0.8, 0.288469, 0.000015, 0.557327, 0.222946),
    ([-0.3, 0.2, 0.7, 0.6], 2, 0.25, 0.214872, 0.024423, 1.333815, 0.557949),
]


def with_cosines(values: list[float]) -> tuple[CosineHead, Tensor]:
    """A head, and an embedding that has these cosines: each class leaves one direction along an axis of its own."""
    head = CosineHead(len(values) + 1, len(values)).double()
    weight = torch.diag(torch.tensor([math.sqrt(1 - value**2) for value in values], dtype=torch.float64))
    along = torch.tensor(values, dtype=torch.float64)[:, None]
    head.weight.data = 3 * torch.cat([along, weight], dim=1)
    embedding = torch.zeros(1, len(values) + 1, dtype=torch.float64)
    embedding[0, 0] = 7
    return head, embedding


@pytest.mark.parametrize(("values", "label", "quality", "margin", "ce", "dfam", "total"), WORKED)
def test_worked_example(
    values: list[float], label: int, quality: float, margin: float, ce: float, dfam: float, total: float
) -> None:
    loss, y, q = DualFactorAngularMarginLoss(ICBHI), torch.tensor([label]), torch.tensor([quality], dtype=torch.float64)
    head, embedding = with_cosines(values)
    assert loss.margin(y, q).item() == pytest.approx(margin, abs=1e-6)
    found_ce = cross_entropy(head(embedding), y).item()
    found = loss(head.cosines(embedding), y, q).item()
    assert (found_ce, found, found_ce + 0.4 * found) == pytest.approx((ce, dfam, total), abs=1e-6)


def test_worked_examples_together() -> None:
    x, y = torch.tensor([row[0] for row in WORKED], dtype=torch.float64), torch.tensor([row[1] for row in WORKED])
    quality = torch.tensor([row[2] for row in WORKED], dtype=torch.float64)
    total = cross_entropy(37 * x, y) + 0.4 * DualFactorAngularMarginLoss(ICBHI)(x, y, quality)
    assert total.item() == pytest.approx(5.549307, abs=1e-6)


# ------------------------------------------------------------------------------------------------ the reference vectors


def load(golden: Path, name: str) -> dict[str, Tensor]:
    with np.load(golden / "qlung" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def dual_factor(vectors: dict[str, Tensor], row: int | None = None) -> DualFactorAngularMarginLoss:
    """The loss with the settings of the file, or of one of its rows."""
    counts, *settings = (
        vectors[name] if row is None else vectors[name][row]
        for name in ("class_counts", "kappa", "gamma", "m_target", "s_d")
    )
    return DualFactorAngularMarginLoss(counts.tolist(), *(setting.item() for setting in settings))


@pytest.mark.parametrize("name", ["loss_icbhi4", "loss_sprsound7", "loss_binary", "loss_random4", "loss_edge"])
def test_reference_vectors(golden: Path, name: str) -> None:
    vectors = load(golden, name)
    each_row = name == "loss_random4"
    precision = {"rtol": 0.0, "atol": 1e-6} if name == "loss_edge" else PRECISE
    x = vectors["cos"].requires_grad_()
    s_a, lam = (vectors[part].expand(len(x)) for part in ("s_a", "lam"))
    totals = []
    for row in range(len(x)):
        loss, here = dual_factor(vectors, row if each_row else None), slice(row, row + 1)
        y, quality = vectors["label"][here], vectors["aqs"][here]
        torch.testing.assert_close(loss.margin(y, quality), vectors["m_d"][here], **PRECISE)
        dfam = loss(x[here], y, quality)
        torch.testing.assert_close(dfam, vectors["l_dfam"][row], **precision)
        totals.append(cross_entropy(s_a[row] * x[here], y) + lam[row] * dfam)
    total = torch.stack(totals)
    torch.testing.assert_close(total, vectors["total"], **precision)
    torch.testing.assert_close(total.mean(), vectors["mean_total"], **precision)
    (grad,) = torch.autograd.grad(total.sum(), x)
    assert grad.isfinite().all()
    if "grad_cos" in vectors:
        torch.testing.assert_close(grad, vectors["grad_cos"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["loss_icbhi4", "loss_sprsound7", "loss_binary"])
def test_reference_vectors_through_the_head(golden: Path, name: str, dtype: torch.dtype) -> None:
    vectors = load(golden, name)
    head = CosineHead(vectors["x"].shape[1], len(vectors["weight"]), vectors["s_a"].item()).to(dtype)
    head.weight.data = vectors["weight"].to(dtype)
    x, y = vectors["x"].to(dtype), vectors["label"]
    precision: dict[str, float] = PRECISE if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    dfam = dual_factor(vectors)(head.cosines(x), y, vectors["aqs"].to(dtype))
    total = cross_entropy(head(x), y) + vectors["lam"].item() * dfam
    torch.testing.assert_close(head.cosines(x), vectors["cos"].to(dtype), rtol=precision["rtol"], atol=1e-6)
    torch.testing.assert_close(total, vectors["mean_total"].to(dtype), **precision)


@pytest.mark.parametrize("classes", [4, 7])
def test_reference_losses_of_ldam(golden: Path, classes: int) -> None:
    vectors = load(golden, f"margins{classes}")
    loss, x, y = LDAMLoss(vectors["class_counts"].tolist()), vectors["cos"], vectors["label"]
    rows = torch.stack([loss(x[row : row + 1], y[row : row + 1]) for row in range(len(y))])
    torch.testing.assert_close(rows, vectors["ldam_loss"], **PRECISE)
    torch.testing.assert_close(loss(x, y), vectors["ldam_loss"].mean(), **PRECISE)


# ----------------------------------------------------------------------------------------------------------- properties


def test_without_quality_and_margin_it_is_the_normalised_softmax() -> None:
    loss = DualFactorAngularMarginLoss(ICBHI, kappa=0.0, gamma=1.0)
    x, y = cosines(), torch.tensor(LABELS)
    torch.testing.assert_close(loss(x, y, qualities()), F.cross_entropy(15 * x, y, ignore_index=-1), **PRECISE)


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_equal_counts_have_the_target_margin(classes: int) -> None:
    loss = DualFactorAngularMarginLoss([30] * classes, gamma=0.0, target_margin=0.25)
    margins = loss.margin(torch.arange(classes), torch.zeros(classes, dtype=torch.float64))
    torch.testing.assert_close(margins, torch.full((classes,), 0.25, dtype=torch.float64))


def test_better_quality_is_a_larger_margin_and_a_larger_loss() -> None:
    loss = DualFactorAngularMarginLoss(ICBHI)
    x, y = cosines(4) / 2, torch.arange(4)
    steps = [torch.full((4,), value) for value in (0.0, 0.3, 0.6, 1.0)]
    margins = torch.stack([loss.margin(y, quality) for quality in steps])
    losses = torch.stack([loss(x, y, quality) for quality in steps])
    assert (margins.diff(dim=0) > 0).all()
    assert (losses.diff() > 0).all()


@pytest.mark.parametrize("rho", [2, 5, 10])
def test_a_class_rarer_by_a_factor_gains_its_logarithm(rho: int) -> None:
    before, after = (
        DualFactorAngularMarginLoss([100, 800 + 100 - part, part, 200], gamma=0.0) for part in (100, 100 // rho)
    )
    gained = [loss.margin(torch.tensor([2]), torch.zeros(1, dtype=torch.float64)).item() for loss in (before, after)]
    assert gained[1] - gained[0] == pytest.approx(0.2 / math.log(4) * math.log(rho))


# --------------------------------------------------------------------------------------------------------- class counts


@each_kind
def test_counts_from_the_data_are_those_given(kind: Any) -> None:
    learnt = kind()
    learnt.use_class_counts(ICBHI)
    assert learnt(*given(kind)) == kind(ICBHI)(*given(kind))


@each_kind
def test_counts_given_by_hand_stay(kind: Any) -> None:
    loss = kind(ICBHI)
    loss.use_class_counts([1, 2, 3, 4])
    assert loss.known_counts().tolist() == ICBHI
    other = kind()
    other.use_class_counts([1, 2, 3, 4])
    loss.load_state_dict(other.state_dict())
    assert loss.known_counts().tolist() == ICBHI


@each_kind
@pytest.mark.parametrize("by_hand", [True, False], ids=["given", "learnt"])
@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle"])
def test_counts_survive(kind: Any, way: str, by_hand: bool) -> None:
    loss = kind(ICBHI) if by_hand else kind()
    loss.use_class_counts(ICBHI)
    if way == "state":
        again: Any = build(describe(loss), Loss, "loss")
        state = copy.deepcopy(loss.state_dict())
        assert state == {"_extra_state": ICBHI}
        again.load_state_dict(state, strict=True)
    else:
        again = copy.deepcopy(loss) if way == "deepcopy" else pickle.loads(pickle.dumps(loss))
    assert again.known_counts().tolist() == ICBHI
    assert again(*given(kind)) == loss(*given(kind))


@each_kind
def test_a_state_from_before_the_counts_is_accepted(kind: Any) -> None:
    loss = kind()
    loss.load_state_dict(kind().state_dict())
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} has no class counts yet; pass class_counts=\[\.\.\.\]"):
        loss(*given(kind))


@each_kind
def test_a_cast_changes_no_count_and_a_move_takes_them_along(kind: Any) -> None:
    loss = kind(ICBHI).half()
    assert loss.known_counts().tolist() == ICBHI
    assert loss(*given(kind)) == kind(ICBHI)(*given(kind))
    moved = loss.to("meta")
    assert moved.known_counts().device.type == "meta"


@each_kind
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 0, 1, 2], "class 1 has 0 train samples, so it has no prior; leave the class out"),
        ([5, -1, 1, 2], "class 1 has -1 train samples"),
        ([5], r"class_counts must hold the whole number of train samples of at least two classes, got \[5\]"),
        ([], r"at least two classes, got \[\]"),
        ([5, 1.5, 1, 2], r"whole number .*, got \[5, 1.5, 1, 2\]"),
        ([5, float("nan"), 1, 2], r"whole number .*, got \[5, nan, 1, 2\]"),
    ],
    ids=["zero", "negative", "one", "none", "fraction", "nan"],
)
def test_counts_without_meaning(kind: Any, counts: list[int], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        kind(counts)
    with pytest.raises(LabelError, match=message):
        kind().use_class_counts(counts)


@each_kind
@pytest.mark.parametrize("counts", [[5, 6, 7], [5, 6, 7, 8, 9]], ids=["fewer", "more"])
def test_counts_of_another_number_of_classes(kind: Any, counts: list[int]) -> None:
    with pytest.raises(LabelError, match=f"there are {len(counts)} class counts for 4 classes"):
        kind(counts)(*given(kind))


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LDAMLoss, {"max_margin": -0.5}, r"max_margin is a difference of cosines and must lie in \[0, 2\), got -0.5"),
        (LDAMLoss, {"scale": -1.0}, "scale must be positive and finite, got -1.0"),
        (DualFactorAngularMarginLoss, {"kappa": 28.6}, r"kappa must be in radians, .* \(28.6 degrees are 0.4992 rad"),
        (DualFactorAngularMarginLoss, {"target_margin": 11.5}, r"target_margin must be in radians, in \[0, pi\)"),
        (DualFactorAngularMarginLoss, {"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        (DualFactorAngularMarginLoss, {"gamma": float("nan")}, r"gamma must be in \[0, 1\], got nan"),
        (DualFactorAngularMarginLoss, {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    ],
)
def test_arguments_without_meaning(kind: Any, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(ICBHI, **arguments)
    function = ldam_loss if kind is LDAMLoss else dual_factor_angular_margin_loss
    with pytest.raises(ValueError, match=message):
        function(*given(kind), ICBHI, **arguments)


def test_a_prior_so_extreme_that_the_margin_passes_pi() -> None:
    settings, counts = {"gamma": 0.5, "kappa": 0.5, "target_margin": 0.6}, [10**7, 1]
    message = "the rarest class has a share of 1e-07, whose margin at quality 1 is 7.226, past pi; lower kappa or"
    with pytest.raises(ValueError, match=message):
        DualFactorAngularMarginLoss(counts, **settings)
    loss = DualFactorAngularMarginLoss(**settings)
    with pytest.raises(ValueError, match=message):
        loss.use_class_counts(counts)
    with pytest.raises(RuntimeError, match="no class counts yet"):
        loss.known_counts()


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        (torch.tensor([0.5, float("nan")]), r"got nan to nan; NaN means that it was not computed: call add_quality"),
        (torch.tensor([0.5, 1.5]), r"quality must lie in \[0, 1\], got 0.5 to 1.5$"),
        (torch.tensor([-0.5, 0.5]), r"quality must lie in \[0, 1\]"),
        (torch.tensor([[0.5], [0.5]]), r"floating point of shape \(2,\), one for each label, .* of shape \(2, 1\)"),
        (torch.tensor([0.5]), r"of shape \(1,\)"),
        (torch.tensor([0, 1]), "got torch.int64"),
    ],
    ids=["nan", "above", "below", "column", "one", "integers"],
)
def test_quality_that_does_not_fit(quality: Tensor, message: str) -> None:
    loss, y = DualFactorAngularMarginLoss(ICBHI), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        loss(cosines(2), y, quality)
    with pytest.raises(ValueError, match=message):
        loss.margin(y, quality)


def test_no_quality() -> None:
    with pytest.raises(TypeError, match="quality must be a tensor of one value for each label, got NoneType"):
        DualFactorAngularMarginLoss(ICBHI)(cosines(2), torch.tensor([0, 1]), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [-2, 4])
def test_a_margin_of_no_class(label: int) -> None:
    with pytest.raises(LabelError, match=r"labels must lie in \[-1, 4\) for class_counts of 4 classes"):
        DualFactorAngularMarginLoss(ICBHI).margin(torch.tensor([0, label]), torch.ones(2))


def test_the_margin_of_an_empty_batch() -> None:
    assert DualFactorAngularMarginLoss(ICBHI).margin(torch.zeros(0).long(), torch.zeros(0)).shape == (0,)
