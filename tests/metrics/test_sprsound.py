from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score

from respiro.errors import LabelError
from respiro.metrics import SPRSoundAverageScore, SPRSoundHarmonicScore, SPRSoundScore, sprsound_metrics
from respiro.metrics._counts import metrics_for, rates_for
from respiro.metrics.sprsound import sprsound_total

TASKS = [("1-1", 2, 1), ("1-2", 7, 1), ("2-1", 3, 2), ("2-2", 5, 2)]
CLASS_NAMES = {
    "1-1": ["normal", "adventitious"],
    "1-2": ["normal", "rhonchi", "wheeze", "stridor", "coarse crackle", "fine crackle", "wheeze+crackle"],
    "2-1": ["normal", "poor quality", "adventitious"],
    "2-2": ["normal", "poor quality", "cas", "das", "cas & das"],
}
#: Score of each task in Hu et al. (2023), whose published total .729 contains the full bonus of .1.
HU = {"1-1": 0.769, "1-2": 0.632, "2-1": 0.662, "2-2": 0.512}
#: For each task, counts by true and predicted class, and the two rates counted by hand.
WRITTEN = {
    "1-1": ([[6, 2], [3, 1]], (1, 4), (6, 8)),
    "1-2": (
        [
            [9, 0, 1, 0, 0, 2, 0],
            [1, 2, 3, 0, 0, 0, 0],  # rhonchi called wheeze is a miss, adventitious or not
            [0, 1, 4, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0],  # no stridor: pooled, so nothing is missing
            [2, 0, 0, 0, 1, 3, 0],
            [4, 0, 0, 0, 0, 5, 0],
            [0, 0, 1, 0, 0, 1, 1],
        ],
        (13, 30),
        (9, 12),
    ),
    # Poor quality, the second class: what truly is of poor quality is in neither rate, whatever it is called;
    # a normal or adventitious recording called so is a miss of its own rate.
    "2-1": ([[5, 2, 1], [7, 8, 9], [1, 3, 6]], (6, 10), (5, 8)),
    "2-2": ([[4, 3, 1, 0, 0], [5, 6, 7, 8, 9], [0, 2, 3, 1, 0], [1, 0, 0, 2, 1], [0, 1, 2, 0, 1]], (6, 14), (4, 8)),
}


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


def cycles_of(counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predicted and true labels that give these counts."""
    target, preds = np.nonzero(counts)
    times = counts[target, preds]
    return torch.tensor(preds.repeat(times)), torch.tensor(target.repeat(times))


@pytest.mark.parametrize("task", WRITTEN)
def test_scores_match_counts_by_hand(task: str) -> None:
    rows, (hits, adventitious), (called_normal, normal) = WRITTEN[task]
    se, sp = hits / adventitious, called_normal / normal
    average, harmonic = (se + sp) / 2, 2 * se * sp / (se + sp)
    expected = {"sensitivity": se, "specificity": sp, "average_score": average, "harmonic_score": harmonic}
    expected["score"] = (average + harmonic) / 2
    values = sprsound_metrics(task)(*cycles_of(np.array(rows)))
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, abs=1e-6)


def score_by_the_definition(counts: np.ndarray, events: bool) -> float:
    """Section 7 of the rules in numpy: ids from 1 (events) or 2 (recordings) on are adventitious."""
    first = 1 if events else 2
    se = np.trace(counts[first:, first:]) / counts[first:].sum()
    sp = counts[0, 0] / counts[0].sum()
    harmonic = 0.0 if se + sp == 0 else 2 * se * sp / (se + sp)
    return float(((se + sp) / 2 + harmonic) / 2)


@pytest.mark.parametrize(("task", "classes", "first"), TASKS, ids=[task for task, _, _ in TASKS])
def test_scores_match_numpy_on_random_counts(task: str, classes: int, first: int) -> None:
    rng = np.random.default_rng(5)
    for _ in range(25):
        counts = rng.integers(0, 6, (classes, classes)) + np.eye(classes, dtype=int)
        expected = score_by_the_definition(counts, task.startswith("1"))
        assert SPRSoundScore(task)(*cycles_of(counts)).item() == pytest.approx(expected, abs=1e-6)
        exact = rates_for(torch.from_numpy(counts).double(), "sprsound", CLASS_NAMES[task])["score"]
        assert exact.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", ["2-1", "2-2"])
def test_calls_of_poor_quality_do_not_matter_where_they_are_true(task: str) -> None:
    counts = np.array(WRITTEN[task][0])
    other = counts.copy()
    other[1] = counts[1][::-1] * 3  # other calls of other recordings of poor quality
    values, changed = (sprsound_metrics(task)(*cycles_of(part)) for part in (counts, other))
    assert values == changed
    missed = counts.copy()
    missed[0] += missed[0, 0] * (np.arange(len(counts)) == 1)
    missed[0, 0] = 0  # every normal recording called poor quality
    values = sprsound_metrics(task)(*cycles_of(missed))
    assert values["specificity"] == 0.0
    assert values["harmonic_score"] == 0.0
    assert values["sensitivity"] == changed["sensitivity"]


def test_published_total_of_hu_2023() -> None:
    total = sprsound_total(HU)
    assert total == pytest.approx(0.6294, abs=1e-12)
    assert total + 0.1 == pytest.approx(0.729, abs=5e-4)


def test_total_from_the_metrics_of_the_four_tasks() -> None:
    scores = {}
    for task, classes, first in TASKS:
        right = round(1000 * HU[task])  # with SE = SP = x every score is x
        target = torch.tensor([0] * 1000 + [classes - 1] * 1000)
        preds = torch.tensor(([0] * right + [first] * (1000 - right)) + ([classes - 1] * right + [0] * (1000 - right)))
        scores[task] = SPRSoundScore(task)(preds, target).item()
    assert sprsound_total(scores) == pytest.approx(0.6294, abs=1e-6)


def test_total_weighs_the_tasks_and_of_all_normal_is_one_quarter() -> None:
    assert sprsound_total(dict.fromkeys(HU, 0.25)) == 0.25
    alone = [sprsound_total({task: float(task == one) for task in HU}) for one in ("1-1", "1-2", "2-1", "2-2")]
    assert alone == [0.2, 0.3, 0.2, 0.3]
    assert sprsound_total(dict(reversed(HU.items()))) == sprsound_total(HU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2-2": None}, r"all of them and no other, got \['1-1', '1-2', '2-1'\]"),
        ({"3-1": 0.5}, r"of the tasks '1-1', '1-2', '2-1', '2-2', all of them and no other, got .*'3-1'"),
        ({"1-2": 63.2}, r"the score of task '1-2' must lie in \[0, 1\] \(not percent\), got 63.2"),
        ({"1-1": -0.1}, "task '1-1' must lie in .* got -0.1"),
        ({"2-1": math.nan}, "task '2-1' must lie in .* got nan"),
    ],
    ids=["missing", "unknown", "percent", "negative", "undefined"],
)
def test_a_total_of_anything_else_is_refused(change: dict[str, float | None], message: str) -> None:
    scores = {task: score for task, score in (HU | change).items() if score is not None}
    with pytest.raises(ValueError, match=message):
        sprsound_total(scores)


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
