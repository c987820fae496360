from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from respiro.component import Loss, build, describe
from respiro.errors import LabelError
from respiro.losses.metric_learning import CenterLoss, TripletLoss, center_loss, triplet_loss

LABELS = {
    "balanced": [0, 0, 1, 1, 2, 2, 3, 3],
    "unequal": [0, 0, 0, 1, 1, 0, 2, 2],
    "singletons": [0, 0, 1, 2, 3, 3, 1, 2],
    "one-class": [2] * 8,
    "unknown": [0, -1, 0, 1, -1, 1, 2, -1],
    "one-known-class": [0, -1, 0, 0, -1, -1, -1, -1],
    "no-label": [-1] * 8,
    "no-positive-pair": [0, 1, 2, 3, -1, -1, -1, -1],
}
MINING = ["hard", "semihard"]


def embeddings(seed: int = 0, rows: int = 8, width: int = 5) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_centers() -> Tensor:
    return embeddings(9, rows=4)


def center_loop(z: list[list[float]], labels: list[int], centers: list[list[float]]) -> float:
    """Half the mean of the squared distances, number by number."""
    squares = [
        sum((x - c) ** 2 for x, c in zip(row, centers[label], strict=True))
        for row, label in zip(z, labels, strict=True)
        if label != -1
    ]
    return sum(squares) / (2 * len(squares)) if squares else 0.0


