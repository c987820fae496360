from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from respiro.component import Loss, build, describe
from respiro.losses.classification import CrossEntropy
from respiro.losses.contrastive import PatchMixContrastiveLoss, patch_mix_contrastive_loss

INDEX = torch.tensor([3, 0, 2, 5, 1, 4])  # the third is its own partner
PER_SAMPLE = [0.0, 1.0, 0.3, 0.5, 0.9, 0.123]
LABELS = {"four": [0, 1, 2, 3, 0, 1], "one-class": [2] * 6, "unknown": [0, -1, 0, -1, 1, 0], "no-label": [-1] * 6}


def embeddings(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(golden / "patchmix" / "losses.npz").items()}


def loop(
    mixed: Tensor, clean: Tensor, index: list[int], lam: list[float], tau: float, labels: list[int] | None = None
) -> float:
    """The equation of the paper, sum by sum; with labels, the negatives are those of another class."""

    def similarity(i: int, j: int) -> float:
        b, a = mixed[i].tolist(), clean[j].tolist()
        return sum(x * y for x, y in zip(b, a, strict=True)) / math.hypot(*b) / math.hypot(*a) / tau

    total = 0.0
    for i, partner in enumerate(index):
        contrasted = [
            j
            for j in range(len(clean))
            if labels is None or j in (i, partner) or labels[j] != labels[i] or labels[i] == -1
        ]
        log_sum = math.log(sum(math.exp(similarity(i, j)) for j in contrasted))
        total += lam[i] * similarity(i, i) + (1 - lam[i]) * similarity(i, partner) - log_sum
    return -total / len(index)


