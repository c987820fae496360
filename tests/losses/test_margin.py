"""ArcFace, CosFace and AdaFace: against their equations, the reference vectors and pytorch-metric-learning."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.component import Loss
from respiro.errors import LabelError
from respiro.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    DualFactorAngularMarginLoss,
    LDAMLoss,
    LogitAdjustedCrossEntropy,
    ada_face_loss,
    arc_face_loss,
    cos_face_loss,
)

COUNTS = [2063, 1215, 501, 363]
LABELS = {
    "all": [0, 1, 2, 3, 0, 3, 1, 2],
    "one-class": [2] * 8,
    "some-unknown": [0, -1, 2, 3, -1, 3, 1, -1],
    "none": [-1] * 8,
}
BEYOND: list[Any] = ["fallback", "clip", "none"]
DFAM = DualFactorAngularMarginLoss(COUNTS)
#: Every margin loss as a function of cosines and labels alone.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f"arcface-{name}": ArcFaceLoss(beyond=name) for name in BEYOND},
    "cosface": CosFaceLoss(),
    "adaface": lambda x, y: ada_face_loss(x, y, strengths(len(x))),
    "ldam": LDAMLoss(COUNTS),
    "dfam": lambda x, y: DFAM(x, y, (strengths(len(x)) + 1) / 2),
}
NORMS = torch.rand(8, generator=torch.Generator().manual_seed(0)) * 30
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def cosines(rows: int = 8, classes: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 1.9 - 0.95).to(dtype)


def strengths(rows: int) -> Tensor:
    return torch.linspace(-1, 1, rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the equations


def mean_over(x: Tensor, labels: list[int], scale: float, moved: Callable[[float, int], float]) -> float:
    """Mean of the cross-entropies of the labelled rows, term by term, with the cosine of the true class moved."""
    losses = []
    for row, (values, label) in enumerate(zip(x.tolist(), labels, strict=True)):
        if label != -1:
            values[label] = moved(values[label], row)
            log_sum = math.log(sum(math.exp(scale * (value - max(values))) for value in values))
            losses.append(log_sum - scale * (values[label] - max(values)))
    return sum(losses) / len(losses) if losses else 0.0


def loop_arc_face(x: Tensor, labels: list[int], beyond: str, margin: float = 0.5) -> float:
    def moved(cosine: float, _row: int) -> float:
        theta = math.acos(cosine)
        if beyond == "fallback" and theta > math.pi - margin:
            return cosine - margin * math.sin(margin)
        return math.cos(min(max(theta + margin, 1e-4), math.pi - 1e-4) if beyond == "clip" else theta + margin)

    return mean_over(x, labels, 64.0, moved)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("beyond", BEYOND)
def test_arc_face_is_its_equation(beyond: Any, labels: list[int]) -> None:
    found = ArcFaceLoss(beyond=beyond)(cosines(), torch.tensor(labels))
    assert found.item() == pytest.approx(loop_arc_face(cosines(), labels, beyond), rel=1e-9)
    assert arc_face_loss(cosines(), torch.tensor(labels), beyond=beyond) == found


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_cos_face_is_its_equation(labels: list[int]) -> None:
    found = CosFaceLoss(30.0, 0.4)(cosines(), torch.tensor(labels))
    assert found.item() == pytest.approx(mean_over(cosines(), labels, 30.0, lambda c, _: c - 0.4), rel=1e-9)
    assert cos_face_loss(cosines(), torch.tensor(labels), 30.0, 0.4) == found


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_ada_face_is_its_equation(labels: list[int]) -> None:
    def moved(cosine: float, row: int) -> float:
        g = strengths(8)[row].item()
        return math.cos(math.acos(cosine) - 0.4 * g) - (0.4 + 0.4 * g)

    found = ada_face_loss(cosines(), torch.tensor(labels), strengths(8))
    assert found.item() == pytest.approx(mean_over(cosines(), labels, 64.0, moved), rel=1e-9)


@pytest.mark.parametrize(
    "loss",
    [*(ArcFaceLoss(20.0, 0.0, name) for name in BEYOND), CosFaceLoss(20.0, 0.0), LDAMLoss(COUNTS, 0.0, 20.0)],
    ids=[*BEYOND, "cosface", "ldam"],
)
def test_no_margin_is_the_normalised_softmax(loss: Loss) -> None:
    x, y = cosines(), torch.tensor(LABELS["all"])
    torch.testing.assert_close(loss(x, y), F.cross_entropy(20 * x, y))


@pytest.mark.parametrize("kind", [ArcFaceLoss, CosFaceLoss, AdaFaceLoss])
def test_a_larger_margin_is_a_larger_loss(kind: Any) -> None:
    x, y, norms = cosines() * 0.5, torch.tensor(LABELS["all"]), torch.full((8,), 20.0)
    losses = [
        kind(margin=margin).eval()(x, y, *([norms] if kind is AdaFaceLoss else [])).item()
        for margin in (0.0, 0.1, 0.3, 0.6)
    ]
    assert losses == sorted(set(losses))


# ------------------------------------------------------------------------------------------------ the reference vectors


@pytest.fixture(params=[4, 7], ids=["icbhi", "sprsound"])
def vectors(request: pytest.FixtureRequest, golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "qlung" / f"margins{request.param}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def one_by_one(loss: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """The loss of each row by itself."""
    return torch.stack([loss(*(part[row : row + 1] for part in arguments)) for row in range(len(arguments[0]))])


PRECISE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("arcface", ArcFaceLoss(beyond="none")),
        ("arcface_fallback", ArcFaceLoss()),
        ("arcface_clip", ArcFaceLoss(beyond="clip")),
        ("cosface", CosFaceLoss(margin=0.4)),
    ],
    ids=["arcface", "arcface-fallback", "arcface-clip", "cosface"],
)
def test_reference_losses(vectors: dict[str, Tensor], name: str, loss: Loss) -> None:
    x, labels, expected = vectors["cos"], vectors["label"], vectors[f"{name}_loss"]
    torch.testing.assert_close(one_by_one(loss, x, labels), expected, **PRECISE)
    torch.testing.assert_close(loss(x, labels), expected.mean(), **PRECISE)
    torch.testing.assert_close(loss(x.float(), labels), expected.mean().float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "momentum"), [("adaface", 1.0), ("adaface_ema", 0.01)], ids=["batch", "moving"])
def test_reference_losses_of_ada_face(vectors: dict[str, Tensor], name: str, momentum: float) -> None:
    loss = AdaFaceLoss(momentum=momentum)
    found = loss(vectors["cos"], vectors["label"], vectors["norm"])
    torch.testing.assert_close(found, vectors[f"{name}_loss"].mean(), **PRECISE)
    torch.testing.assert_close(loss.mean, vectors[f"{name}_mean"].float())
    torch.testing.assert_close(loss.std, vectors[f"{name}_std"].float())
    strength = vectors[f"{name}_scaler"]
    rows = one_by_one(ada_face_loss, vectors["cos"], vectors["label"], strength)
    torch.testing.assert_close(rows, vectors[f"{name}_loss"], **PRECISE)


# ---------------------------------------------------------------------------------------------- pytorch-metric-learning


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.2])
@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss"])
def test_the_losses_of_pytorch_metric_learning(name: str, margin: float) -> None:
    theirs_of = pytest.importorskip("pytorch_metric_learning.losses")
    z = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    labels = torch.arange(64) % 4
    given = math.degrees(margin) if name == "ArcFaceLoss" else margin
    theirs = getattr(theirs_of, name)(num_classes=4, embedding_size=5, margin=given, scale=30).double()
    ours = ArcFaceLoss(30.0, margin) if name == "ArcFaceLoss" else CosFaceLoss(30.0, margin)
    expected = theirs(z, labels)
    found = ours(F.normalize(z) @ F.normalize(theirs.W, dim=0), labels)
    torch.testing.assert_close(found, expected, **PRECISE)
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(found, (z, theirs.W)), torch.autograd.grad(expected, (z, theirs.W)), strict=True
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@each
def test_gradient_is_right(loss: Callable[..., Tensor], labels: list[int]) -> None:
    x, y = cosines().requires_grad_(), torch.tensor(labels)
    assert torch.autograd.gradcheck(lambda x: loss(x, y), (x,))
    x.grad = None
    (2.5 * loss(x, y)).backward()
    assert x.grad is not None
    assert not x.grad[y == -1].any()


def written_out(x: Tensor, own: Tensor, nearest: float, edge: float | None, margin: float) -> Tensor:
    """``cos(theta + margin)`` as one writes it down, through which autograd finds its own way."""
    angle = own.clamp(nearest - 1, 1 - nearest).acos() + margin
    return (angle if edge is None else angle.clamp(edge, math.pi - edge)).cos()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("loss", "scale", "moved"),
    [
        (ArcFaceLoss(), 64.0, None),
        (ArcFaceLoss(beyond="clip"), 64.0, lambda x, own: written_out(x, own, 1e-6, 1e-4, 0.5)),
        (ArcFaceLoss(beyond="none"), 64.0, lambda x, own: written_out(x, own, 1e-6, None, 0.5)),
        (
            lambda x, y: ada_face_loss(x, y, torch.full((len(x),), 0.5)),
            64.0,
            lambda x, own: written_out(x, own, 1e-3, 1e-3, -0.2) - 0.6,
        ),
        (
            lambda x, y: DualFactorAngularMarginLoss([1, 1], 0.4, 0.5, 0.2)(x, y, torch.ones(len(x))),
            15.0,
            lambda x, own: written_out(x, own, 1e-6, 1e-3, 0.3),
        ),
    ],
    ids=["fallback", "clip", "none", "adaface", "dfam"],
)
def test_gradient_is_autograds_where_anything_is_clipped(
    loss: Callable[..., Tensor], scale: float, moved: Callable[..., Tensor] | None, dtype: torch.dtype
) -> None:
    own = torch.tensor([1, 1 - 1e-7, 0.9999, 0.9, 0.3, 0, -0.5, -0.8, -0.9, -0.99, -0.9999, -1], dtype=dtype)
    x = torch.stack([own, torch.full_like(own, 0.2)], dim=1).requires_grad_()
    y = torch.zeros(len(own), dtype=torch.int64)
    if moved is None:  # the fallback

        def moved(x: Tensor, own: Tensor) -> Tensor:
            theta = own.clamp(1e-6 - 1, 1 - 1e-6).acos()
            return torch.where(theta > math.pi - 0.5, own - 0.5 * math.sin(0.5), (theta + 0.5).cos())

    plain = F.cross_entropy(scale * torch.cat([moved(x, x[:, 0])[:, None], x[:, 1:]], dim=1), y)
    found = loss(x, y)
    torch.testing.assert_close(found, plain, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-5)
    (expected,) = torch.autograd.grad(plain, x)
    (grad,) = torch.autograd.grad(found, x)
    assert grad.isfinite().all()
    precision = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(grad, expected, **precision)


@each
def test_a_second_derivative_is_refused_rather_than_wrong(loss: Callable[..., Tensor]) -> None:
    x = cosines().requires_grad_()
    value = loss(x.sin(), torch.tensor(LABELS["all"]))
    with pytest.raises(RuntimeError, match="can be differentiated once only; leave create_graph=True out"):
        torch.autograd.grad(value, x, create_graph=True)


@each
def test_backward_twice_gives_the_same(loss: Callable[..., Tensor]) -> None:
    x = cosines().requires_grad_()
    value = loss(x, torch.tensor(LABELS["all"]))
    first, second = (torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ----------------------------------------------------------------------------------------------------------- edge cases


@each
@pytest.mark.parametrize("labels", [[], [-1, -1]], ids=["empty", "unknown"])
def test_a_batch_without_labels_gives_zero_with_gradient(loss: Callable[..., Tensor], labels: list[int]) -> None:
    x = cosines(len(labels)).requires_grad_()
    value = loss(x, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["plain", "bf16", "fp16"])
@each
def test_finite_at_the_ends_of_the_cosine(
    loss: Callable[..., Tensor], autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    x = torch.tensor([[1.0, -1, 0, 1], [-1, 1, -1, 1], [1, 1, 1, 1], [-1, -1, -1, -1]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = loss(x, torch.tensor([0, 0, 1, 2]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


@each
def test_the_input_is_not_changed(loss: Callable[..., Tensor]) -> None:
    x, y = cosines(), torch.tensor(LABELS["some-unknown"])
    before = x.clone(), y.clone()
    loss(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@each
def test_compiled_it_is_the_same(loss: Callable[..., Tensor]) -> None:
    x, y = cosines().requires_grad_(), torch.tensor(LABELS["some-unknown"])
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    expected, found = loss(x, y), compiled(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ArcFaceLoss, {"margin": 28.6}, r"radians, in \[0, pi\), got 28.6 \(28.6 degrees are 0.4992 radians\)"),
        (ArcFaceLoss, {"margin": math.pi}, r"margin must be in radians, in \[0, pi\), got 3.14"),
        (ArcFaceLoss, {"margin": -0.1}, r"margin must be in radians, in \[0, pi\), got -0.1"),
        (ArcFaceLoss, {"margin": float("nan")}, "got nan"),
        (ArcFaceLoss, {"scale": 0}, "scale must be positive and finite, got 0"),
        (ArcFaceLoss, {"beyond": "wrap"}, "beyond must be one of 'fallback', 'clip', 'none', got 'wrap'"),
        (CosFaceLoss, {"margin": -0.1}, r"margin is a difference of cosines and must lie in \[0, 2\), got -0.1"),
        (CosFaceLoss, {"margin": 28.6}, r"must lie in \[0, 2\), got 28.6"),
        (CosFaceLoss, {"scale": float("inf")}, "scale must be positive and finite, got inf"),
        (AdaFaceLoss, {"margin": 4}, r"margin must be in radians, in \[0, pi\), got 4 \(4 degrees are 0.06981 rad"),
        (AdaFaceLoss, {"h": -1}, "h must be finite and not negative, got -1"),
        (AdaFaceLoss, {"momentum": 0}, r"momentum must be in \(0, 1\], got 0"),
        (AdaFaceLoss, {"eps": 0.0}, r"eps must be in \(0, 0.1\), got 0.0"),
    ],
)
def test_arguments_without_meaning(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
    if arguments.keys() <= {"scale", "margin", "beyond"}:
        function, *more = {
            ArcFaceLoss: (arc_face_loss,),
            CosFaceLoss: (cos_face_loss,),
            AdaFaceLoss: (ada_face_loss, torch.ones(8)),
        }[kind]
        with pytest.raises(ValueError, match=message):
            function(cosines(), torch.tensor(LABELS["all"]), *more, **arguments)


@each
@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1.02, "give the head's cosines, not its logits"),
        (-37.0, "not its logits"),
        (float("nan"), "look at the embeddings"),
    ],
)
def test_logits_given_for_cosines(loss: Callable[..., Tensor], value: float, hint: str) -> None:
    x = cosines()
    x[3, 2] = value
    with pytest.raises(ValueError, match=rf"cosines must lie in \[-1, 1\], got .*; .*{hint}"):
        loss(x, torch.tensor(LABELS["all"]))


@each
@pytest.mark.parametrize("label", [-2, 4])
def test_labels_that_are_no_class(loss: Callable[..., Tensor], label: int) -> None:
    with pytest.raises(LabelError, match=r"labels must lie in \[-1, 4\) for cosines of 4 classes, got \[0, "):
        loss(cosines(2), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"cosines must have shape \(B, C\) and labels \(B,\), got \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(3).long(), r"got \(2, 4\) and \(3,\)"),
        (torch.zeros(2, 4).long(), torch.zeros(2).long(), "cosines must be floating point, got torch.int64"),
        (torch.zeros(2, 4), torch.zeros(2), "labels must be int64, got torch.float32; labels.long()"),
        (torch.zeros(2, 4), torch.zeros(2).int(), "labels must be int64, got torch.int32"),
    ],
    ids=["flat", "more-labels", "integers", "float-labels", "short-labels"],
)
def test_shapes_that_do_not_fit(x: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArcFaceLoss()(x, labels)


def test_norms_that_do_not_fit() -> None:
    y = torch.tensor(LABELS["all"])
    with pytest.raises(ValueError, match=r"norms must have the shape of labels, \(8,\), got \(8, 1\)"):
        AdaFaceLoss()(cosines(), y, NORMS[:, None])
    with pytest.raises(ValueError, match=r"strength must have the shape of labels, \(8,\), got \(1,\)"):
        ada_face_loss(cosines(), y, torch.ones(1))


# -------------------------------------------------------------------------------------------------------- two processes

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from respiro.losses import AdaFaceLoss, DualFactorAngularMarginLoss, LDAMLoss, LogitAdjustedCrossEntropy

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
batch = torch.load(f"{folder}/batch.pt")
half = slice(4 * rank, 4 * rank + 4)
x, y, quality, norms = (batch[name][half] for name in ("x", "y", "quality", "norms"))
ada = AdaFaceLoss()
losses = {
    "ldam": (LDAMLoss(), (x, y)), "logit-adjusted": (LogitAdjustedCrossEntropy(), (x, y)),
    "dfam": (DualFactorAngularMarginLoss(), (x, y, quality)), "ada": (ada, (x, y, norms)),
}
found = {}
for name, (loss, arguments) in losses.items():
    loss.use_class_counts(batch["counts"])
    value = loss(*arguments) / 2
    dist.all_reduce(value)
    found[name] = value.item()
found["mean"] = ada.mean.item()
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    """Class counts are those of the whole train split, whatever a process sees; norms are those that it sees."""
    y = torch.tensor([0, 0, 0, 1, 2, 3, 3, 3])
    batch = {"x": cosines(), "y": y, "quality": (strengths(8) + 1) / 2, "norms": NORMS, "counts": COUNTS}
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    commands = [[sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(rank)] for rank in (0, 1)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()  # one that waits for the other, which failed
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    whole = {
        "ldam": LDAMLoss(COUNTS)(cosines(), y),
        "logit-adjusted": LogitAdjustedCrossEntropy(COUNTS)(cosines(), y),
        "dfam": DualFactorAngularMarginLoss(COUNTS)(cosines(), y, batch["quality"]),
    }
    for name, expected in whole.items():
        assert [each[name] for each in found] == pytest.approx([expected.item()] * 2, rel=1e-12), name
    halves = [AdaFaceLoss()(cosines()[half], y[half], NORMS[half]) for half in (slice(0, 4), slice(4, 8))]
    assert found[0]["ada"] == pytest.approx((sum(halves) / 2).item(), rel=1e-9)
    assert [each["mean"] for each in found] == pytest.approx([NORMS[:4].mean().item(), NORMS[4:].mean().item()])