def triplet_loop(z: list[list[float]], labels: list[int], margin: float, mining: str) -> float:
    """The mean over triplets, found one by one."""
    lengths = [math.hypot(*row) or 1.0 for row in z]
    rows = [[x / length for x in row] for row, length in zip(z, lengths, strict=True)]
    known = [i for i, label in enumerate(labels) if label != -1]
    losses = []
    for a in known:
        positives = [math.dist(rows[a], rows[p]) for p in known if p != a and labels[p] == labels[a]]
        negatives = [math.dist(rows[a], rows[n]) for n in known if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "hard":
            losses.append(max(0.0, margin + max(positives) - min(negatives)))
            continue
        for positive in positives:
            farther = [negative for negative in negatives if negative > positive]
            losses.append(max(0.0, margin + positive - (min(farther) if farther else max(negatives))))
    return sum(losses) / len(losses) if losses else 0.0


# ----------------------------------------------------------------------------------------------------------- to centres


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_centre_loss_is_its_equation(labels: list[int]) -> None:
    z, centers = embeddings(), trained_centers()
    loss = center_loss(z, torch.tensor(labels), centers)
    assert loss.item() == pytest.approx(center_loop(z.tolist(), labels, centers.tolist()), rel=1e-12)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_gradient_of_centre_loss_is_right(labels: list[int]) -> None:
    inputs = (embeddings().requires_grad_(), trained_centers().requires_grad_())
    assert torch.autograd.gradcheck(lambda z, c: center_loss(z, torch.tensor(labels), c), inputs)


@pytest.mark.parametrize("labels", [[-1, -1, -1], []], ids=["unknown", "empty"])
def test_centre_loss_without_labels_is_zero_with_gradient(labels: list[int]) -> None:
    loss, z = CenterLoss(4, 5), embeddings(rows=len(labels)).requires_grad_()
    value = loss(z, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert z.grad is not None
    assert not z.grad.any()
    assert loss.centers.grad is not None  # else DistributedDataParallel would stop
    assert not loss.centers.grad.any()


def test_each_class_moves_by_its_share_of_the_batch() -> None:
    loss, z = CenterLoss(4, 5, rate=0.5).double(), embeddings()
    loss.centers.data.copy_(trained_centers())
    loss(z, torch.tensor(LABELS["unequal"])).backward()
    loss.step()
    expected = trained_centers()
    for label in range(3):
        own = z[torch.tensor(LABELS["unequal"]) == label]
        expected[label] += 0.5 * len(own) / 8 * (own.mean(0) - expected[label])
    torch.testing.assert_close(loss.centers.data, expected)


def test_centres_find_the_means_of_their_classes() -> None:
    loss, z, labels = CenterLoss(4, 5).double(), embeddings(), torch.tensor(LABELS["balanced"])
    for _ in range(200):
        loss.zero_grad()
        loss(z, labels).backward()
        loss.step()
    torch.testing.assert_close(loss.centers.data, z.reshape(4, 2, 5).mean(1))


def test_the_weight_in_the_total_does_not_slow_the_centres_down() -> None:
    steps = []
    for weight in (1.0, 0.005):
        loss = CenterLoss(4, 5).double()
        (weight * loss(embeddings(), torch.tensor(LABELS["unknown"]))).backward()
        loss.step(scale=weight)
        steps.append(loss.centers.data)
    assert steps[0].any()
    torch.testing.assert_close(*steps)


def test_a_step_is_that_of_plain_gradient_descent() -> None:
    ours, theirs = CenterLoss(4, 5, rate=0.2), CenterLoss(4, 5)
    for loss in (ours, theirs):
        loss(embeddings().float(), torch.tensor(LABELS["unequal"])).backward()
    ours.step()
    torch.optim.SGD(theirs.parameters(), lr=0.2).step()
    torch.testing.assert_close(ours.centers, theirs.centers)


def test_a_step_without_gradient_does_nothing() -> None:
    loss = CenterLoss(4, 5)
    loss.step()
    assert not loss.centers.any()


def test_centres_are_saved_and_restored() -> None:
    trained = CenterLoss(4, 5, rate=0.1)
    trained.centers.data.copy_(trained_centers())
    restored = build(describe(trained), Loss, "loss")
    assert restored.init_args == {"num_classes": 4, "num_features": 5, "rate": 0.1}
    restored.load_state_dict(trained.state_dict(), strict=True)
    labels = torch.tensor(LABELS["unknown"])
    assert torch.equal(restored(embeddings(), labels), trained(embeddings(), labels))


def test_function_and_class_of_centre_loss_are_one() -> None:
    loss, labels = CenterLoss(4, 5).double(), torch.tensor(LABELS["unknown"])
    loss.centers.data.copy_(trained_centers())
    assert torch.equal(loss(embeddings(), labels), center_loss(embeddings(), labels, trained_centers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_centre_loss_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = (300 * embeddings()).to(dtype).requires_grad_()
    loss = CenterLoss(4, 5)
    loss.centers.data.copy_(trained_centers())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(z, torch.tensor(LABELS["unknown"]))
    value.backward()
    assert value.dtype == torch.float32
    expected = center_loop(z.tolist(), LABELS["unknown"], loss.centers.tolist())
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert value > torch.finfo(torch.float16).max
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": torch.full((8,), 4)}, LabelError, r"labels must lie in \[-1, 4\) for 4 centres, got \[4, 4,"),
        ({"labels": torch.full((8,), -2)}, ValueError, "labels must be classes from 0 on, or -1 where unknown"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be int64 of shape \(8,\)"),
        ({"labels": torch.zeros(8)}, ValueError, "labels must be int64 .* got torch.float32"),
        ({"embeddings": torch.zeros(8, 6)}, ValueError, r"centers must have shape \(C, 6\), .* got \(4, 5\)"),
        ({"embeddings": torch.zeros(8)}, ValueError, r"embeddings must be floating point of shape \(B, D\)"),
        ({"embeddings": torch.full((8, 5), math.nan)}, ValueError, "embeddings holds values that are not finite"),
        ({"centers": torch.zeros(5)}, ValueError, r"centers must have shape \(C, 5\), .* got \(5,\)"),
    ],
    ids=["class", "negative", "count", "type", "width", "shape", "nan", "centres"],
)
def test_what_does_not_fit_the_centres(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"embeddings": embeddings(), "labels": torch.zeros(8, dtype=torch.int64), "centers": trained_centers()}
    with pytest.raises(error, match=message):
        center_loss(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes and num_features must be positive, got 0 and 5"),
        ({"num_features": -1}, "must be positive, got 4 and -1"),
        ({"rate": 0.0}, "rate must be positive and finite, got 0.0"),
        ({"rate": math.nan}, "rate must be positive and finite, got nan"),
    ],
    ids=["classes", "features", "rate", "rate-nan"],
)
def test_centres_without_meaning_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CenterLoss(**{"num_classes": 4, "num_features": 5, **settings})


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf])
def test_a_scale_without_meaning_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale}"):
        CenterLoss(4, 5).step(scale)


# ------------------------------------------------------------------------------------------------------------- triplets


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_triplet_loss_is_its_equation(labels: list[int], mining: Any, margin: float) -> None:
    z = embeddings().requires_grad_()
    loss = TripletLoss(margin, mining)(z, torch.tensor(labels))
    assert loss.item() == pytest.approx(triplet_loop(z.tolist(), labels, margin, mining), rel=1e-12, abs=1e-12)
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert not z.grad[torch.tensor(labels) == -1].any()


