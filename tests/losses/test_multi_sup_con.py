from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from respiro.component import Loss, build, describe
from respiro.errors import LabelError
from respiro.losses import (
    HybridSupConLoss,
    MultiSupConLoss,
    cross_entropy,
    hybrid_sup_con_loss,
    multi_sup_con_loss,
    sup_con_loss,
)

WEIGHTS = {"class": 0.75, "sex_age": 0.25, "device": 2.0}
LABELS = {
    "class": torch.tensor([0, 0, 1, 1, 2, 0, 3, 3]),
    "sex_age": torch.tensor([0, -1, 1, 1, -1, -1, 0, 1]),
    "device": torch.tensor([-1] * 8),
}
UNKNOWN = torch.tensor([0, 1, -1, 2, 2, 1, -1, 0])


def embeddings(seed: int, width: int = 5) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_task() -> dict[str, Tensor]:
    """A projector for each task may have a width of its own."""
    return {task: embeddings(seed, 4 + seed) for seed, task in enumerate(WEIGHTS)}


def logits() -> Tensor:
    return 3 * embeddings(7, 4)


@pytest.fixture
def vectors(golden: Path) -> Callable[[str], dict[str, Tensor]]:
    return lambda name: {key: torch.from_numpy(value) for key, value in np.load(golden / "scl" / f"{name}.npz").items()}


def saved(loss: nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


# -------------------------------------------------------------------------------------------------------- several tasks


@pytest.mark.parametrize("denominator", ["all", "negatives"])
def test_several_tasks_are_the_weighted_sum(denominator: Any) -> None:
    z, loss = by_task(), MultiSupConLoss(WEIGHTS, 0.2, denominator)
    expected = {task: sup_con_loss(z[task], LABELS[task], 0.2, denominator) for task in WEIGHTS}
    assert loss.terms(z, LABELS) == expected
    total = 0.75 * expected["class"] + 0.25 * expected["sex_age"] + 2 * expected["device"]
    torch.testing.assert_close(loss(z, LABELS), total)
    torch.testing.assert_close(loss.total(expected), total)
    assert {task: count.item() for task, count in loss.left_out.items()} == {"class": 1, "sex_age": 0, "device": 0}


@pytest.mark.parametrize(("lam", "key"), [(0.75, "loss_lam0.75"), (0.5, "loss_lam0.5")])
def test_several_tasks_reproduce_the_released_code(vectors: Any, lam: float, key: str) -> None:
    v = vectors("mscl")
    leaves = {name: v[name].clone().requires_grad_() for name in ("meta_z1", "meta_z2", "class_z1", "class_z2")}
    loss = MultiSupConLoss({"class": lam, "meta": 1 - lam}, v["tau"].item())
    inputs = (
        {task: torch.cat([leaves[f"{task}_z1"], leaves[f"{task}_z2"]]) for task in loss.weights},
        {task: v[f"{task}_labels"].repeat(2) for task in loss.weights},
    )
    for task, term in loss.terms(*inputs).items():
        torch.testing.assert_close(term, v[f"loss_{task}"], rtol=1e-5, atol=1e-6)
    value = loss(*inputs)
    torch.testing.assert_close(value, v[key], rtol=1e-5, atol=1e-6)
    value.backward()
    if lam == 0.75:
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, v[f"grad_{name}"], rtol=0, atol=1e-6)


def test_the_published_tasks_are_the_default() -> None:
    z = {"class": embeddings(0), "sex_age": embeddings(1)}
    labels = {task: LABELS[task] for task in z}
    expected = 0.75 * sup_con_loss(z["class"], labels["class"]) + 0.25 * sup_con_loss(z["sex_age"], labels["sex_age"])
    torch.testing.assert_close(MultiSupConLoss()(z, labels), expected)
    torch.testing.assert_close(multi_sup_con_loss(z, labels), expected)


def test_gradient_of_several_tasks_is_right() -> None:
    inputs = [z.requires_grad_() for z in by_task().values()]
    loss = MultiSupConLoss(WEIGHTS, 0.3)
    assert torch.autograd.gradcheck(lambda *z: loss(dict(zip(WEIGHTS, z, strict=True)), LABELS), inputs)


def test_a_task_without_weight_learns_nothing() -> None:
    z = {"class": embeddings(0).requires_grad_(), "sex_age": embeddings(1).requires_grad_()}
    MultiSupConLoss({"class": 1.0, "sex_age": 0.0})(z, {task: LABELS[task] for task in z}).backward()
    assert z["class"].grad is not None
    assert z["class"].grad.any()
    assert z["sex_age"].grad is not None
    assert not z["sex_age"].grad.any()


