from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import recall_score

from respiro.errors import LabelError
from respiro.metrics import SPRSoundAverageScore, SPRSoundHarmonicScore, SPRSoundScore, sprsound_metrics
from respiro.metrics._counts import metrics_for, rates_for

TASKS = [("1-1", 2, 1), ("1-2", 7, 1), ("2-1", 3, 2), ("2-2", 5, 2)]


@pytest.mark.parametrize(("task", "classes", "first"), TASKS, ids=[task for task, _, _ in TASKS])
def test_scores_match_the_definition(task: str, classes: int, first: int) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(classes, (300,), generator=generator)
    preds = torch.where(
        torch.rand(300, generator=generator) < 0.6, target, torch.randint(classes, (300,), generator=generator)
    )
    se = recall_score(target, preds, labels=list(range(first, classes)), average="micro")
    sp = recall_score(target, preds, labels=[0], average="micro")
    average, harmonic = (se + sp) / 2, 2 * se * sp / (se + sp)
    metrics = sprsound_metrics(task)
    for part in torch.arange(300).split(70):
        metrics.update(preds[part], target[part])
    expected = {
        "score": (average + harmonic) / 2,
        "average_score": average,
        "harmonic_score": harmonic,
        "sensitivity": se,
        "specificity": sp,
    }
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", ["1-1", "1-2", "2-1", "2-2"])
def test_calling_all_normal_scores_one_quarter(task: str) -> None:
    target = torch.arange(2).repeat(10) * (2 if task.startswith("2") else 1)
    preds = torch.zeros_like(target)
    assert float(SPRSoundScore(task)(preds, target)) == 0.25
    assert float(SPRSoundAverageScore(task)(preds, target)) == 0.5
    assert float(SPRSoundHarmonicScore(task)(preds, target)) == 0.0


def test_poor_quality_is_in_neither_rate() -> None:
    target, preds = torch.tensor([0, 0, 2, 2, 1, 1, 1]), torch.tensor([0, 0, 2, 0, 0, 1, 2])
    value = {name: float(x) for name, x in sprsound_metrics("2-1")(preds, target).items()}
    assert value["sensitivity"] == 0.5
    assert value["specificity"] == 1.0
    assert float(SPRSoundScore("2-1")(preds[:4], target[:4])) == value["score"]


def test_a_confused_adventitious_class_is_a_miss() -> None:
    value = sprsound_metrics("1-2")(torch.tensor([0, 2, 2]), torch.tensor([0, 1, 2]))
    assert float(value["sensitivity"]) == 0.5


def test_published_total_of_hu_2023() -> None:
    """Task scores .769, .632, .662, .512 weigh to .6294; with the full bonus .1 the published total is .729."""
    counts = {"1-1": (2, 1), "1-2": (7, 1), "2-1": (3, 2), "2-2": (5, 2)}
    published = {"1-1": 0.769, "1-2": 0.632, "2-1": 0.662, "2-2": 0.512}
    total = 0.0
    for (task, weight), (classes, first) in zip(
        {"1-1": 0.2, "1-2": 0.3, "2-1": 0.2, "2-2": 0.3}.items(), counts.values(), strict=True
    ):
        right = round(1000 * published[task])  # with SE = SP = x every score is x
        target = torch.tensor([0] * 1000 + [classes - 1] * 1000)
        preds = torch.tensor(([0] * right + [first] * (1000 - right)) + ([classes - 1] * right + [0] * (1000 - right)))
        total += weight * float(SPRSoundScore(task)(preds, target))
    assert total == pytest.approx(0.6294, abs=1e-5)
    assert total + 0.1 == pytest.approx(0.729, abs=5e-4)


@pytest.mark.parametrize(
    ("target", "preds"), [([0, 0], [0, 1]), ([1, 1], [0, 1])], ids=["no adventitious", "no normal"]
)
def test_scores_are_nan_without_cycles_of_a_kind(target: list[int], preds: list[int]) -> None:
    metrics = sprsound_metrics("1-1")(torch.tensor(preds), torch.tensor(target))
    assert all(math.isnan(metrics[name]) for name in ("score", "average_score", "harmonic_score"))


def test_both_rates_zero_give_zero() -> None:
    assert float(SPRSoundScore()(torch.tensor([1, 0]), torch.tensor([0, 1]))) == 0.0


def test_class_names_stand_for_the_task() -> None:
    names = ("Normal", "Poor Quality", "CAS", "DAS", "CAS & DAS")
    target, preds = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 2, 2, 2, 4])
    assert metrics_for("sprsound", names)(preds, target) == sprsound_metrics("2-2")(preds, target)
    counts = torch.zeros(5, 5, dtype=torch.float64).index_put((target, preds), torch.ones(5).double(), accumulate=True)
    exact = {name: value.item() for name, value in rates_for(counts, "sprsound", names).items()}
    assert exact["sensitivity"] == pytest.approx(2 / 3)
    foreign = metrics_for("sprsound", ("normal", "crackle", "wheeze"))
    assert float(foreign(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))["sensitivity"]) == 0.5


def test_wrong_tasks_are_named() -> None:
    with pytest.raises(ValueError, match="task must be one of '1-1', '1-2', '2-1', '2-2', or class names, got '3-1'"):
        SPRSoundScore("3-1")
    with pytest.raises(LabelError, match="'poor quality' must be the second class"):
        sprsound_metrics(("normal", "cas", "poor quality"))
