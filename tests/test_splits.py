from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

import respiro.splits
from respiro.datasets.icbhi import ICBHI, respirenet_folds
from respiro.datasets.sprsound import SPRSound
from respiro.splits import Split, audit_leakage, patient_folds, split_cycles
from respiro.splits.grouping import deal

NAMES = ["normal", "crackle", "wheeze", "both"]


def table(rows: list[tuple[str | None, str, int, str]]) -> pd.DataFrame:
    """Build a cycles table of (patient, recording, label, split)."""
    cycles = pd.DataFrame(rows, columns=["patient", "recording", "label", "split"])
    cycles["class"] = [NAMES[label] if label >= 0 else None for label in cycles["label"]]
    return cycles


def by_hand() -> pd.DataFrame:
    """Return a table in which patient 2 is on both sides: recording c trains, d tests."""
    return table(
        [
            ("1", "a", 0, "train"),
            ("1", "a", 1, "train"),
            ("1", "b", 0, "train"),
            ("2", "c", 1, "train"),
            ("2", "d", 1, "test"),
            ("3", "e", 0, "test"),
            ("4", "f", 0, "inter"),
        ]
    )


def rows_of(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train.tolist(), split.val.tolist(), split.test.tolist()


def test_public_names() -> None:
    assert sorted(respiro.splits.__all__) == ["Split", "audit_leakage", "patient_folds", "split_cycles"]


# Protocols


@pytest.mark.parametrize(
    ("protocol", "test_splits", "expected"),
    [
        ("official", ("test",), ([0, 1, 2, 3], [4, 5])),
        ("official", "test", ([0, 1, 2, 3], [4, 5])),
        ("official", ("test", "inter"), ([0, 1, 2, 3], [4, 5, 6])),
        ("official-clean", ("test",), ([0, 1, 2], [4, 5])),
        ("official-clean", ("inter",), ([0, 1, 2, 3], [6])),
    ],
    ids=["official", "one-name", "two-tests", "clean", "clean-nothing-shared"],
)
def test_official_protocols(
    protocol: str, test_splits: tuple[str, ...] | str, expected: tuple[list[int], list[int]]
) -> None:
    split = split_cycles(by_hand(), protocol, val_fraction=0, test_splits=test_splits)
    assert rows_of(split) == (expected[0], [], expected[1])
    assert split.name == protocol
    assert not split.leaky
    assert split.seed is None


def test_notes_tell_what_is_shared_and_what_is_in_no_part() -> None:
    cycles = by_hand()
    assert split_cycles(cycles, val_fraction=0).notes == (
        "in train and in test: patients 2",
        "1 cycles are in no part, their split is 'inter': patients 4",
    )
    assert split_cycles(cycles, "official-clean", val_fraction=0).notes == (
        "1 cycles are in no part, their split is 'inter': patients 4",
        "1 cycles are in no part, their split is 'left-out': patients 2",
    )


def test_cycles_without_a_label_are_in_no_part() -> None:
    cycles = by_hand()
    cycles.loc[[0, 5], "label"] = -1
    split = split_cycles(cycles, val_fraction=0, test_splits=("test", "inter"))
    assert rows_of(split) == ([1, 2, 3], [], [4, 6])
    assert "2 cycles are in no part, the label map leaves them out" in split.notes


def test_row_labels_are_kept() -> None:
    cycles = by_hand().set_axis([50, 40, 30, 20, 10, 5, 3])
    assert rows_of(split_cycles(cycles, val_fraction=0)) == ([50, 40, 30, 20], [], [10, 5])


@pytest.mark.parametrize(("fold", "train", "test"), [(0, [4, 5, 6], [0, 1, 2, 3]), (1, [0, 1, 2, 3, 6], [4, 5])])
def test_patient_folds_as_given(fold: int, train: list[int], test: list[int]) -> None:
    cycles = by_hand().assign(patient=list("1111223"))
    split = split_cycles(cycles, f"patient-fold-{fold}", 0, folds={"1": 0, "2": 1, "3": 2, "absent": 4})
    assert rows_of(split) == (train, [], test)
    assert split.seed is None


def test_patient_folds_need_no_split_column() -> None:
    rows = [(str(patient), f"r{patient}", patient % 2, "") for patient in range(10)]
    cycles = table(rows).drop(columns="split")
    tested = [split_cycles(cycles, f"patient-fold-{fold}", 0, seed=3).test.tolist() for fold in range(5)]
    assert sorted(row for fold in tested for row in fold) == list(range(10))
    assert [sorted(cycles["label"][fold]) for fold in tested] == [[0, 1]] * 5


def test_random_recording_draws_as_the_released_code() -> None:
    cycles = by_hand()
    order = list("abcdef")
    random.Random(1).shuffle(order)
    split = split_cycles(cycles.iloc[::-1], "random-recording", 0, seed=1)
    assert set(cycles["recording"][split.train]) == set(order[:3])
    assert set(cycles["recording"][split.test]) == set(order[3:])
    assert split.leaky
    assert split.seed == 1
    assert split.notes[0].startswith("LEAKY: recordings, not patients, were dealt at random")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "offical"}, r"protocol must be one of 'official', .*'random-recording', got 'offical'"),
        ({"protocol": "patient-fold-5"}, "protocol must be one of"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1, got 1.0"),
        ({"val_fraction": -0.1}, "got -0.1"),
        ({"val_fraction": float("nan")}, "got nan"),
        ({"test_splits": ("tset",)}, r"got \('tset',\); this table has 'inter', 'test', 'train'"),
        ({"test_splits": ("train",)}, "beside 'train'"),
        ({"test_splits": ()}, r"got \(\)"),
        ({"folds": {"1": 0}}, "folds belong to the protocols 'patient-fold-0'"),
        ({"protocol": "patient-fold-0", "folds": {"1": 0, "2": 1}}, r"no fold for 2 patients .*first: '3'"),
        ({"protocol": "patient-fold-3", "folds": dict.fromkeys("1234", 0)}, r"fold 3 must hold some .* has \[0\]"),
        ({"protocol": "patient-fold-0"}, "num_folds must be from 2 to the number of patients, 4, got 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_cycles(by_hand(), **arguments)


def test_errors_about_the_table() -> None:
    cycles = by_hand()
    with pytest.raises(ValueError, match=r"cycles must have the columns .* lacks \['patient'\]"):
        split_cycles(cycles.drop(columns="patient"))
    with pytest.raises(ValueError, match="row labels that occur twice"):
        split_cycles(pd.concat([cycles, cycles]))
    with pytest.raises(ValueError, match="leaves 0 train and 2 test cycles"):
        split_cycles(cycles[cycles["recording"] == "a"], "random-recording")
    with pytest.raises(ValueError, match=r"lacks \['label'\]"):
        patient_folds(cycles.drop(columns="label"))


# Validation


@pytest.mark.parametrize(
    ("rows", "val_patients", "note"),
    [
        ([("1", 0), ("1", 1), ("2", 0), ("2", 0)], {"2"}, "no 'crackle' in validation; patients who have it: 1"),
        ([("1", 0), ("1", 1)], set(), "no 'normal' in validation; patients who have it: 1"),
    ],
    ids=["sole-holder-stays-in-train", "one-patient"],
)
def test_a_class_of_one_patient_stays_in_train(rows: list[tuple[str, int]], val_patients: set[str], note: str) -> None:
    cycles = table([*((patient, f"r{patient}", label, "train") for patient, label in rows), ("9", "z", 0, "test")])
    split = split_cycles(cycles, val_fraction=0.3)
    assert set(cycles["patient"][split.val]) == val_patients
    assert note in split.notes


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_two_patients_is_on_both_sides(seed: int) -> None:
    rows = [(str(patient), f"r{patient}", 0, "train") for patient in range(40)]
    rows += [("7", "r7", 3, "train")] * 9 + [("23", "r23", 3, "train"), ("9", "z", 0, "test")]
    cycles = table(rows)
    split = split_cycles(cycles, seed=seed)
    assert 3 in set(cycles["label"][split.train])
    assert 3 in set(cycles["label"][split.val])


def test_note_when_patients_are_too_few_for_the_fraction() -> None:
    cycles = table([("1", "a", 0, "train"), ("2", "b", 0, "train"), ("3", "c", 0, "test")])
    assert split_cycles(cycles).notes == ("validation holds 50% of the train cycles, not 15%: few patients",)


def test_a_recording_without_patient_is_a_patient_of_its_own() -> None:
    rows = [(None, name, label, "train") for name in "abcdefgh" for label in (0, 1)]
    cycles = table([*rows, (None, "z", 0, "test")])
    split = split_cycles(cycles, val_fraction=0.25)
    assert split.notes == ("9 recordings name no patient; each is taken as a patient of its own",)
    assert len(split.val) == 4
    assert cycles.loc[split.val, "recording"].value_counts().tolist() == [2, 2]
    assert patient_folds(cycles, 3).index.tolist() == [*"abcdefgh", "z"]
    assert split.describe(cycles)["val"]["patients"] == 2


@pytest.mark.parametrize(
    "counts",
    [
        [[5, 1], [5, 1], [5, 1], [5, 1], [5, 1], [5, 1]],
        [[40, 2], [3, 9], [8, 1], [1, 1], [0, 7], [12, 0], [6, 3], [9, 1], [2, 4]],
        [[30, 0, 0], [10, 3, 0], [9, 0, 2], [8, 2, 0], [7, 0, 0], [6, 1, 1], [5, 0, 0], [4, 0, 0]],
    ],
    ids=["equal", "uneven", "rare"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_deal_comes_near_the_best_of_all_assignments(counts: list[list[int]], seed: int) -> None:
    shares = (5 / 6, 1 / 6)
    cycles = np.array(counts, dtype=float)
    wanted = np.column_stack([cycles, cycles.sum(1)]) / np.append(cycles.sum(0), cycles.sum())

    def quality(part: np.ndarray) -> tuple[int, float]:
        held = np.array([wanted[part == side].sum(0) for side in (0, 1)])
        return int((held == 0).sum()), float(((held - np.array(shares)[:, None]) ** 2).sum())

    best = min(quality(np.array(part)) for part in product((0, 1), repeat=len(counts)))
    missing, error = quality(deal(np.array(counts), shares, seed))
    assert missing == best[0]
    assert error <= best[1] + 0.01


patients = st.lists(
    st.tuples(
        st.booleans(),  # whether the patient is known
        st.sampled_from(["train", "train", "train", "test"]),
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3),  # labels by recording
    ),
    min_size=6,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(
    patients=patients,
    protocol=st.sampled_from(["official", "official-clean", "patient-fold-0", "patient-fold-4", "random-recording"]),
    val_fraction=st.sampled_from([0.0, 0.1, 0.15, 0.3, 0.5]),
    seed=st.integers(0, 3),
)
def test_properties(
    patients: list[tuple[bool, str, list[list[int]]]], protocol: str, val_fraction: float, seed: int
) -> None:
    rows: list[tuple[str | None, str, int, str]] = [("x", "xa", 0, "train"), ("y", "ya", 0, "test")]
    for number, (known, split_name, recordings) in enumerate(patients):
        patient = str(number // 2) if known else None  # neighbours share a number, at times across the sides
        rows += [(patient, f"{number}-{i}", label, split_name) for i, ls in enumerate(recordings) for label in ls]
    cycles = table(rows)
    split = split_cycles(cycles, protocol, val_fraction, seed)
    train, val, test = (cycles.loc[part] for part in (split.train, split.val, split.test))

    # Disjoint, complete but for what official-clean leaves out, in the order of the table.
    whole = sorted([*split.train, *split.val, *split.test])
    assert len(set(whole)) == len(whole)
    left_out = cycles.drop(index=whole)
    if protocol == "official-clean":
        assert set(left_out["patient"]) <= set(test["patient"].dropna())
    else:
        assert left_out.empty
    assert all(part.index.is_monotonic_increasing for part in (train, val, test))

    # Patients and recordings stay whole.
    assert not set(train["patient"].dropna()) & set(val["patient"].dropna())
    assert not set(train["recording"]) & set(val["recording"])
    if protocol not in ("official", "random-recording"):
        assert not set(test["patient"].dropna()) & {*train["patient"].dropna(), *val["patient"].dropna()}

    # Train keeps its classes; validation has those that two patients hold, or a note says why not.
    fit = pd.concat([train, val])
    assert set(train["label"]) == set(fit["label"])
    assert val.empty if val_fraction == 0 else True
    if val_fraction > 0:
        for name in set(fit["class"]) - set(val["class"]):
            assert any(note.startswith(f"no {name!r} in validation") for note in split.notes)

    # Same seed, same parts, whatever the order of the rows.
    again = split_cycles(cycles.sample(frac=1, random_state=0), protocol, val_fraction, seed)
    assert [set(part) for part in rows_of(again)] == [set(part) for part in rows_of(split)]
    json.dumps(split.describe(cycles))


def test_describe_counts_by_hand() -> None:
    cycles = by_hand()
    split = split_cycles(cycles, val_fraction=0)
    assert split.describe(cycles) == {
        "name": "official",
        "leaky": False,
        "seed": None,
        "notes": list(split.notes),
        "train": {"patients": 2, "recordings": 3, "cycles": 4, "classes": {"normal": 2, "crackle": 2}},
        "val": {"patients": 0, "recordings": 0, "cycles": 0, "classes": {"normal": 0, "crackle": 0}},
        "test": {"patients": 2, "recordings": 2, "cycles": 2, "classes": {"normal": 1, "crackle": 1}},
        "shared_patients": ["2"],
    }


# Audit


def sides() -> tuple[pd.DataFrame, pd.DataFrame]:
    columns = ["recording", "patient", "take", "start", "end", "label", "device", "sex"]
    train = [
        ("101_a", "101", "101_1", 0.0, 1.5, 1, "A", "M"),
        ("101_a", "101", "101_1", 1.5, 3.0, 0, "A", "M"),
        ("102_a", "102", "102_1", 0.0, 1.0, 0, "B", None),
        ("no_id", None, None, 0.0, 1.0, 2, "A", None),
    ]
    test = [
        ("101_b", "101", "101_1", 1.5, 3.0, 3, "A", "M"),  # the breath of train's second row
        ("101_b", "101", "101_1", 3.0, 4.0, 0, "A", "M"),
        ("102_b", "102", "102_2", 0.0, 1.0, 0, "C", "F"),  # the times of train, but another take
        ("other", None, None, 0.0, 1.0, 2, "A", "F"),  # no patient and no take on both sides is no match
    ]
    return pd.DataFrame(train, columns=columns), pd.DataFrame(test, columns=columns)


def test_audit_by_hand() -> None:
    report = audit_leakage(*sides())
    assert report.leaks
    assert report.shared_patients == {"101": (2, 2), "102": (1, 1)}
    assert report.shared_takes == ("101_1",)
    assert report.shared_recordings == ()
    assert report.same_times == {"101": 1}
    assert report.identical_audio is None
    shift = report.shift.astype(object).where(report.shift.notna(), None)
    assert {key: tuple(row) for key, row in zip(shift.index, shift.to_numpy(), strict=True)} == {
        ("device", "A"): (3, 0.75, 2 / 3, 3, 0.75, 2 / 3),
        ("device", "B"): (1, 0.25, 0.0, 0, 0.0, None),
        ("device", "C"): (0, 0.0, None, 1, 0.25, 0.0),
        ("sex", "F"): (0, 0.0, None, 2, 0.5, 0.5),
        ("sex", "M"): (2, 0.5, 0.5, 2, 0.5, 0.5),
        ("sex", "unknown"): (2, 0.5, 0.5, 0, 0.0, None),
    }


def test_audit_as_text_and_as_plain_data() -> None:
    report = audit_leakage(*sides())
    text = str(report)
    assert text == report.table()
    assert "patients on both sides: 2\n  101: 2 train, 2 test cycles\n" in text
    assert "takes on both sides: 1 (101_1)" in text
    assert "identical audio: not checked" in text
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["leaks"] is True
    assert plain["shared_patients"] == {"101": [2, 2], "102": [1, 1]}
    assert plain["shift"][1] == {
        "column": "device",
        "value": "B",
        "train_cycles": 1,
        "train_share": 0.25,
        "train_abnormal": 0.0,
        "test_cycles": 0,
        "test_share": 0.0,
        "test_abnormal": None,
    }


@pytest.mark.parametrize("missing", [None, np.nan], ids=["none", "nan"])
def test_audit_of_two_sides_with_nothing_in_common(missing: float | None) -> None:
    train, test = sides()
    train = train.assign(patient=missing, take=missing).drop(columns=["device", "sex"])
    report = audit_leakage(train, test)
    assert not report.leaks
    assert report.shift.empty
    assert "share nothing that was checked" in str(report)
    assert report.to_dict()["shift"] == []


def test_audit_of_a_side_with_itself() -> None:
    train, _ = sides()
    report = audit_leakage(train, train)
    assert report.shared_recordings == ("101_a", "102_a", "no_id")
    assert report.same_times == {"101": 2, "102": 1}


@pytest.fixture
def wavs(tmp_path: Path) -> pd.DataFrame:
    """Write files whose samples agree for 101_a = 102_b (other bit depth), and whose lengths agree for more."""
    tone = np.round(np.sin(np.arange(400)) * 2000) / 32768
    sounds = {"101_a": tone, "102_a": -tone, "101_b": tone[::-1], "102_b": tone, "other": tone[:300]}
    rows = []
    for name, samples in sounds.items():
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, samples, 4000, subtype="PCM_24" if name == "102_b" else "PCM_16")
        rows.append((name, str(path), 4000, len(samples)))
    rows.append(("no_id", str(tmp_path / "never_read.wav"), 8000, 400))  # alone in its rate: must not be opened
    return pd.DataFrame(rows, columns=["recording", "path", "sample_rate", "frames"])


def test_audit_finds_identical_audio(wavs: pd.DataFrame) -> None:
    report = audit_leakage(*sides(), recordings=wavs)
    assert report.identical_audio == (("101_a", "102_b"),)
    assert "identical audio: 1 (101_a = 102_b)" in str(report)
    assert report.to_dict()["identical_audio"] == [["101_a", "102_b"]]


def test_audit_without_identical_audio(wavs: pd.DataFrame) -> None:
    train, test = sides()
    report = audit_leakage(train.iloc[2:3], test.iloc[3:], recordings=wavs)
    assert report.identical_audio == ()
    assert not report.leaks


def test_audit_errors(wavs: pd.DataFrame) -> None:
    train, test = sides()
    with pytest.raises(ValueError, match=r"test must have the columns .*; it lacks \['take'\]"):
        audit_leakage(train, test.drop(columns="take"))
    with pytest.raises(ValueError, match=r"recordings lacks 1 recordings of the two sides \(first: '102_a'\)"):
        audit_leakage(train, test, wavs[wavs["recording"] != "102_a"])
    with pytest.raises(ValueError, match="recordings names '101_a' twice"):
        audit_leakage(train, test, pd.concat([wavs, wavs]))


# Published data sets


@pytest.fixture(scope="module")
def icbhi(shared: Callable[[str], Path]) -> ICBHI:
    root = shared("data/icbhi_4k")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one recording's name differs from the split file
        return ICBHI(root, split="all")


def class_counts(cycles: pd.DataFrame) -> list[int]:
    return np.bincount(cycles["label"], minlength=4).tolist()


def test_icbhi_official_split_shares_two_patients(icbhi: ICBHI) -> None:
    cycles = icbhi.cycles
    split = split_cycles(cycles, val_fraction=0)
    train, test = cycles.loc[split.train], cycles.loc[split.test]
    assert class_counts(train) == [2063, 1215, 501, 363]
    assert class_counts(test) == [1579, 649, 385, 143]
    assert split.notes == ("in train and in test: patients 156, 218",)
    disjoint = test[~test["patient"].isin(split.describe(cycles)["shared_patients"])]
    assert class_counts(disjoint) == [1560, 617, 373, 86]

    report = audit_leakage(train, test, icbhi.all_recordings)
    assert report.shared_patients == {"156": (69, 61), "218": (48, 59)}
    assert {"156_2b3", "156_5b3", "156_8b3", "218_1b1"} <= set(report.shared_takes)
    assert report.same_times == {"156": 61}
    assert report.identical_audio == ()
    assert report.shared_recordings == ()
    shift = report.shift
    published = {
        ("device", "AKGC417L"): (2510, 60.9, 1836, 48.8),
        ("device", "Litt3200"): (41, 73.2, 461, 29.5),
        ("device", "LittC2SE"): (594, 41.6, 0, None),
        ("location", "Pr"): (591, 53.5, 412, 35.9),
        ("sex", "F"): (1827, 56.2, 525, 16.6),
        ("age_group", "child"): (455, 18.9, 333, 18.0),
        ("sex", "unknown"): (0, None, 61, 52.5),
    }
    percent = shift.assign(**{name: (100 * shift[name]).round(1) for name in ("train_abnormal", "test_abnormal")})
    percent = percent.astype(object).where(percent.notna(), None)
    for row, expected in published.items():
        found = percent.loc[row, ["train_cycles", "train_abnormal", "test_cycles", "test_abnormal"]]
        assert tuple(found) == expected, row


def test_icbhi_official_clean_shares_nothing(icbhi: ICBHI) -> None:
    cycles = icbhi.cycles
    split = split_cycles(cycles, "official-clean", val_fraction=0)
    train, test = cycles.loc[split.train], cycles.loc[split.test]
    assert class_counts(train) == [2053, 1186, 486, 300]
    assert class_counts(test) == [1579, 649, 385, 143]
    assert (train["recording"].nunique(), train["patient"].nunique()) == (526, 77)
    assert not audit_leakage(train, test, icbhi.all_recordings).leaks


def test_icbhi_random_recordings_leak(icbhi: ICBHI) -> None:
    split = split_cycles(icbhi.cycles, "random-recording", val_fraction=0, seed=1)
    record = split.describe(icbhi.cycles)
    assert (record["train"]["recordings"], record["test"]["recordings"]) == (552, 368)
    assert (len(record["shared_patients"]), record["test"]["patients"]) == (76, 93)
    seen = icbhi.cycles.loc[split.test].query("patient in @record['shared_patients']")
    assert seen["recording"].nunique() == 349


def test_icbhi_respirenet_folds(icbhi: ICBHI) -> None:
    published = [3455, 704, 536, 759, 1444]
    for fold, expected in enumerate(published):
        split = split_cycles(icbhi.cycles, f"patient-fold-{fold}", 0, folds=respirenet_folds())
        assert len(split.test) == expected


def shares(part: pd.DataFrame, whole: pd.DataFrame) -> np.ndarray:
    """Return the share of the cycles, then of the cycles of each class, that are in a part."""
    return np.array([len(part), *class_counts(part)]) / np.array([len(whole), *class_counts(whole)])


def test_icbhi_validation_is_near_the_wanted_share(icbhi: ICBHI) -> None:
    train = icbhi.cycles[icbhi.cycles["split"] == "train"]
    ours, chosen = [], set()
    for seed in range(10):
        val = train.loc[split_cycles(icbhi.cycles, seed=seed).val]
        ours.append(shares(val, train) - 0.15)
        chosen.add(tuple(sorted(val["patient"].unique())))
        assert abs(ours[-1]).max() < 0.04
        assert val["device"].nunique() >= 3
    assert len(chosen) == 10  # another seed, other patients
    # scikit-learn's nearest: one of seven folds.
    folds = StratifiedGroupKFold(7, shuffle=True, random_state=0).split(train, train["label"], train["patient"])
    theirs = [abs(shares(train.iloc[rows], train) - 1 / 7).max() for _, rows in folds]
    assert np.mean(np.abs(ours).max(axis=1)) < np.mean(theirs)


def test_icbhi_folds_are_more_even_than_scikit_learns(icbhi: ICBHI) -> None:
    cycles = icbhi.cycles
    fold = cycles["patient"].map(patient_folds(cycles))
    ours = max(abs(shares(cycles[fold == k], cycles) - 0.2).max() for k in range(5))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(cycles, cycles["label"], cycles["patient"])
    theirs = max(abs(shares(cycles.iloc[rows], cycles) - 0.2).max() for _, rows in folds)
    assert ours < 0.04
    assert ours < theirs


def test_sprsound_train_and_intra_hold_one_sound_twice(shared: Callable[[str], Path]) -> None:
    # By recording: those of poor quality have no events, and would be missing among the events.
    data = SPRSound(shared("data/sprsound_mini"), split="all", task="2-1", partial=True)
    cycles = data.cycles
    inter = split_cycles(cycles, val_fraction=0, test_splits=("inter",))
    report = audit_leakage(cycles.loc[inter.train], cycles.loc[inter.test], data.all_recordings)
    assert not report.leaks
    intra = split_cycles(cycles, val_fraction=0, test_splits=("intra",))
    report = audit_leakage(cycles.loc[intra.train], cycles.loc[intra.test], data.all_recordings)
    assert report.identical_audio == (("41279835_14.1_0_p1_2945", "41279835_14.1_0_p1_2050"),)
    assert (len(report.shared_patients), cycles.loc[intra.test, "patient"].nunique()) == (36, 37)
    clean = split_cycles(cycles, "official-clean", test_splits=("inter", "intra"))
    assert not clean.describe(cycles)["shared_patients"]