def test_each_task_has_a_memory_of_its_own_and_keeps_it() -> None:
    trained = MultiSupConLoss(WEIGHTS, memory=5)
    trained(by_task(), LABELS)
    resumed = build(describe(trained), Loss, "loss")
    resumed.load_state_dict(saved(trained), strict=True)
    found = resumed.state_dict()["losses.device._extra_state"]
    assert found["embeddings"].shape == (5, 6)
    assert torch.equal(resumed(by_task(), LABELS), trained(by_task(), LABELS))


def test_several_tasks_are_built_from_plain_data() -> None:
    loss = MultiSupConLoss(WEIGHTS, 0.1, "negatives", gather=True, memory=3)
    assert build(describe(loss), Loss, "loss").init_args == loss.init_args


def test_function_and_class_of_several_tasks_are_one() -> None:
    expected = MultiSupConLoss(WEIGHTS, 0.1, "negatives")(by_task(), LABELS)
    assert torch.equal(multi_sup_con_loss(by_task(), LABELS, WEIGHTS, 0.1, "negatives", gather=True), expected)


@pytest.mark.parametrize("way", ["class", "function"])
@pytest.mark.parametrize(
    ("z_tasks", "label_tasks"),
    [(["class"], ["class", "sex"]), (["class", "sex"], ["sex"]), (["age", "class", "sex"], ["age", "class", "sex"])],
    ids=["embeddings-missing", "labels-missing", "without-weight"],
)
def test_tasks_that_do_not_fit_are_named(z_tasks: list[str], label_tasks: list[str], way: str) -> None:
    weights = {"class": 0.5, "sex": 0.5}
    z, labels = dict.fromkeys(z_tasks, embeddings(0)), dict.fromkeys(label_tasks, LABELS["class"])
    message = re.escape(f"but there are embeddings of {z_tasks} and labels of {label_tasks}; give both for each")
    with pytest.raises(ValueError, match=message):
        MultiSupConLoss(weights)(z, labels) if way == "class" else multi_sup_con_loss(z, labels, weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"weights must be finite and at least 0, one of them positive, got \{\}"),
        ({"class": 0.0}, "one of them positive, got {'class': 0.0}"),
        ({"class": 1.0, "sex": -0.1}, "must be finite and at least 0, .* 'sex': -0.1"),
        ({"class": float("nan")}, "must be finite .* nan"),
        ({"class": float("inf")}, "must be finite .* inf"),
        ({"": 1.0}, "a task must have a name without '.' that torch.nn.ModuleDict can hold, got ''"),
        ({"sex.age": 1.0}, "got 'sex.age'"),
        ({"type": 1.0}, "got 'type'"),
    ],
    ids=["none", "zero", "negative", "nan", "infinite", "nameless", "dotted", "attribute"],
)
def test_weights_without_meaning_are_refused_at_once(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiSupConLoss(weights)


# ------------------------------------------------------------------------------------------------- beside cross-entropy


@pytest.mark.parametrize("labels", [LABELS["class"], UNKNOWN, LABELS["device"]], ids=["known", "some", "unknown"])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.0, 0.1]], ids=["equal", "weighted"])
def test_hybrid_is_the_weighted_sum(weight: list[float] | None, labels: Tensor) -> None:
    z, loss = embeddings(0), HybridSupConLoss(0.3, 1.7, 0.2, weight, "negatives")
    ce, supcon = cross_entropy(logits(), labels, weight), sup_con_loss(z, labels, 0.2, "negatives")
    assert loss.terms(logits(), z, labels) == {"ce": ce, "supcon": supcon}
    torch.testing.assert_close(loss(logits(), z, labels), 0.3 * ce + 1.7 * supcon)
    assert hybrid_sup_con_loss(logits(), z, labels, 0.3, 1.7, 0.2, weight, "negatives", True) == loss(
        logits(), z, labels
    )


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_hybrid_reproduces_the_released_code(vectors: Any, alpha: float) -> None:
    """Whose alpha is the weight of SupCon."""
    v = vectors("hybrid")
    leaves = {name: v[name].clone().requires_grad_() for name in ("logits1", "logits2", "proj1", "proj2")}
    inputs = (
        torch.cat([leaves["logits1"], leaves["logits2"]]),
        torch.cat([leaves["proj1"], leaves["proj2"]]),
        v["labels"].repeat(2),
    )
    loss = HybridSupConLoss(1 - alpha, alpha, v["tau"].item(), v["class_weights"].tolist())
    terms = loss.terms(*inputs)
    torch.testing.assert_close(terms["ce"], v["ce_weighted"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["supcon"], v["supcon"], rtol=1e-5, atol=1e-6)
    value = loss(*inputs)
    torch.testing.assert_close(value, v[f"loss_alpha{alpha}"], rtol=1e-5, atol=1e-6)
    value.backward()
    if alpha == 0.3:
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, v[f"grad_alpha0_3_{name}"], rtol=0, atol=1e-6)
    unweighted = HybridSupConLoss(temperature=v["tau"].item()).terms(*inputs)["ce"]
    torch.testing.assert_close(unweighted, v["ce_unweighted"], rtol=1e-5, atol=1e-6)


