from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from respiro.component import Loss, build, describe
from respiro.losses import CrossEntropy, MixedCrossEntropy, cross_entropy, mixed_cross_entropy
from respiro.losses.metric_learning import CenterLoss, TripletLoss, center_loss, triplet_loss
from respiro.losses.multi_objective import MultiObjectiveLoss

LABELS = torch.tensor([0, 0, 1, 1, 2, -1, 3, 3])
ONE_CLASS = torch.tensor([2] * 8)
UNKNOWN = torch.tensor([-1] * 8)
CLASS_WEIGHT = [0.5, 2.0, 1.0, 0.1]
INDEX = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
LAM = torch.tensor([0.3, 1.0, 1.0, 1.0, 0.7, 1.0, 1.0, 0.0], dtype=torch.float64)


def numbers(seed: int, width: int) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits() -> Tensor:
    return 3 * numbers(0, 4)


def embeddings() -> Tensor:
    return numbers(1, 5)


def branches() -> list[Tensor]:
    return [numbers(2, 4), 2 * numbers(3, 4)]


def centers() -> CenterLoss:
    loss = CenterLoss(4, 5).double()
    loss.centers.data.copy_(numbers(4, 5)[:4])
    return loss


def full(**settings: Any) -> MultiObjectiveLoss:
    """A loss with every term."""
    parts = {"classification": MixedCrossEntropy(CLASS_WEIGHT), "center": centers(), "triplet": TripletLoss()}
    return MultiObjectiveLoss(**{**parts, **settings})


def saved(loss: nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


# ------------------------------------------------------------------------------------------------------------ the terms


@pytest.mark.parametrize("labels", [LABELS, ONE_CLASS, UNKNOWN], ids=["some", "one-class", "unknown"])
def test_the_total_is_the_weighted_sum_of_the_terms(labels: Tensor) -> None:
    loss = full(center_weight=0.01, triplet_weight=0.5, auxiliary_weight=0.2)
    terms = loss.terms(logits(), embeddings(), labels, branches())
    expected = {
        "classification": cross_entropy(logits(), labels, CLASS_WEIGHT),
        "center": center_loss(embeddings(), labels, centers().centers),
        "triplet": triplet_loss(embeddings(), labels),
        "auxiliary": sum(cross_entropy(branch, labels, CLASS_WEIGHT) for branch in branches()),
    }
    assert list(terms) == list(expected)
    for name, term in expected.items():
        torch.testing.assert_close(terms[name], term)
    total = terms["classification"] + 0.01 * terms["center"] + 0.5 * terms["triplet"] + 0.2 * terms["auxiliary"]
    assert total.isfinite()
    torch.testing.assert_close(loss.total(terms), total)
    assert torch.equal(loss(logits(), embeddings(), labels, branches()), loss.total(terms))


def test_the_weights_are_those_of_the_reconstruction() -> None:
    loss = MultiObjectiveLoss(center=CenterLoss(4, 5), triplet=TripletLoss())
    assert loss.weights == {"classification": 1.0, "center": 0.005, "triplet": 0.1, "auxiliary": 0.3}
    assert isinstance(loss.classification, MixedCrossEntropy)
    assert loss.classification.balanced
    assert MultiObjectiveLoss().weights == {"classification": 1.0, "auxiliary": 0.3}


@pytest.mark.parametrize(
    "settings",
    [
        {"center_weight": 0.0, "triplet_weight": 0.0, "auxiliary_weight": 0.0},
        {"center": None, "triplet": None, "auxiliary_weight": 0.0},
    ],
    ids=["weights", "none"],
)
def test_with_all_terms_left_out_it_is_cross_entropy(settings: dict[str, Any]) -> None:
    scores = logits().requires_grad_()
    loss = full(**settings)
    value = loss(scores, embeddings(), LABELS, branches())
    value.backward()
    expected_scores = logits().requires_grad_()
    expected = CrossEntropy(CLASS_WEIGHT)(expected_scores, LABELS)
    expected.backward()
    assert torch.equal(value, expected)
    torch.testing.assert_close(scores.grad, expected_scores.grad)
    assert loss.weights == {"classification": 1.0}
    assert not list(loss.parameters())


@pytest.mark.parametrize("name", ["center", "triplet", "auxiliary"])
def test_a_weight_of_zero_leaves_one_term_out(name: str) -> None:
    loss = full(**{f"{name}_weight": 0.0})
    terms = loss.terms(logits(), embeddings(), LABELS, branches())
    assert set(terms) == set(loss.weights) == {"classification", "center", "triplet", "auxiliary"} - {name}


def test_without_branches_there_is_no_auxiliary_term() -> None:
    loss = full()
    assert "auxiliary" in loss.weights
    assert set(loss.terms(logits(), embeddings(), LABELS)) == {"classification", "center", "triplet"}


def test_every_input_gets_a_gradient() -> None:
    inputs = [x.requires_grad_() for x in (logits(), embeddings(), *branches())]
    loss = full()
    loss(inputs[0], inputs[1], LABELS, inputs[2:]).backward()
    for x in (*inputs, loss.center.centers):  # type: ignore[union-attr]  # it has centres
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("mixed", [{}, {"index": INDEX, "lam": LAM}], ids=["clean", "mixed"])
def test_gradient_is_right(mixed: dict[str, Tensor], weighting: str) -> None:
    loss = full(weighting=weighting)
    inputs = [x.requires_grad_() for x in (logits(), embeddings(), *branches())]
    assert torch.autograd.gradcheck(lambda scores, z, *b: loss(scores, z, LABELS, b, **mixed), inputs)


def test_half_precision_is_computed_in_float32() -> None:
    inputs = [(100 * x).bfloat16().requires_grad_() for x in (logits(), embeddings(), *branches())]
    loss = full(center=CenterLoss(4, 5), weighting="uncertainty")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(inputs[0], inputs[1], LABELS, inputs[2:])
    value.backward()
    doubles = [x.detach().double() for x in inputs]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(doubles[0], doubles[1], LABELS, doubles[2:]).item(), rel=1e-5)
    for x in inputs:
        assert x.grad is not None
        assert x.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------- mixed, or not mixed


