"""What a margin costs beside plain cross-entropy on the same logits. Run with ``-m benchmark -s``.

Forward and backward from the cosines on; pytorch-metric-learning's losses hold their own head, so that they are
compared with ours on a :class:`CosineHead`. What is compared takes turns, and the quickest of many rounds counts. On a
CPU it is time on the processor, all threads together, as other programs may use the same cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from respiro.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    DualFactorAngularMarginLoss,
    LDAMLoss,
    LogitAdjustedCrossEntropy,
    cross_entropy,
)
from respiro.models import CosineHead

pytestmark = pytest.mark.benchmark

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPES = [(8, 4), (64, 4), (1024, 4), (8192, 7)]
WIDTH, SCALE, ROUNDS = 128, 30.0, 60
Ways = dict[str, Callable[[], Tensor]]


def microseconds(ways: Ways, leaves: list[Tensor]) -> dict[str, float]:
    """Of a forward and a backward pass, the quickest of several rounds."""
    clock = time.process_time if leaves[0].device.type == "cpu" else time.perf_counter

    def round_of(compute: Callable[[], Tensor], times: int) -> float:
        started = clock()
        for _ in range(times):
            for leaf in leaves:
                leaf.grad = None
            loss = compute()
            loss.backward()
        loss.item()  # waits for the device
        return (clock() - started) / times

    for compute in ways.values():
        round_of(compute, 3)
    times = {name: max(3, int(0.004 / round_of(compute, 3))) for name, compute in ways.items()}
    rounds = [{name: round_of(compute, times[name]) for name, compute in ways.items()} for _ in range(ROUNDS)]
    return {name: 1e6 * min(each[name] for each in rounds) for name in ways}


def show(title: str, found: dict[str, float], *against: str) -> None:
    print(f"\n{title}")
    for name, each in found.items():
        ratios = ", ".join(f"{each / found[other]:5.2f} of {other}" for other in against)
        print(f"  {name:28} {each:8.1f} us  ({ratios})")


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_margins_beside_cross_entropy(rows: int, classes: int, device: str) -> None:
    x = (torch.rand(rows, classes, device=device) * 1.8 - 0.9).requires_grad_()
    y, quality = torch.randint(classes, (rows,), device=device), torch.rand(rows, device=device)
    norms, counts = 30 * quality, list(range(10, 10 + classes))
    ada, ldam, adjusted, dual = (
        loss.to(device)
        for loss in (
            AdaFaceLoss(),
            LDAMLoss(counts),
            LogitAdjustedCrossEntropy(counts),
            DualFactorAngularMarginLoss(counts),
        )
    )
    ways: Ways = {
        "F.cross_entropy": lambda: F.cross_entropy(SCALE * x, y),
        "cross_entropy": lambda: cross_entropy(SCALE * x, y),
        "CosFaceLoss": partial(CosFaceLoss(), x, y),
        "LDAMLoss": partial(ldam, x, y),
        "ArcFaceLoss": partial(ArcFaceLoss(), x, y),
        "ArcFaceLoss, clip": partial(ArcFaceLoss(beyond="clip"), x, y),
        "AdaFaceLoss": partial(ada, x, y, norms),
        "DualFactorAngularMarginLoss": partial(dual, x, y, quality),
        "LogitAdjustedCrossEntropy": lambda: adjusted(SCALE * x, y),
    }
    title = f"loss of {rows} x {classes}, forward and backward, {where(device)}"
    show(title, microseconds(ways, [x]), "cross_entropy", "F.cross_entropy")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_margins_on_a_head(rows: int, classes: int, device: str) -> None:
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    z = torch.randn(rows, WIDTH, device=device, requires_grad=True)
    y = torch.randint(classes, (rows,), device=device)
    head = CosineHead(WIDTH, classes, SCALE).to(device)
    arc_face, cos_face = (
        getattr(theirs, name)(num_classes=classes, embedding_size=WIDTH).to(device)
        for name in ("ArcFaceLoss", "CosFaceLoss")
    )
    our_arc_face, our_cos_face = ArcFaceLoss(margin=arc_face.margin), CosFaceLoss()
    for loss in (arc_face, cos_face):
        loss.W.data = head.weight.detach().T.clone()
    for ours, loss in ((our_arc_face, arc_face), (our_cos_face, cos_face)):
        torch.testing.assert_close(ours(head.cosines(z), y), loss(z, y), rtol=1e-4, atol=1e-4)
    ways: Ways = {
        "cross_entropy": lambda: cross_entropy(head(z), y),
        "ArcFaceLoss": lambda: our_arc_face(head.cosines(z), y),
        "CosFaceLoss": lambda: our_cos_face(head.cosines(z), y),
        "theirs: ArcFaceLoss": partial(arc_face, z, y),
        "theirs: CosFaceLoss": partial(cos_face, z, y),
    }
    title = f"head and loss of {rows} x {WIDTH} to {classes} classes, forward and backward, {where(device)}"
    show(title, microseconds(ways, [z, head.weight, arc_face.W, cos_face.W]), "cross_entropy")
