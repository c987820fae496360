from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from respiro.component import Loss, build, describe
from respiro.losses import MultiSupConLoss, NTXentLoss, SupConLoss, nt_xent_loss, sup_con_loss
from respiro.losses._contrast import Samples, anchor_losses

LABELS = {
    "balanced": [0, 0, 1, 1, 2, 2, 3, 3],
    "unequal": [0, 0, 0, 1, 1, 0, 2, 2],
    "singletons": [0, 0, 1, 2, 3, 3, 4, 5],
    "one-class": [2] * 8,
    "unknown": [0, -1, 0, 1, -1, 1, 2, -1],
    "one-known-class": [0, -1, 0, 0, -1, -1, -1, -1],
    "no-label": [-1] * 8,
    "no-positive-pair": [0, 1, 2, 3, 4, 5, 6, -1],
}
LEFT_OUT = {  # of "all", and of "negatives"
    "balanced": (0, 0),
    "unequal": (0, 0),
    "singletons": (4, 4),
    "one-class": (0, 8),
    "unknown": (1, 1),
    "one-known-class": (0, 3),
    "no-label": (0, 0),
    "no-positive-pair": (7, 7),
}
DENOMINATORS = ["all", "negatives"]


def embeddings(seed: int, rows: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(
    z: list[list[float]], labels: list[int], tau: float = 0.06, denominator: str = "all", anchors: int | None = None
) -> float:
    """The equation of the paper, sum by sum, over the first rows as anchors."""

    def similarity(i: int, j: int) -> float:
        lengths = math.hypot(*z[i]) * math.hypot(*z[j])
        return sum(x * y for x, y in zip(z[i], z[j], strict=True)) / lengths / tau if lengths else 0.0

    losses = []
    for i in range(len(z) if anchors is None else anchors):
        others = [j for j in range(len(z)) if j != i and labels[j] != -1]
        positives = [j for j in others if labels[j] == labels[i]]
        contrasted = [j for j in others if denominator == "all" or labels[j] != labels[i]]
        if labels[i] == -1 or not positives or not contrasted:
            continue
        log_sum = math.log(sum(math.exp(similarity(i, j)) for j in contrasted))
        losses.append(-sum(similarity(i, p) - log_sum for p in positives) / len(positives))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("temperature", [0.06, 1.0])
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_the_loss_is_its_equation(labels: list[int], denominator: Any, temperature: float) -> None:
    z = embeddings(0).requires_grad_()
    loss = SupConLoss(temperature, denominator)(z, torch.tensor(labels))
    assert loss.item() == pytest.approx(loop(z.tolist(), labels, temperature, denominator), rel=1e-12, abs=1e-12)
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert not z.grad[torch.tensor(labels) == -1].any()


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("name", LABELS)
def test_anchors_with_nothing_to_contrast_are_counted(name: str, denominator: Any) -> None:
    loss = SupConLoss(denominator=denominator)
    assert loss.left_out.item() == 0
    loss(embeddings(0), torch.tensor(LABELS[name]))
    assert loss.left_out.shape == ()
    assert loss.left_out.item() == LEFT_OUT[name][DENOMINATORS.index(denominator)]


@pytest.mark.parametrize(
    ("labels", "denominator"),
    [
        (LABELS["no-label"], "all"),
        (LABELS["no-positive-pair"], "all"),
        (LABELS["no-positive-pair"], "negatives"),
        (LABELS["one-class"], "negatives"),
        ([3], "all"),
        ([], "all"),
        ([], "negatives"),
    ],
    ids=["unknown", "no-pair", "no-pair-negatives", "no-negative", "batch-of-one", "empty", "empty-negatives"],
)
def test_nothing_to_contrast_gives_zero_with_gradient(labels: list[int], denominator: Any) -> None:
    z = embeddings(0, len(labels)).requires_grad_()
    loss = SupConLoss(denominator=denominator)(z, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_a_collapsed_encoder_has_the_loss_of_guessing() -> None:
    z = torch.ones(8, 5, dtype=torch.float64)
    assert sup_con_loss(z, torch.tensor(LABELS["balanced"])).item() == pytest.approx(math.log(7))
    assert sup_con_loss(z, torch.tensor(LABELS["balanced"]), denominator="negatives").item() == pytest.approx(
        math.log(6)
    )


# ------------------------------------------------------------------------------------------------ the reference vectors

CASES = ["labels4_n8_d16_t006", "labels4_n32_d128_t006", "nolabels_n16_d128_t006", "allsame_n8_d32_t01"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "scl" / "supcon.npz") as file:
        found = {
            name.removeprefix(f"{request.param}/"): torch.from_numpy(file[name])
            for name in file
            if name.startswith(request.param)
        }
    if not found["has_labels"]:
        found["labels"] = torch.arange(len(found["z1"]))  # each sample a class of its own
    found["labels"] = found["labels"].repeat(2)
    return found


def both(case: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([case["z1"], case["z2"]]).to(dtype)


def test_reproduces_the_released_code(case: dict[str, Tensor]) -> None:
    z1, z2 = case["z1"].clone().requires_grad_(), case["z2"].clone().requires_grad_()
    loss = SupConLoss(case["tau"].item())(torch.cat([z1, z2]), case["labels"])
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z1.grad, case["grad_z1"], rtol=0, atol=1e-6)
    torch.testing.assert_close(z2.grad, case["grad_z2"], rtol=0, atol=1e-6)


def test_reproduces_the_released_code_in_float64(case: dict[str, Tensor]) -> None:
    loss = SupConLoss(case["tau"].item())(both(case, torch.float64), case["labels"])
    torch.testing.assert_close(loss, case["loss_float64"], rtol=1e-9, atol=1e-12)


def test_reproduces_each_anchor_of_the_released_code(case: dict[str, Tensor]) -> None:
    samples = Samples(F.normalize(both(case)), case["labels"])
    losses, usable = anchor_losses(samples, slice(0, len(case["labels"])), case["tau"].item(), "all")
    torch.testing.assert_close(losses, case["per_anchor"], rtol=1e-5, atol=1e-5)
    assert usable.all()


def test_reproduces_equation_2_of_the_paper(case: dict[str, Tensor]) -> None:
    """The reference has its mean and its sum; one class has no negatives, and so no such loss."""
    loss = SupConLoss(case["tau"].item(), "negatives")
    value = loss(both(case), case["labels"])
    if "paper_eq2_mean" not in case:
        assert value == 0
        assert loss.left_out == len(case["labels"])
        return
    torch.testing.assert_close(value, case["paper_eq2_mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value * len(case["labels"]), case["paper_eq2_sum"], rtol=1e-5, atol=1e-4)


def test_simclr_is_that_of_lightly_and_of_pytorch_metric_learning(case: dict[str, Tensor]) -> None:
    """lightly ignores labels, as SimCLR does; pytorch-metric-learning agrees where a sample has one positive."""
    found = NTXentLoss(case["tau"].item())(case["z1"], case["z2"])
    torch.testing.assert_close(found, case["lightly_ntxent"], rtol=1e-5, atol=1e-6)
    if not case["has_labels"]:
        torch.testing.assert_close(found, case["pml_ntxent"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, case["loss"], rtol=1e-5, atol=1e-6)


def test_simclr_is_cross_entropy_over_the_other_views() -> None:
    view1, view2 = embeddings(0), embeddings(1)
    z = F.normalize(torch.cat([view1, view2]))
    similarity = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
    expected = F.cross_entropy(similarity, torch.arange(16).roll(8))
    torch.testing.assert_close(NTXentLoss(0.2)(view1, view2), expected)


# ------------------------------------------------------------------------------------------------------ other libraries


@pytest.mark.parametrize("name", ["balanced", "unequal", "singletons"])
def test_agrees_with_pytorch_metric_learning(name: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    ours, theirs, labels = embeddings(0).requires_grad_(), embeddings(0).requires_grad_(), torch.tensor(LABELS[name])
    found, expected = SupConLoss(0.1)(ours, labels), losses.SupConLoss(0.1)(theirs, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_differs_from_pytorch_metric_learning() -> None:
    """One class alone gives 0 there; -1 is a class like any other; and its NTXentLoss is the mean over the pairs."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, labels = embeddings(0), torch.tensor(LABELS["unequal"])
    one_class = torch.tensor(LABELS["one-class"])
    assert losses.SupConLoss(0.1)(z, one_class) == 0
    assert sup_con_loss(z, one_class, 0.1).item() == pytest.approx(loop(z.tolist(), LABELS["one-class"], 0.1))

    unknown = torch.tensor(LABELS["unknown"])
    assert losses.SupConLoss(0.1)(z, unknown).item() == pytest.approx(
        loop(z.tolist(), [label % 4 for label in LABELS["unknown"]], 0.1)
    )
    assert sup_con_loss(z, unknown, 0.1).item() == pytest.approx(loop(z.tolist(), LABELS["unknown"], 0.1))

    similarity = F.normalize(z) @ F.normalize(z).T / 0.1
    pairs = []
    for i, p in ((i, p) for i in range(8) for p in range(8) if i != p and labels[i] == labels[p]):
        negatives = similarity[i, labels != labels[i]]
        pairs.append(torch.cat([similarity[i, p, None], negatives]).logsumexp(0) - similarity[i, p])
    theirs = losses.NTXentLoss(0.1)(z, labels)
    torch.testing.assert_close(theirs, torch.stack(pairs).mean())
    assert theirs.item() < sup_con_loss(z, labels, 0.1).item()  # whose sum holds the other positives too


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("name", ["unequal", "singletons", "unknown"])
def test_gradient_is_right(name: str, denominator: Any) -> None:
    labels = torch.tensor(LABELS[name])
    z = embeddings(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sup_con_loss(x, labels, 0.3, denominator), (z,))


def test_gradient_of_simclr_is_right() -> None:
    views = (embeddings(0, 4).requires_grad_(), embeddings(1, 4).requires_grad_())
    assert torch.autograd.gradcheck(lambda view1, view2: nt_xent_loss(view1, view2, 0.3), views)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("block", [1, 24, 8 * 8], ids=["an-anchor", "three-anchors", "all"])
def test_blocks_have_no_effect(block: int, denominator: Any) -> None:
    found = []
    for size in (10**6, block):
        z = F.normalize(embeddings(0)).requires_grad_()
        losses, usable = anchor_losses(
            Samples(z, torch.tensor(LABELS["unknown"])), slice(2, 8), 0.06, denominator, size
        )
        (losses * torch.arange(6)).sum().backward()
        found.append((losses.detach(), usable, z.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Notes the most numbers that a result held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_no_square_matrix_is_built(denominator: Any) -> None:
    z = torch.randn(4096, 4, requires_grad=True)
    with Largest() as largest:
        sup_con_loss(z, torch.randint(4, (4096,)), denominator=denominator).backward()
    assert largest.numbers <= 4096**2 / 4


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, denominator: Any) -> None:
    z = (100 * embeddings(0, dtype=dtype)).requires_grad_()
    loss = SupConLoss(0.01, denominator)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(z, torch.tensor(LABELS["unknown"]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loop(z.tolist(), LABELS["unknown"], 0.01, denominator), rel=1e-5)
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert z.grad.isfinite().all()


def test_backward_too_is_computed_in_float32_under_autocast() -> None:
    z, labels = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4096) % 4
    found = []
    for enabled in (False, True):
        x = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = sup_con_loss(x, labels)
            loss.backward()
        found.append((loss.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # several threads add up in any order


@pytest.mark.parametrize("labels", [LABELS["balanced"], LABELS["unknown"]], ids=["balanced", "unknown"])
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("length", [0.0, 1e-13], ids=["zero", "next-to-zero"])
def test_an_embedding_of_zeros_is_like_no_other_and_learns_nothing(
    length: float, denominator: Any, labels: list[int]
) -> None:
    z = embeddings(0)
    z[2:4] *= length / 10
    z.requires_grad_()
    loss = sup_con_loss(z, torch.tensor(labels), denominator=denominator)
    loss.backward()
    zeros = z.detach().clone()
    zeros[2:4] = 0
    assert loss.item() == pytest.approx(loop(zeros.tolist(), labels, 0.06, denominator))
    assert z.grad is not None
    assert not z.grad[2:4].any()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() < 1e3


@pytest.mark.parametrize("length", [1e-11, 1e30], ids=["short", "long"])
def test_the_length_of_an_embedding_has_no_effect(length: float) -> None:
    z, labels = embeddings(0, dtype=torch.float32), torch.tensor(LABELS["unequal"])
    expected = sup_con_loss(z, labels)
    z[3] *= length
    z.requires_grad_()
    loss = sup_con_loss(z, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_the_inputs_are_not_changed() -> None:
    z, labels = embeddings(0), torch.tensor(LABELS["unknown"])
    before = z.clone(), labels.clone()
    loss = SupConLoss(memory=4)
    for _ in range(2):
        loss(z, labels)
    assert torch.equal(z, before[0])
    assert torch.equal(labels, before[1])


# ----------------------------------------------------------------------------------------------------------- the memory


def steps(count: int = 5) -> list[tuple[Tensor, list[int]]]:
    names = ["unknown", "balanced", "no-positive-pair", "one-class", "singletons"]
    return [(embeddings(10 + i), LABELS[names[i % len(names)]]) for i in range(count)]


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("size", [3, 8, 20], ids=["less-than-a-batch", "a-batch", "more-than-a-batch"])
def test_the_memory_is_a_queue(size: int, denominator: Any) -> None:
    loss = SupConLoss(0.2, denominator, memory=size)
    queue: deque[tuple[list[float], int]] = deque(maxlen=size)
    for z, labels in steps():
        known = [*zip(z.tolist(), labels, strict=True), *queue]
        expected = loop([row for row, _ in known], [label for _, label in known], 0.2, denominator, anchors=8)
        z.requires_grad_()
        found = loss(z, torch.tensor(labels))
        found.backward()
        assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert z.grad is not None
        assert z.grad.isfinite().all()
        queue.extend(zip(z.tolist(), labels, strict=True))


def test_an_anchor_may_have_its_positive_in_the_memory() -> None:
    loss = SupConLoss(memory=8)
    loss(embeddings(0), torch.arange(8))
    assert loss.left_out == 8
    assert loss(embeddings(1), torch.arange(8)) > 0
    assert loss.left_out == 0


def test_gradient_with_a_memory_is_right() -> None:
    labels, trained = torch.tensor(LABELS["unequal"]), SupConLoss(0.3, memory=5)
    trained(embeddings(1), torch.tensor(LABELS["balanced"]))
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(trained)(x, labels), (embeddings(0).requires_grad_(),))


def test_only_training_fills_and_uses_the_memory() -> None:
    loss, labels = SupConLoss(memory=8), torch.tensor(LABELS["balanced"])
    with torch.no_grad():
        loss(embeddings(0), labels)
    assert loss.get_extra_state() is None
    loss.eval()
    alone = loss(embeddings(0), labels)
    assert loss.get_extra_state() is None
    loss.train()
    loss(embeddings(1), labels)
    assert loss.get_extra_state() is not None
    assert loss(embeddings(0), labels) > alone
    loss.eval()
    assert torch.equal(loss(embeddings(0), labels), alone)


def saved(loss: nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("size", [3, 20], ids=["full", "not-full"])
def test_a_resumed_training_goes_on_alike(size: int) -> None:
    trained = SupConLoss(memory=size)
    for z, labels in steps(2):
        trained(z, torch.tensor(labels))
    resumed = build(describe(trained), Loss, "loss")
    resumed.load_state_dict(saved(trained), strict=True)
    for z, labels in steps(4):
        assert torch.equal(resumed(z, torch.tensor(labels)), trained(z, torch.tensor(labels)))


def test_a_saved_memory_does_not_change() -> None:
    loss = SupConLoss(memory=8)
    loss(embeddings(0), torch.tensor(LABELS["balanced"]))
    state = loss.state_dict()["_extra_state"]
    assert not state["embeddings"].requires_grad
    state["labels"].fill_(7)
    assert loss.state_dict()["_extra_state"]["labels"].tolist() == LABELS["balanced"]


@pytest.mark.parametrize("size", [0, 3, 20])
def test_a_memory_of_another_size_takes_the_latest(size: int) -> None:
    trained, resumed = SupConLoss(memory=8), SupConLoss(memory=size)
    trained(embeddings(0), torch.tensor(LABELS["unequal"]))
    resumed.load_state_dict(saved(trained), strict=True)
    state = resumed.get_extra_state()
    assert (state["labels"].tolist() if state else []) == LABELS["unequal"][8 - min(size, 8) :]


def test_a_checkpoint_from_before_the_first_step_empties_the_memory() -> None:
    loss = SupConLoss(memory=8)
    fresh = saved(loss)
    loss(embeddings(0), torch.tensor(LABELS["balanced"]))
    loss.load_state_dict(fresh, strict=True)
    assert loss.get_extra_state() is None


def test_a_memory_of_another_width_is_refused() -> None:
    loss, labels = SupConLoss(memory=8), torch.tensor(LABELS["balanced"])
    loss(embeddings(0), labels)
    with pytest.raises(ValueError, match=r"embeddings of 4 numbers cannot be contrasted with a memory of .* 5; use a"):
        loss(embeddings(0)[:, :4], labels)


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("loss", [SupConLoss(0.1, "negatives", True, 5), NTXentLoss(0.1, gather=True)], ids=str)
def test_the_loss_is_built_from_plain_data(loss: Loss) -> None:
    assert build(describe(loss), Loss, "loss").init_args == loss.init_args


def test_function_and_class_are_one() -> None:
    z, labels = embeddings(0), torch.tensor(LABELS["unknown"])
    for denominator in ("all", "negatives"):
        for gather in (False, True):  # without other processes it changes nothing
            expected = SupConLoss(0.1, denominator)(z, labels)  # type: ignore[arg-type]  # a str from a loop
            assert torch.equal(sup_con_loss(z, labels, 0.1, denominator, gather), expected)  # type: ignore[arg-type]
    assert torch.equal(nt_xent_loss(z[:4], z[4:], 0.1, gather=True), NTXentLoss(0.1)(z[:4], z[4:]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"denominator": "positives"}, "denominator must be one of 'all', 'negatives', got 'positives'"),
        ({"embeddings": torch.zeros(8)}, r"embeddings must be floating point of shape \(B, D\), got torch.float32"),
        ({"embeddings": torch.zeros(8, 5).long()}, "embeddings must be floating point .* got torch.int64"),
        ({"embeddings": torch.full((8, 5), float("nan"))}, "embeddings holds values that are not finite"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"int64 of shape \(8,\), .* shape \(4,\); repeat them for"),
        ({"labels": torch.zeros(8)}, r"labels must be int64 of shape \(8,\), one for each embedding, got torch.float"),
        ({"labels": torch.full((8,), -2)}, r"labels must be classes from 0 on, or -1 where unknown, got \[-2,"),
    ],
    ids=[
        *["temperature-0", "temperature-nan", "denominator", "shape", "type", "nan"],
        *["labels-of-one-view", "labels-float", "labels-range"],
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    arguments = {"embeddings": embeddings(0), "labels": torch.tensor(LABELS["balanced"])}
    with pytest.raises(ValueError, match=message):
        sup_con_loss(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("view1", "view2", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), r"view1 and view2 must have the same shape, got \(3, 2\) and \(4, 2\)"),
        (torch.ones(3, 2), torch.ones(3), r"view2 must be floating point of shape \(B, D\)"),
        (torch.full((3, 2), float("inf")), torch.ones(3, 2), "view1 holds values that are not finite"),
    ],
    ids=["rows", "shape", "infinite"],
)
def test_views_that_do_not_fit(view1: Tensor, view2: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(view1, view2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"denominator": "none"}, "denominator must be one of"),
        ({"memory": -1}, "memory must be a whole number of samples, 0 for none, got -1"),
    ],
    ids=["temperature", "denominator", "memory"],
)
def test_settings_without_meaning_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupConLoss(**settings)


def test_simclr_refuses_a_temperature_without_meaning_at_once() -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        NTXentLoss(0)


# -------------------------------------------------------------------------------------------------------- two processes

# Each process holds half of the batch; the gradients are averaged as DistributedDataParallel does, which loads slowly.
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from respiro.losses import MultiSupConLoss, NTXentLoss, SupConLoss

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
batch = torch.load(f"{folder}/batch.pt")
half = slice(4 * rank, 4 * rank + 4)
found = {}

def note(name, compute):
    encoder = nn.Linear(4, 5, dtype=torch.float64)
    encoder.load_state_dict(batch["encoder"])
    loss = compute(encoder)
    loss.backward()
    value, gradient = loss.detach() / 2, encoder.weight.grad / 2
    dist.all_reduce(value)
    dist.all_reduce(gradient)
    found[name] = {"value": value.item(), "gradient": gradient.tolist()}

x, y = batch["x"][half], batch["y"][half]
labels = {name: torch.tensor(values)[half] for name, values in batch["labels"].items()}
for name in labels:
    for denominator in ("all", "negatives"):
        loss = SupConLoss(0.1, denominator, gather=True)
        note(f"{name}-{denominator}", lambda encoder: loss(encoder(x), labels[name]))
        found[f"{name}-{denominator}"]["left_out"] = loss.left_out.item()
note("nt_xent", lambda encoder: NTXentLoss(0.1, gather=True)(encoder(x), encoder(y)))
multi = MultiSupConLoss({"balanced": 0.75, "unknown": 0.25}, 0.1, gather=True)
note("multi", lambda encoder: multi(
    {"balanced": encoder(x), "unknown": encoder(x).flip(1) ** 3}, {task: labels[task] for task in multi.weights}))
loss = SupConLoss(0.1, gather=True, memory=10)
note("memory", lambda encoder: loss(encoder(x), labels["unequal"]) + loss(encoder(y), labels["unknown"]))
found["memory"]["state"] = [values.tolist() for values in loss.get_extra_state().values()]
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "encoder": {"weight": numbers(5, 4), "bias": numbers(5)},
        "x": numbers(8, 4),
        "y": numbers(8, 4),
        "labels": {**LABELS, "second-unknown": [0, 1, 0, 1, -1, -1, -1, -1], "pairs-across": [0, 1, 2, 3, 3, 1, -1, 5]},
    }


@pytest.fixture(scope="module")
def two_processes(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gather")
    torch.save(whole, folder / "batch.pt")
    (folder / "script.py").write_text(SCRIPT)
    commands = [[sys.executable, str(folder / "script.py"), str(folder), str(rank)] for rank in (0, 1)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()  # one that waits for the other, which failed
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def check(whole: dict[str, Any], two_processes: list[dict[str, Any]], name: str, compute: Any) -> None:
    encoder = nn.Linear(4, 5, dtype=torch.float64)
    encoder.load_state_dict(whole["encoder"])
    loss = compute(encoder)
    loss.backward()
    assert encoder.weight.grad is not None
    for found in two_processes:
        assert found[name]["value"] == pytest.approx(loss.item(), abs=1e-12)
        gradient = torch.tensor(found[name]["gradient"], dtype=torch.float64)
        torch.testing.assert_close(gradient, encoder.weight.grad)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("name", [*LABELS, "second-unknown", "pairs-across"])
def test_two_processes_are_one_with_the_whole_batch(
    whole: dict[str, Any], two_processes: list[dict[str, Any]], name: str, denominator: Any
) -> None:
    loss, labels = SupConLoss(0.1, denominator), torch.tensor(whole["labels"][name])
    check(whole, two_processes, f"{name}-{denominator}", lambda encoder: loss(encoder(whole["x"]), labels))
    left_out = [found[f"{name}-{denominator}"]["left_out"] for found in two_processes]
    assert sum(left_out) == loss.left_out


def test_two_processes_of_simclr(whole: dict[str, Any], two_processes: list[dict[str, Any]]) -> None:
    loss = NTXentLoss(0.1)
    check(whole, two_processes, "nt_xent", lambda encoder: loss(encoder(whole["x"]), encoder(whole["y"])))


def test_two_processes_with_several_tasks(whole: dict[str, Any], two_processes: list[dict[str, Any]]) -> None:
    loss = MultiSupConLoss({"balanced": 0.75, "unknown": 0.25}, 0.1)
    labels = {task: torch.tensor(LABELS[task]) for task in loss.weights}

    def compute(encoder: nn.Module) -> Tensor:
        z = encoder(whole["x"])
        value: Tensor = loss({"balanced": z, "unknown": z.flip(1) ** 3}, labels)
        return value

    check(whole, two_processes, "multi", compute)


def test_two_processes_have_one_memory(whole: dict[str, Any], two_processes: list[dict[str, Any]]) -> None:
    loss = SupConLoss(0.1, memory=10)
    first, second = (torch.tensor(LABELS[name]) for name in ("unequal", "unknown"))

    def compute(encoder: nn.Module) -> Tensor:
        value: Tensor = loss(encoder(whole["x"]), first) + loss(encoder(whole["y"]), second)
        return value

    check(whole, two_processes, "memory", compute)
    state = loss.get_extra_state()
    assert state is not None
    for found in two_processes:
        remembered, labels = found["memory"]["state"]
        assert labels == state["labels"].tolist()
        torch.testing.assert_close(torch.tensor(remembered, dtype=torch.float64), state["embeddings"])