@pytest.mark.parametrize("mining", MINING)
def test_triplet_loss_of_a_large_batch_is_its_equation(mining: Any) -> None:
    z = embeddings(1, rows=60, width=3)
    labels = torch.randint(-1, 6, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = triplet_loop(z.tolist(), labels, 0.3, mining)
    assert expected > 0
    assert triplet_loss(z, torch.tensor(labels), 0.3, mining).item() == pytest.approx(expected, rel=1e-12)


def on_the_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_semihard_takes_the_nearest_of_the_farther_negatives() -> None:
    """One class at 0 and 60 degrees, another at 30, 90 and 150: counted by hand, with chords of 2 sin(angle / 2)."""
    z, labels = on_the_circle(0, 60, 30, 90, 150), [0, 0, 1, 1, 1]
    chord = {angle: 2 * math.sin(math.radians(angle / 2)) for angle in (30, 60, 90, 120, 150)}
    of_0, of_60 = chord[60] - chord[90], chord[60] - chord[90]  # past 30; past two at 30
    of_30 = (chord[60] - chord[30]) + (chord[120] - chord[30])  # nothing farther than 60 or 120: the farthest
    of_90 = (chord[60] - chord[90]) + (chord[60] - chord[90])
    of_150 = (chord[120] - chord[150]) + (chord[60] - chord[90])
    found = triplet_loss(z, torch.tensor(labels), margin=1.0, mining="semihard")
    assert found.item() == pytest.approx(1 + (of_0 + of_60 + of_30 + of_90 + of_150) / 8)


def test_hard_takes_the_farthest_positive_and_the_nearest_negative() -> None:
    z, labels = on_the_circle(0, 60, 30, 90, 150), [0, 0, 1, 1, 1]
    chord = {angle: 2 * math.sin(math.radians(angle / 2)) for angle in (30, 60, 90, 120)}
    triplets = [(60, 30), (60, 30), (120, 30), (60, 30), (120, 90)]
    expected = 1 + sum(chord[p] - chord[n] for p, n in triplets) / 5
    assert triplet_loss(z, torch.tensor(labels), margin=1.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[-1, -1], [0, 1], [0, 0], [3], []], ids=str)
@pytest.mark.parametrize("mining", MINING)
def test_without_a_triplet_the_loss_is_zero_with_gradient(labels: list[int], mining: Any) -> None:
    z = embeddings(rows=len(labels)).requires_grad_()
    loss = triplet_loss(z, torch.tensor(labels, dtype=torch.int64), mining=mining)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("margin", [0.1, 2.0], ids=["some-kept", "none-kept"])