def test_mixed_cross_entropy_of_a_clean_batch_is_cross_entropy() -> None:
    terms = [
        full(classification=kind(CLASS_WEIGHT, label_smoothing=0.1)).terms(logits(), embeddings(), LABELS, branches())
        for kind in (CrossEntropy, MixedCrossEntropy)
    ]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", [torch.tensor(0.7), 0.7, LAM], ids=["batch", "number", "sample"])
def test_the_classification_of_a_mixed_batch_is_mixed(lam: Any) -> None:
    terms = full().terms(logits(), embeddings(), LABELS, branches(), INDEX, lam)
    expected = mixed_cross_entropy(logits(), LABELS, INDEX, lam, CLASS_WEIGHT)
    torch.testing.assert_close(terms["classification"], expected)
    each = [mixed_cross_entropy(branch, LABELS, INDEX, lam, CLASS_WEIGHT) for branch in branches()]
    torch.testing.assert_close(terms["auxiliary"], each[0] + each[1])


def test_the_metric_terms_take_only_samples_that_were_not_mixed() -> None:
    z = embeddings().requires_grad_()
    terms = full().terms(logits(), z, LABELS, (), INDEX, LAM)
    alone = LAM == 1
    center = center_loss(embeddings()[alone], LABELS[alone], centers().centers)
    triplet = triplet_loss(embeddings()[alone], LABELS[alone])
    torch.testing.assert_close(terms["center"], center)
    torch.testing.assert_close(terms["triplet"], triplet)
    (terms["center"] + terms["triplet"]).backward()
    assert z.grad is not None
    assert not z.grad[~alone].any()
    assert z.grad[alone & (LABELS >= 0)].any()


@pytest.mark.parametrize("lam", [torch.tensor(0.999), 0.0], ids=["tensor", "number"])
def test_a_batch_mixed_as_a_whole_has_no_metric_terms(lam: Any) -> None:
    terms = full().terms(logits(), embeddings(), LABELS, (), INDEX, lam)
    assert terms["center"] == 0
    assert terms["triplet"] == 0


def test_a_share_of_one_for_the_batch_changes_nothing() -> None:
    mixed = full().terms(logits(), embeddings(), LABELS, branches(), INDEX, torch.tensor(1.0))
    torch.testing.assert_close(mixed, full().terms(logits(), embeddings(), LABELS, branches()))


@pytest.mark.parametrize("lam", [torch.tensor(0.7, dtype=torch.float64), LAM], ids=["batch", "sample"])
def test_mixed_cross_entropy_has_the_gradient_of_the_divergence_from_mixed_labels(lam: Tensor) -> None:
    """KL(y_mix || softmax(logits)), which differs by the entropy of the mixed labels alone."""
    labels = LABELS.clamp(min=0)
    one_hot = F.one_hot(labels, 4).double()
    share = lam.reshape(-1, 1)
    mixed_labels = share * one_hot + (1 - share) * one_hot[INDEX]
    ours, theirs = logits().requires_grad_(), logits().requires_grad_()
    value = MultiObjectiveLoss(MixedCrossEntropy())(ours, embeddings(), labels, (), INDEX, lam)
    divergence = F.kl_div(theirs.log_softmax(1), mixed_labels, reduction="batchmean")
    value.backward()
    divergence.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    entropy = -torch.special.xlogy(mixed_labels, mixed_labels).sum(1).mean()
    torch.testing.assert_close(value, divergence + entropy)


