from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import confusion_matrix, f1_score

from respiro.errors import LabelError
from respiro.evaluation import bootstrap_by_patient, compare_paired
from respiro.evaluation.statistics import Interval, icbhi_score


def random_cycles(size: int = 200, patients: int = 12, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, size)
    return pd.DataFrame(
        {
            "recording": [f"{number}" for number in range(size)],
            "cycle": 0,
            "label": label,
            "prediction": np.where(rng.random(size) < 0.5, label, rng.integers(0, 4, size)),
            "patient": [f"p{number:02d}" for number in rng.integers(0, patients, size)],
        }
    )


def naive_scores(table: pd.DataFrame, num_draws: int, seed: int) -> list[float]:
    """Copy the rows of each drawn patient, then count with scikit-learn."""
    patients = sorted(table["patient"].unique())
    times = np.random.default_rng(seed).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), num_draws)
    scores = []
    for draw in times:
        rows = pd.concat(
            [table[table["patient"] == patient] for patient, n in zip(patients, draw, strict=True) for _ in range(n)]
        )
        counts = confusion_matrix(rows["label"], rows["prediction"], labels=range(4))
        scores.append((counts[0, 0] / counts[0].sum() + counts.diagonal()[1:].sum() / counts[1:].sum()) / 2)
    return scores


def test_bootstrap_matches_copying_the_rows() -> None:
    table = random_cycles()
    found = bootstrap_by_patient(table["label"], table["prediction"], table["patient"], num_draws=100, seed=5)
    scores = naive_scores(table, 100, 5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))
    counts = confusion_matrix(table["label"], table["prediction"])
    assert found.value == pytest.approx(icbhi_score(counts))


def test_several_values_at_once_and_the_order_of_rows() -> None:
    table = random_cycles()

    def both(confmat: np.ndarray) -> dict[str, float]:
        return {"score": icbhi_score(confmat), "accuracy": float(confmat.trace() / confmat.sum())}

    args = table["label"], table["prediction"], table["patient"]
    found = bootstrap_by_patient(*args, both, num_draws=200)
    assert found["score"] == bootstrap_by_patient(*args, num_draws=200)
    shuffled = table.sample(frac=1, random_state=1)
    again = bootstrap_by_patient(shuffled["label"], shuffled["prediction"], shuffled["patient"], both, num_draws=200)
    assert found == again
    assert found != bootstrap_by_patient(*args, both, num_draws=200, seed=1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(150):
        ability = rng.normal(0.7, 0.1, 40).clip(0, 1)  # share right of each patient; cycles of one patient are alike
        right = rng.random((40, 10)) < ability[:, None]
        label = np.tile(np.arange(10) % 2, (40, 1))
        patients = np.repeat(np.arange(40), 10)
        found = bootstrap_by_patient(
            label.ravel(), np.where(right, label, 1 - label).ravel(), patients, num_draws=200, level=0.9
        )
        hits += found.low <= 0.7 <= found.high
    assert 0.8 < hits / 150 < 0.97


def test_one_patient_says_nothing_about_others() -> None:
    found = bootstrap_by_patient([0, 1, 2], [0, 1, 1], ["a", "a", "a"])
    assert found.value == 0.75
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    "patients",
    [[None, None, "a", None], [np.nan, np.nan, 3.0, np.nan], [-1, -1, 3, -1]],
    ids=["none", "nan", "negative-code"],
)
def test_a_missing_patient_counts_as_one_of_their_own(patients: list[object]) -> None:
    labels, predictions = [0, 1, 0, 1], [0, 1, 1, 1]
    known = bootstrap_by_patient(labels, predictions, ["b", "c", "a", "d"], num_draws=300)
    missing = bootstrap_by_patient(labels, predictions, patients, num_draws=300)
    assert missing.value == known.value
    assert missing.low < missing.value < missing.high


def test_draws_without_abnormal_cycles_are_left_out() -> None:
    found = bootstrap_by_patient([0, 0, 1], [0, 0, 1], ["a", "b", "c"])
    assert found == Interval(1.0, 1.0, 1.0)
    undefined = bootstrap_by_patient([0, 0], [0, 1], ["a", "b"])
    assert all(math.isnan(value) for value in undefined)