@pytest.mark.parametrize("index", [INDEX.tolist(), [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.371, 1.0, PER_SAMPLE], ids=["lam-0", "lam", "lam-1", "lam-per-sample"])
@pytest.mark.parametrize("temperature", [0.06, 1.0])
def test_the_loss_is_its_equation(index: list[int], lam: float | list[float], temperature: float) -> None:
    share = torch.tensor(lam, dtype=torch.float64)
    loss = PatchMixContrastiveLoss(temperature)(embeddings(0), embeddings(1), torch.tensor(index), share)
    shares = lam if isinstance(lam, list) else [lam] * 6
    assert loss.item() == pytest.approx(loop(embeddings(0), embeddings(1), index, shares, temperature))


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("index", [INDEX.tolist(), [0, 1, 2, 3, 4, 5]], ids=["mixed", "own-partners"])
@pytest.mark.parametrize("lam", [0.371, PER_SAMPLE], ids=["lam", "lam-per-sample"])
def test_negatives_of_another_class(labels: list[int], index: list[int], lam: float | list[float]) -> None:
    mixed, clean = embeddings(0).requires_grad_(), embeddings(1).requires_grad_()
    share = torch.tensor(lam, dtype=torch.float64)
    loss = PatchMixContrastiveLoss(0.2, "different-label")(
        mixed, clean, torch.tensor(index), share, torch.tensor(labels)
    )
    shares = lam if isinstance(lam, list) else [lam] * 6
    expected = loop(embeddings(0), embeddings(1), index, shares, 0.2, labels)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert mixed.grad is not None
    assert clean.grad is not None
    assert mixed.grad.isfinite().all()
    assert clean.grad.isfinite().all()


def test_one_class_of_own_partners_has_nothing_to_contrast() -> None:
    mixed = embeddings(0).requires_grad_()
    labels = torch.zeros(6, dtype=torch.int64)
    loss = patch_mix_contrastive_loss(mixed, embeddings(1), torch.arange(6), 0.4, labels, negatives="different-label")
    loss.backward()
    assert loss.item() == 0
    assert mixed.grad is not None
    assert not mixed.grad.any()


@pytest.mark.parametrize("labels", [[-1] * 6, [0, 1, 2, 3, 4, 5]], ids=["unknown", "all-different"])
def test_without_two_of_a_class_all_are_negatives(labels: list[int]) -> None:
    arguments = (embeddings(0), embeddings(1), INDEX, 0.4, torch.tensor(labels))
    found = PatchMixContrastiveLoss(negatives="different-label")(*arguments)
    torch.testing.assert_close(found, PatchMixContrastiveLoss()(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("lam", [torch.tensor(1.0), torch.ones(6)], ids=["per-batch", "per-sample"])
def test_nothing_mixed_is_info_nce(lam: Tensor) -> None:
    mixed, clean = embeddings(0), embeddings(1)
    similarity = F.cosine_similarity(mixed[:, None], clean[None], dim=2) / 0.06
    expected = F.cross_entropy(similarity, torch.arange(6))
    torch.testing.assert_close(PatchMixContrastiveLoss()(mixed, clean, INDEX, lam), expected)
    everything = PatchMixContrastiveLoss()(mixed, clean, INDEX, torch.zeros_like(lam))
    torch.testing.assert_close(everything, F.cross_entropy(similarity, INDEX))


def test_the_loss_is_cross_entropy_with_soft_targets() -> None:
    """And so the gradient of a similarity is its softmax minus its target, over the batch."""
    mixed, clean, lam = embeddings(0), embeddings(1), torch.tensor(PER_SAMPLE, dtype=torch.float64)
    target = torch.diag(lam) + torch.diag(1 - lam) @ F.one_hot(INDEX, 6).double()
    expected = F.cross_entropy(F.normalize(mixed) @ F.normalize(clean).T / 0.06, target)
    torch.testing.assert_close(PatchMixContrastiveLoss()(mixed, clean, INDEX, lam), expected)


@pytest.mark.parametrize(("tag", "negatives"), [("all", "all"), ("difflabel", "different-label")])
def test_reproduces_the_released_code(vectors: dict[str, Tensor], tag: str, negatives: Any) -> None:
    v = {name.removeprefix(f"con_{tag}_"): value.clone() for name, value in vectors.items()}
    mixed, clean = v["z_mixed"].requires_grad_(), v["z_clean"].requires_grad_()
    loss = PatchMixContrastiveLoss(v["tau"].item(), negatives)(mixed, clean, v["index"], v["lam"], v["labels"])
    loss.backward()
    torch.testing.assert_close(loss, v["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.grad, v["grad_mixed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(clean.grad, v["grad_clean"], atol=1e-6, rtol=0)


def part(vectors: dict[str, Tensor], name: str, *modules: nn.Module) -> nn.Module:
    module = nn.Sequential(*modules)
    prefix = f"step_{name}."
    module.load_state_dict({k.removeprefix(prefix): v.clone() for k, v in vectors.items() if k.startswith(prefix)})
    return module


@pytest.mark.parametrize("target", ["grad_block", "grad_flow", "project_block", "project_flow"])
def test_reproduces_a_training_step_of_the_released_code(vectors: dict[str, Tensor], target: str) -> None:
    classifier = part(vectors, "classifier", nn.LayerNorm(32), nn.Linear(32, 4))
    projector = part(vectors, "projector", nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32))
    features = vectors["step_features"].clone().requires_grad_()
    features_mixed = vectors["step_features_mixed"].clone().requires_grad_()
    clean = projector(features) if target.startswith("project") else features
    if target.endswith("block"):
        clean = clean.detach()
    ce = CrossEntropy()(classifier(features), vectors["step_labels"])
    cl = PatchMixContrastiveLoss(0.06)(projector(features_mixed), clean, vectors["step_index"], vectors["step_lam"])
    (ce + cl).backward()
    for name, found in [("ce", ce), ("cl", cl), ("total", ce + cl)]:
        torch.testing.assert_close(found, vectors[f"step_{target}_{name}"], atol=1e-5, rtol=0)
    for name, leaf in [("grad_f", features), ("grad_fm", features_mixed)]:
        torch.testing.assert_close(leaf.grad, vectors[f"step_{target}_{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("labels", [None, [0, 1, 0, -1, 1, 0]], ids=["all", "different-label"])
@pytest.mark.parametrize("lam", [0.371, PER_SAMPLE], ids=["per-batch", "per-sample"])
def test_gradient_is_right(lam: float | list[float], labels: list[int] | None) -> None:
    share = torch.tensor(lam, dtype=torch.float64)
    loss = PatchMixContrastiveLoss(0.3, "different-label" if labels else "all")
    known = torch.tensor(labels) if labels else None
    inputs = (embeddings(0).requires_grad_(), embeddings(1).requires_grad_())
    assert torch.autograd.gradcheck(lambda mixed, clean: loss(mixed, clean, INDEX, share, known), inputs)


@pytest.mark.parametrize("negatives", ["all", "different-label"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, negatives: Any) -> None:
    mixed, clean = (100 * embeddings(0, dtype)).requires_grad_(), (100 * embeddings(1, dtype)).requires_grad_()
    loss = PatchMixContrastiveLoss(0.01, negatives)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(mixed, clean, INDEX, torch.tensor(PER_SAMPLE), labels)
    value.backward()
    expected = loss(mixed.detach().double(), clean.detach().double(), INDEX, torch.tensor(PER_SAMPLE), labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mixed.grad is not None
    assert clean.grad is not None
    assert mixed.grad.isfinite().all()
    assert clean.grad.isfinite().all()


def test_the_inputs_are_not_changed() -> None:
    inputs = [embeddings(0), embeddings(1), INDEX.clone(), torch.tensor(PER_SAMPLE), torch.tensor(LABELS["four"])]
    before = [x.clone() for x in inputs]
    PatchMixContrastiveLoss(negatives="different-label")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_the_length_of_an_embedding_has_no_effect() -> None:
    loss, lengths = PatchMixContrastiveLoss(), torch.tensor([[1e-3], [1.0], [1e3], [2.0], [5.0], [0.1]])
    expected = loss(embeddings(0), embeddings(1), INDEX, 0.4)
    torch.testing.assert_close(loss(embeddings(0) * lengths, embeddings(1) * lengths.flip(0), INDEX, 0.4), expected)


def test_an_embedding_of_zeros_gives_a_finite_loss() -> None:
    zeros = torch.zeros(6, 5)
    assert PatchMixContrastiveLoss()(zeros, embeddings(1, torch.float32), INDEX, 0.4).item() == pytest.approx(
        math.log(6)
    )


def test_the_loss_is_built_from_plain_data() -> None:
    loss = PatchMixContrastiveLoss(0.1, "different-label", gather=True)
    assert build(describe(loss), Loss, "loss").init_args == loss.init_args


def test_gather_changes_nothing_without_other_processes() -> None:
    arguments = (embeddings(0), embeddings(1), INDEX, 0.4, torch.tensor(LABELS["four"]))
    for negatives in ("all", "different-label"):
        alone, gathered = (PatchMixContrastiveLoss(0.06, negatives, gather) for gather in (False, True))  # type: ignore[arg-type]  # a str from a loop
        assert torch.equal(alone(*arguments), gathered(*arguments))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"negatives": "diff_label"}, "negatives must be one of 'all', 'different-label', got 'diff_label'"),
        ({"negatives": "different-label"}, r"negatives='different-label' needs labels of shape \(6,\), got None"),
        (
            {"negatives": "different-label", "labels": torch.zeros(5)},
            r"negatives='different-label' needs labels of shape \(6,\), got shape \(5,\)",
        ),
        ({"lam": 1.1}, r"lam must lie in \[0, 1\], got 1.1"),
        ({"lam": torch.tensor([-0.1] * 6)}, r"lam must lie in \[0, 1\], got \[-0.1"),
        ({"lam": torch.zeros(5)}, r"lam must be one share, or one for each of 6 samples, got shape \(5,\)"),
        ({"index": INDEX[:4]}, r"index must be int64 of shape \(6,\), a partner for each sample, got torch.int64"),
        ({"index": INDEX + 1}, "index must name samples of the batch, 0 to 5"),
        (
            {"mixed": torch.zeros(6)},
            r"mixed must be floating point of shape \(B, D\), got torch.float32 of shape \(6,\)",
        ),
        ({"clean": torch.zeros(6, 5).long()}, r"clean must be floating point of shape \(B, D\), got torch.int64"),
        ({"mixed": torch.zeros(6, 4)}, r"the same shape, got \(6, 4\) and \(6, 5\); a projector on the mixed ones"),
        ({"clean": torch.full((6, 5), float("inf"))}, "clean holds values that are not finite"),
        ({"mixed": torch.full((6, 5), float("nan"))}, "mixed holds values that are not finite"),
        (
            {"mixed": torch.ones(1, 5), "clean": torch.ones(1, 5), "index": torch.tensor([0])},
            "contrasting needs at least two samples, got 1; give the datamodule drop_last=True",
        ),
    ],
    ids=[
        *["temperature-0", "temperature-nan", "negatives", "labels-missing", "labels-shape", "lam-above-1"],
        *["lam-negative", "lam-shape", "index-shape", "index-range", "mixed-shape", "clean-type", "widths"],
        *["clean-infinite", "mixed-nan", "batch-of-one"],
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    arguments = {"mixed": embeddings(0), "clean": embeddings(1), "index": INDEX, "lam": 0.5}
    with pytest.raises(ValueError, match=message):
        patch_mix_contrastive_loss(**{**arguments, **changed})


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"negatives": "none"}], ids=["temperature", "negatives"])
def test_settings_without_meaning_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        PatchMixContrastiveLoss(**settings)


# Each process holds half of the batch; the gradients are averaged as DistributedDataParallel does, which loads slowly.
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from respiro.losses.contrastive import PatchMixContrastiveLoss

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
batch = torch.load(f"{folder}/batch.pt")
half = slice(3 * rank, 3 * rank + 3)
found = {}
for negatives in ("all", "different-label"):
    for lam in ("lam", "lams"):
        encoder = nn.Linear(4, 5, dtype=torch.float64)
        encoder.load_state_dict(batch["encoder"])
        mixed, clean = encoder(batch["mixed"][half]), encoder(batch["clean"][half])
        share = batch[lam][half] if lam == "lams" else batch[lam]
        loss = PatchMixContrastiveLoss(0.1, negatives, gather=True)(
            mixed, clean, batch["index"][half] - 3 * rank, share, batch["labels"][half])
        loss.backward()
        value, gradient = loss.detach() / 2, encoder.weight.grad / 2
        dist.all_reduce(value)
        dist.all_reduce(gradient)
        found[f"{negatives}-{lam}"] = [value.item(), gradient.tolist()]
try:
    rows = torch.ones(3 + rank, 5)
    PatchMixContrastiveLoss(gather=True)(rows, rows, torch.arange(3 + rank), 0.5)
except ValueError as error:
    found["unequal"] = str(error)
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A batch of which the first and the last half mix among themselves."""
    generator = torch.Generator().manual_seed(3)
    return {
        "encoder": {
            "weight": torch.randn(5, 4, generator=generator, dtype=torch.float64),
            "bias": torch.randn(5, generator=generator, dtype=torch.float64),
        },
        "mixed": torch.randn(6, 4, generator=generator, dtype=torch.float64),
        "clean": torch.randn(6, 4, generator=generator, dtype=torch.float64),
        "index": torch.tensor([1, 0, 2, 4, 5, 3]),
        "lam": torch.tensor(0.3, dtype=torch.float64),
        "lams": torch.tensor(PER_SAMPLE, dtype=torch.float64),
        "labels": torch.tensor([0, 1, 1, 0, -1, 1]),
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


@pytest.mark.parametrize("lam", ["lam", "lams"], ids=["per-batch", "per-sample"])
@pytest.mark.parametrize("negatives", ["all", "different-label"])
def test_two_processes_are_one_with_the_whole_batch(
    whole: dict[str, Any], two_processes: list[dict[str, Any]], negatives: Any, lam: str
) -> None:
    encoder = nn.Linear(4, 5, dtype=torch.float64)
    encoder.load_state_dict(whole["encoder"])
    loss = PatchMixContrastiveLoss(0.1, negatives)(
        encoder(whole["mixed"]), encoder(whole["clean"]), whole["index"], whole[lam], whole["labels"]
    )
    loss.backward()
    for found in two_processes:
        value, gradient = found[f"{negatives}-{lam}"]
        assert value == pytest.approx(loss.item(), abs=1e-12)
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), encoder.weight.grad)


def test_processes_with_unequal_batches_are_told_so(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        assert found["unequal"].startswith("the processes hold batches of [3, 4], but only equal ones can be gathered")