def test_the_balanced_weights_of_hybrid_are_the_published_ones(vectors: Any) -> None:
    v = vectors("hybrid")
    inputs = (torch.cat([v["logits1"], v["logits2"]]), torch.cat([v["proj1"], v["proj2"]]), v["labels"].repeat(2))
    loss = HybridSupConLoss(temperature=v["tau"].item(), weight="balanced")
    loss.use_class_counts(v["class_counts"].tolist())
    torch.testing.assert_close(loss(*inputs), v["loss_alpha0.5"], rtol=1e-5, atol=1e-6)


def test_hybrid_needs_class_counts_for_balanced_weights() -> None:
    loss = HybridSupConLoss(weight="balanced")
    with pytest.raises(RuntimeError, match=r"HybridSupConLoss.* has no class counts yet; call use_class_counts"):
        loss(logits(), embeddings(0), LABELS["class"])
    with pytest.raises(LabelError, match="class 1 has 0 cycles in the train split"):
        loss.use_class_counts([5, 0, 1])


def test_gradient_of_hybrid_is_right() -> None:
    inputs = (logits().requires_grad_(), embeddings(0).requires_grad_())
    loss = HybridSupConLoss(0.3, 0.7, 0.3, [0.5, 2.0, 1.0, 0.1])
    assert torch.autograd.gradcheck(lambda scores, z: loss(scores, z, UNKNOWN), inputs)


def test_hybrid_is_computed_in_float32_under_autocast() -> None:
    scores, z = (100 * logits()).bfloat16().requires_grad_(), (100 * embeddings(0)).bfloat16().requires_grad_()
    loss = HybridSupConLoss()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(scores, z, UNKNOWN)
    value.backward()
    assert value.dtype == torch.float32
    expected = loss(scores.detach().double(), z.detach().double(), UNKNOWN)
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0)
    for leaf in (scores, z):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_hybrid_counts_the_anchors_without_a_positive() -> None:
    loss = HybridSupConLoss()
    loss(logits(), embeddings(0), LABELS["class"])
    assert loss.left_out == 1


def test_hybrid_keeps_class_weights_and_memory() -> None:
    trained = HybridSupConLoss(weight="balanced", memory=5)
    trained.use_class_counts([30, 10, 7, 1])
    trained(logits(), embeddings(0), LABELS["class"])
    resumed = build(describe(trained), Loss, "loss")
    resumed.load_state_dict(saved(trained), strict=True)
    inputs = (logits(), embeddings(1), UNKNOWN)
    assert torch.equal(copy.deepcopy(resumed)(*inputs), trained(*inputs))
    assert resumed(*inputs) != HybridSupConLoss()(*inputs)


def test_hybrid_is_built_from_plain_data() -> None:
    loss = HybridSupConLoss(0.1, 0.9, 0.07, [1.0, 2.0], "negatives", True, 4)
    assert build(describe(loss), Loss, "loss").init_args == loss.init_args


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ce_weight": -1.0}, "weights must be finite and at least 0, one of them positive, got {'ce': -1.0"),
        ({"ce_weight": 0.0, "supcon_weight": 0.0}, "one of them positive"),
        ({"supcon_weight": float("nan")}, "'supcon': nan"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"denominator": "none"}, "denominator must be one of"),
        ({"weight": "inverse"}, "weight must be 'balanced', None or finite numbers"),
        ({"memory": -2}, "memory must be a whole number of samples"),
    ],
    ids=["negative", "zero", "nan", "temperature", "denominator", "class-weight", "memory"],
)
def test_settings_of_hybrid_without_meaning_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridSupConLoss(**settings)


def test_logits_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits must have shape \(B, C\) and labels \(B,\), got \(4, 4\) and \(8,\)"):
        HybridSupConLoss()(logits()[:4], embeddings(0), LABELS["class"])