def test_two_thousand_draws_of_the_whole_test_set_take_little_time() -> None:
    table = random_cycles(2756, 49)
    begin = time.perf_counter()
    bootstrap_by_patient(table["label"], table["prediction"], table["patient"])
    assert time.perf_counter() - begin < 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patients": ["a"]}, ValueError, "must be of one length"),
        ({"labels": [], "predictions": [], "patients": []}, ValueError, "at least 1"),
        ({"predictions": [0, -1]}, LabelError, "predictions must lie in 0 to 1, got -1 to 0"),
        ({"labels": [0, 4], "num_classes": 4}, LabelError, "labels must lie in 0 to 3, got 0 to 4"),
        ({"level": 95}, ValueError, "level must lie between 0 and 1, got 95"),
        ({"num_draws": 0}, ValueError, "num_draws must be at least 1"),
    ],
    ids=["length", "empty", "negative", "too-many-classes", "percent", "no-draws"],
)
def test_wrong_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"labels": [0, 1], "predictions": [0, 1], "patients": ["a", "b"]} | change
    with pytest.raises(error, match=message):
        bootstrap_by_patient(**arguments)


def test_paired_difference_matches_copying_the_rows() -> None:
    a, b = random_cycles(seed=0), random_cycles(seed=0)
    b["prediction"] = random_cycles(seed=1)["prediction"]
    found = compare_paired(a, b.sample(frac=1, random_state=0), num_draws=100, seed=3)  # any order of rows
    drawn = np.subtract(naive_scores(a, 100, 3), naive_scores(b, 100, 3))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert found.by_seed == (found.difference,)
    assert math.isnan(found.t)
    assert math.isnan(found.p_value)


def test_pairing_is_tighter_than_the_models_alone() -> None:
    a = random_cycles(400, 8)
    b = a.copy()
    b.loc[::25, "prediction"] = 0
    paired = compare_paired(a, b)
    alone = bootstrap_by_patient(a["label"], a["prediction"], a["patient"])
    assert paired.high - paired.low < alone.high - alone.low
    same = compare_paired(a, a)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_a_pair_falls_back_to_the_recording() -> None:
    a = random_cycles().assign(cycle=range(200))
    b = a.assign(prediction=random_cycles(seed=1)["prediction"])
    nameless = [table.assign(recording=table["patient"], patient=None) for table in (a, b)]
    found, expected = compare_paired(*nameless, num_draws=100), compare_paired(a, b, num_draws=100)
    assert (found.difference, found.low, found.high) == (expected.difference, expected.low, expected.high)


@pytest.mark.parametrize("seeds", [2, 3, 5, 6])
def test_paired_t_over_seeds_matches_scipy(seeds: int) -> None:
    cycles = random_cycles()
    a = [cycles.assign(prediction=random_cycles(seed=10 + seed)["label"]) for seed in range(seeds)]
    b = [cycles.assign(prediction=random_cycles(seed=20 + seed)["label"]) for seed in range(seeds)]

    def macro_f1(confmat: np.ndarray) -> float:
        return float(np.mean(2 * confmat.diagonal() / (confmat.sum(0) + confmat.sum(1))))

    found = compare_paired(a, b, macro_f1, num_draws=50)
    first = [f1_score(table["label"], table["prediction"], average="macro") for table in a]
    second = [f1_score(table["label"], table["prediction"], average="macro") for table in b]
    expected = stats.ttest_rel(first, second)
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert (found.t, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.low < found.difference < found.high


def test_tables_that_cannot_be_compared_are_refused() -> None:
    a = random_cycles()
    with pytest.raises(ValueError, match="the same seeds, at least one; got 2 and 1 tables"):
        compare_paired([a, a], a)
    with pytest.raises(ValueError, match="table 1 is not of the same cycles as table 0"):
        compare_paired(a, a.iloc[1:])
    with pytest.raises(LabelError, match="tables 0 and 1 disagree about true labels"):
        compare_paired(a, a.assign(label=(a["label"] > 0).astype(int)))