class Foreign(nn.Module):
    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.multi_margin_loss(scores, labels)


@pytest.mark.parametrize("classification", [Foreign(), CrossEntropy()], ids=["foreign", "cross-entropy"])
def test_other_losses_take_clean_batches_only(classification: nn.Module) -> None:
    labels = LABELS.clamp(min=0)
    loss = full(classification=classification)
    loss.use_class_counts([1, 2, 3, 4])
    terms = loss.terms(logits(), embeddings(), labels, branches())
    torch.testing.assert_close(terms["classification"], classification(logits(), labels))
    torch.testing.assert_close(terms["auxiliary"], sum(classification(branch, labels) for branch in branches()))
    message = f"a mixed batch needs MixedCrossEntropy as classification, got {type(classification).__name__}; pass"
    with pytest.raises(TypeError, match=message):
        loss(logits(), embeddings(), labels, branches(), INDEX, LAM)


@pytest.mark.parametrize("given", [{"index": INDEX}, {"lam": LAM}], ids=["index", "lam"])
def test_index_and_lam_come_together(given: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="index and lam belong together"):
        full()(logits(), embeddings(), LABELS, **given)


# ------------------------------------------------------------------------------------------------------ learned weights


def test_uncertainty_starts_as_fixed_weights() -> None:
    fixed, learned = full(), full(weighting="uncertainty")
    inputs = (logits(), embeddings(), LABELS, branches())
    assert learned.terms(*inputs) == fixed.terms(*inputs)
    torch.testing.assert_close(learned(*inputs), fixed(*inputs))
    assert set(learned.log_variances) == set(learned.weights)
    assert not len(fixed.log_variances)


def test_uncertainty_is_its_equation() -> None:
    loss = full(weighting="uncertainty")
    variances = {"classification": 0.5, "center": -1.0, "triplet": 2.0, "auxiliary": 0.1}
    for name, value in variances.items():
        loss.log_variances[name].data.fill_(value)
    terms = loss.terms(logits(), embeddings(), LABELS, branches())
    parts = {k: loss.weights[k] * (math.exp(-s) * terms[k].item() + s) for k, s in variances.items()}
    found = loss.total(terms)
    assert found.item() == pytest.approx(sum(parts.values()), rel=1e-6)
    found.backward()
    for name, s in variances.items():
        expected = loss.weights[name] * (1 - math.exp(-s) * terms[name].item())
        gradient = loss.log_variances[name].grad
        assert gradient is not None
        assert gradient.item() == pytest.approx(expected, rel=1e-5)


def test_a_log_variance_settles_at_the_logarithm_of_its_term() -> None:
    loss = MultiObjectiveLoss(MixedCrossEntropy(), auxiliary_weight=0.0, weighting="uncertainty")
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss(logits(), embeddings(), LABELS).backward()
        optimizer.step()
    expected = cross_entropy(logits(), LABELS).log().item()
    assert loss.log_variances["classification"].item() == pytest.approx(expected, abs=1e-5)


def test_the_log_variance_of_an_absent_term_stays_in_the_graph_and_does_not_move() -> None:
    loss = full(weighting="uncertainty")
    loss.log_variances["auxiliary"].data.fill_(0.7)
    loss(logits(), embeddings(), LABELS).backward()
    gradients = {name: s.grad for name, s in loss.log_variances.items()}
    assert gradients["auxiliary"] is not None
    assert gradients["auxiliary"] == 0
    assert all(gradients[name] != 0 for name in ("classification", "center", "triplet"))


def test_only_terms_in_use_have_a_log_variance() -> None:
    loss = MultiObjectiveLoss(center=CenterLoss(4, 5), center_weight=0.0, auxiliary_weight=0.0, weighting="uncertainty")
    assert list(loss.log_variances) == ["classification"]
    assert [name for name, _ in loss.named_parameters()] == ["log_variances.classification"]


# --------------------------------------------------------------------------------------------------- settings and state


def test_class_counts_are_handed_on() -> None:
    loss = MultiObjectiveLoss(auxiliary_weight=0.0)
    with pytest.raises(RuntimeError, match="has no class counts yet"):
        loss(logits(), embeddings(), LABELS)
    loss.use_class_counts([30, 10, 7, 1])
    weight = [48 / (4 * count) for count in (30, 10, 7, 1)]
    torch.testing.assert_close(loss(logits(), embeddings(), LABELS), cross_entropy(logits(), LABELS, weight))