@pytest.mark.parametrize("name", ["balanced", "unequal", "singletons"])
def test_agrees_with_pytorch_metric_learning(name: str, margin: float) -> None:
    """Batch-hard mining, and the mean over all triplets, whether they keep the margin or not."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    ours, theirs, labels = embeddings().requires_grad_(), embeddings().requires_grad_(), torch.tensor(LABELS[name])
    found = triplet_loss(ours, labels, margin)
    expected = losses.TripletMarginLoss(margin, reducer=MeanReducer())(theirs, labels, BatchHardMiner()(theirs, labels))
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    assert ours.grad is not None
    assert ours.grad.any()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("name", ["balanced", "unequal", "unknown"])
def test_gradient_of_triplet_loss_is_right(name: str, mining: Any) -> None:
    labels = torch.tensor(LABELS[name])
    assert torch.autograd.gradcheck(lambda z: triplet_loss(z, labels, 0.3, mining), (embeddings().requires_grad_(),))


@pytest.mark.parametrize("mining", MINING)
def test_a_collapsed_encoder_has_the_margin_and_a_finite_gradient(mining: Any) -> None:
    z = torch.ones(8, 5, requires_grad=True)
    loss = triplet_loss(z, torch.tensor(LABELS["balanced"]), 0.3, mining)
    loss.backward()
    assert loss.item() == pytest.approx(0.3)
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("mining", MINING)
def test_twins_have_a_finite_gradient(mining: Any) -> None:
    """Two equal samples of different classes, and two of one class, among others."""
    z = embeddings()
    z[2], z[5] = z[0], z[4]
    z.requires_grad_()
    loss = triplet_loss(z, torch.tensor(LABELS["balanced"]), 0.3, mining)
    loss.backward()
    assert loss.item() == pytest.approx(triplet_loop(z.tolist(), LABELS["balanced"], 0.3, mining))
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad.any()


@pytest.mark.parametrize("mining", MINING)
def test_an_embedding_of_zeros_stays_zero_and_learns_nothing(mining: Any) -> None:
    z = embeddings()
    z[3] = 0
    z.requires_grad_()
    loss = triplet_loss(z, torch.tensor(LABELS["balanced"]), 0.3, mining)
    loss.backward()
    assert loss.item() == pytest.approx(triplet_loop(z.tolist(), LABELS["balanced"], 0.3, mining))
    assert z.grad is not None
    assert not z.grad[3].any()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triplet_loss_of_half_precision_is_computed_in_float32(dtype: torch.dtype, mining: Any) -> None:
    z = (300 * embeddings()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = TripletLoss(0.3, mining)(z, torch.tensor(LABELS["unequal"]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(triplet_loop(z.tolist(), LABELS["unequal"], 0.3, mining), rel=1e-5)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_small_distances_are_not_lost_in_float32() -> None:
    """A product of matrices would give about 3e-4 for distances that are a thousand times smaller."""
    z, step = torch.ones(4, 5), torch.tensor([0.0, 1.0, 2.0, 4.0])
    z[:, 0] += step * 2.0**-20
    found = triplet_loss(z, torch.tensor([0, 1, 0, 1]), margin=0.0).item()
    assert found == pytest.approx(triplet_loop(z.double().tolist(), [0, 1, 0, 1], 0.0, "hard"), rel=0.2)
    assert 0 < found < 5e-6


def test_the_inputs_are_not_changed() -> None:
    z, labels = embeddings(), torch.tensor(LABELS["unknown"])
    for loss in (CenterLoss(4, 5), TripletLoss(), TripletLoss(mining="semihard")):
        loss(z, labels)
    assert torch.equal(z, embeddings())
    assert labels.tolist() == LABELS["unknown"]


@pytest.mark.parametrize("mining", MINING)
def test_triplet_loss_is_built_from_plain_data(mining: Any) -> None:
    loss = TripletLoss(0.1, mining)
    rebuilt = build(describe(loss), Loss, "loss")
    assert rebuilt.init_args == {"margin": 0.1, "mining": mining}
    labels = torch.tensor(LABELS["unequal"])
    assert rebuilt(embeddings(), labels) == triplet_loss(embeddings(), labels, 0.1, mining)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"margin": -0.1}, "margin must be finite and at least 0, got -0.1"),
        ({"margin": math.nan}, "margin must be finite and at least 0, got nan"),
        ({"mining": "easy"}, "mining must be one of 'hard', 'semihard', got 'easy'"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must be int64 of shape \(8,\)"),
        ({"labels": torch.full((8,), -2)}, "labels must be classes from 0 on, or -1 where unknown"),
        ({"embeddings": torch.zeros(8)}, r"embeddings must be floating point of shape \(B, D\)"),
        ({"embeddings": torch.full((8, 5), math.inf)}, "embeddings holds values that are not finite"),
    ],
    ids=["margin", "margin-nan", "mining", "count", "negative", "shape", "infinite"],
)
def test_triplets_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    arguments = {"embeddings": embeddings(), "labels": torch.tensor(LABELS["balanced"])}
    with pytest.raises(ValueError, match=message):
        triplet_loss(**{**arguments, **changed})


@pytest.mark.parametrize("settings", [{"margin": -1.0}, {"mining": "all"}], ids=["margin", "mining"])
def test_settings_of_triplets_are_checked_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        TripletLoss(**settings)


# -------------------------------------------------------------------------------------------------------- two processes

# The second process has no label in its first batch, and its centres must have a gradient nevertheless.
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from respiro.losses.metric_learning import CenterLoss

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.center = nn.Linear(5, 5, dtype=torch.float64), CenterLoss(4, 5).double()

    def forward(self, x, labels):
        return self.center(self.encoder(x), labels)

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
batch = torch.load(f"{folder}/batch.pt")
model = Model()
model.encoder.load_state_dict(batch["encoder"])
parallel = DistributedDataParallel(model)
half = slice(4 * rank, 4 * rank + 4)
found = []
for labels in batch["labels"]:
    model.zero_grad()
    parallel(batch["x"][half], labels[half]).backward()
    gradient = model.center.centers.grad.tolist()
    model.center.step()
    found.append({"gradient": gradient, "centers": model.center.centers.tolist()})
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


def test_two_processes_have_the_same_centres(tmp_path: Path) -> None:
    encoder = torch.nn.Linear(5, 5, dtype=torch.float64)
    batches = [[0, 1, 1, 2, -1, -1, -1, -1], LABELS["balanced"], LABELS["unknown"]]
    batch = {"encoder": encoder.state_dict(), "x": embeddings(), "labels": [torch.tensor(labels) for labels in batches]}
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
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second

    z, centers = encoder(embeddings()).detach(), torch.zeros(4, 5, dtype=torch.float64)
    for labels, found in zip(batches, first, strict=True):
        gradient = torch.zeros_like(centers)
        for half in (range(4), range(4, 8)):
            known = [i for i in half if labels[i] != -1]
            for i in known:
                gradient[labels[i]] += (centers[labels[i]] - z[i]) / len(known) / 2  # mean over the two processes
        centers = centers - 0.5 * gradient
        torch.testing.assert_close(torch.tensor(found["gradient"], dtype=torch.float64), gradient)
        torch.testing.assert_close(torch.tensor(found["centers"], dtype=torch.float64), centers)