def test_class_weights_centres_and_log_variances_are_restored() -> None:
    trained = MultiObjectiveLoss(center=CenterLoss(4, 5), triplet=TripletLoss(), weighting="uncertainty")
    trained.use_class_counts([30, 10, 7, 1])
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    trained(logits(), embeddings(), LABELS, branches()).backward()
    optimizer.step()
    resumed = build(describe(trained), Loss, "loss")
    fresh = copy.deepcopy(resumed)
    fresh.use_class_counts([30, 10, 7, 1])
    resumed.load_state_dict(saved(trained), strict=True)
    inputs = (logits(), embeddings(), LABELS, branches(), INDEX, LAM)
    assert torch.equal(resumed(*inputs), trained(*inputs))
    assert resumed(*inputs) != fresh(*inputs)
    assert resumed.state_dict()["center.centers"].any()
    assert resumed.state_dict()["log_variances.triplet"].any()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"center": None, "triplet": None},
        {"classification": CrossEntropy([1.0, 2.0]), "triplet": TripletLoss(0.5, "semihard"), "center_weight": 0.0},
        {"weighting": "uncertainty", "triplet_weight": 0.5, "auxiliary_weight": 0},
    ],
    ids=["defaults", "none", "other-parts", "uncertainty"],
)
def test_it_is_built_from_plain_data(settings: dict[str, Any]) -> None:
    loss = full(**settings)
    spec = describe(loss)
    rebuilt = build(json.loads(json.dumps(spec)), Loss, "loss")
    assert describe(rebuilt) == spec
    assert isinstance(rebuilt, MultiObjectiveLoss)
    assert rebuilt.weights == loss.weights
    assert rebuilt.state_dict().keys() == loss.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center_weight": -0.1}, "center_weight must be finite and at least 0, got -0.1"),
        ({"triplet_weight": math.nan}, "triplet_weight must be finite and at least 0, got nan"),
        ({"auxiliary_weight": math.inf}, "auxiliary_weight must be finite and at least 0, got inf"),
        ({"weighting": "learned"}, "weighting must be one of 'fixed', 'uncertainty', got 'learned'"),
    ],
    ids=["center", "triplet", "auxiliary", "weighting"],
)
def test_settings_without_meaning_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiObjectiveLoss(**settings)


# -------------------------------------------------------------------------------------------------------- two processes

# DistributedDataParallel stops in the second step if a parameter had no gradient in the first.
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from respiro.losses import MixedCrossEntropy
from respiro.losses.metric_learning import CenterLoss, TripletLoss
from respiro.losses.multi_objective import MultiObjectiveLoss

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.loss = MultiObjectiveLoss(MixedCrossEntropy(), CenterLoss(4, 5), TripletLoss(), weighting="uncertainty")

    def forward(self, z, labels):
        return self.loss(self.head(z), z, labels)

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)
model = DistributedDataParallel(Model())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for labels in ([[0, 1, 1, 2], [-1] * 4], [[0] * 4, [0, 1, 2, 3]], [[0, 0, 1, 1], [2, 3, 2, 3]]):
    optimizer.zero_grad()
    model(torch.randn(4, 5), torch.tensor(labels[rank])).backward()
    optimizer.step()
found = {name: x.tolist() for name, x in model.module.loss.named_parameters()}
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


def test_two_processes_learn_the_same_though_terms_are_absent(tmp_path: Path) -> None:
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
    assert first["log_variances.auxiliary"] == 0
    assert first["log_variances.triplet"] != 0
    assert torch.tensor(first["center.centers"]).any(dim=1).all()  # each class occurred on one process or the other


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_the_centres_move_alike_whatever_their_weight(weighting: str) -> None:
    """Neither the weight of the term nor a learned one slows them down or speeds them up."""
    z, labels = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0, 1])
    found = []
    for weight, log_variance in ((0.005, 0.0), (2.0, -4.0)):
        loss = MultiObjectiveLoss(CrossEntropy(), CenterLoss(2, 2), center_weight=weight, weighting=weighting)
        if weighting == "uncertainty":
            loss.log_variances["center"].data.fill_(log_variance)
        loss(z, z, labels).backward()
        loss.step_centers()
        found.append(loss.center.centers.detach())
    torch.testing.assert_close(found[0], torch.tensor([[0.75, 1.0], [0.0, 0.25]]))
    torch.testing.assert_close(found[1], found[0])


def test_without_centres_there_is_nothing_to_move() -> None:
    MultiObjectiveLoss(CrossEntropy()).step_centers()
