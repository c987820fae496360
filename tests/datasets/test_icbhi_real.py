"""ICBHI on recordings of the database itself, and on metadata as they circulate."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from respiro.datasets.icbhi import ICBHI, respirenet_folds
from respiro.errors import PartialDatasetError, VerificationError

FIRST = "101_1b1_Al_sc_Meditron"
SIDE_FILES = (
    "ICBHI_challenge_train_test.txt",
    "ICBHI_Challenge_demographic_information.txt",
    "ICBHI_Challenge_diagnosis.txt",
)
FULL = {
    ("train", "all"): (539, 79, 4142, 2063, 1215, 501, 363),
    ("test", "all"): (381, 49, 2756, 1579, 649, 385, 143),
    ("all", "all"): (920, 126, 6898, 3642, 1864, 886, 506),
    ("train", "AKGC417L"): (361, 17, 2510, 982, 996, 255, 277),
    ("train", "LittC2SE"): (87, 23, 594, 347, 77, 126, 44),
    ("train", "Litt3200"): (5, 2, 41, 11, 3, 19, 8),
    ("train", "Meditron"): (86, 41, 997, 723, 139, 101, 34),
    ("test", "AKGC417L"): (285, 16, 1836, 940, 547, 245, 104),
    ("test", "Litt3200"): (55, 10, 461, 325, 26, 93, 17),
    ("test", "Meditron"): (41, 24, 459, 314, 76, 47, 22),
}
MINI = {
    ("all", "all"): (42, 34, 384, 220, 62, 63, 39),
    ("train", "all"): (19, 18, 182, 93, 29, 34, 26),
    ("test", "all"): (23, 16, 202, 127, 33, 29, 13),
    ("train", "AKGC417L"): (4, 4, 29, 3, 4, 6, 16),
    ("train", "LittC2SE"): (3, 3, 22, 8, 5, 5, 4),
    ("train", "Meditron"): (12, 11, 131, 82, 20, 23, 6),
    ("test", "AKGC417L"): (2, 2, 11, 3, 4, 2, 2),
    ("test", "Litt3200"): (13, 7, 99, 41, 20, 27, 11),
    ("test", "Meditron"): (8, 7, 92, 83, 9, 0, 0),
}


@pytest.fixture(autouse=True)
def _unexpected_warnings_fail() -> Iterator[None]:
    """Nothing is said without need: a test that expects a note asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*226_1b1_Pl_sc_LittC2SE")  # every real copy has it
        yield


def counts_of(dataset: ICBHI) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        key: tuple(row) for key, row in zip(dataset.counts().index, dataset.counts().to_numpy().tolist(), strict=True)
    }


@pytest.fixture(scope="module")
def full(shared: Callable[[str], Path]) -> ICBHI:
    with pytest.warns(UserWarning, match="226_1b1_Pl_sc_LittC2SE") as notes:
        dataset = ICBHI(shared("data/icbhi_4k"), split="all")
    assert len(notes) == 1
    return dataset


def test_full_database_has_the_published_counts(full: ICBHI) -> None:
    assert counts_of(full) == FULL
    assert len(full.vocabularies["patient"]) == 126
    cycles = full.all_cycles
    assert cycles["crackle"].sum() == 2370
    assert cycles["wheeze"].sum() == 1392
    assert (cycles["end"] - cycles["start"]).mean() == pytest.approx(2.7005, abs=5e-4)
    assert full.all_recordings["frames"].sum() == 79_092_152


@pytest.mark.parametrize("protocol", ["official", "official-clean"])
def test_full_database_verifies(shared: Callable[[str], Path], protocol: str) -> None:
    root = shared("data/icbhi_4k")
    ICBHI(root, split="test", protocol=protocol, labels="diagnosis").verify()  # type: ignore[arg-type]


def test_complete_database_is_not_downloaded_again(shared: Callable[[str], Path]) -> None:
    assert len(ICBHI(shared("data/icbhi_4k"), download=True)) == 4142


def test_official_clean_has_the_published_counts(shared: Callable[[str], Path]) -> None:
    clean = ICBHI(shared("data/icbhi_4k"), protocol="official-clean")
    counts = counts_of(clean)
    assert counts["train", "all"] == (526, 77, 4025, 2053, 1186, 486, 300)
    assert counts["test", "all"] == FULL["test", "all"]
    assert counts["left-out", "all"] == (13, 2, 117, 10, 29, 15, 63)
    assert clean.class_counts == [2053, 1186, 486, 300]


@pytest.mark.parametrize(
    ("labels", "train", "test"),
    [
        ("2-class", [2063, 2079], [1579, 1177]),
        ("diagnosis", [147, 3433, 562], [175, 2423, 158]),
        ("diagnosis-2-class", [147, 3995], [175, 2581]),
    ],
)
def test_other_labels_have_the_published_counts(
    shared: Callable[[str], Path], labels: str, train: list[int], test: list[int]
) -> None:
    root = shared("data/icbhi_4k")
    assert ICBHI(root, labels=labels).class_counts == train  # type: ignore[arg-type]
    assert ICBHI(root, split="test", labels=labels).class_counts == test  # type: ignore[arg-type]


def test_metadata_agree_with_the_table_of_scl(full: ICBHI, shared: Callable[[str], Path]) -> None:
    expected = json.loads((shared("golden/scl") / "metadata_counts.json").read_text())
    cycles = full.all_cycles
    is_unknown = cycles["patient"] == str(expected["patient_without_demographics"])
    assert cycles.loc[is_unknown, ["age", "sex", "age_group"]].isna().all(axis=None)
    # That table counts the unknown patient as a male adult.
    letters = pd.DataFrame(
        {
            "sex": cycles["sex"].fillna("M"),
            "age": cycles["age_group"].fillna("adult").str[0].str.upper(),
            "class": cycles["class"].str[0].str.upper(),
            "device": cycles["device"],
        }
    )
    for side, numbers in expected["split"].items():
        here = letters[cycles["split"] == side]
        assert full.all_recordings["split"].eq(side).sum() == numbers["recordings"]
        for name, columns in {
            "class": ["class"], "device": ["device"], "sex": ["sex"], "age_group": ["age"], "sex_age": ["sex", "age"],
            "sex_class": ["sex", "class"], "age_class": ["age", "class"], "sex_age_class": ["sex", "age", "class"],
        }.items():  # fmt: skip
            assert here[columns].sum(axis=1).value_counts().to_dict() == numbers[name], name
    patients = full.all_recordings.drop_duplicates("patient")
    assert patients["bmi"].isna().sum() == expected["bmi_missing"]["patients"]
    assert cycles["bmi"].isna().sum() == expected["bmi_missing"]["cycles"]
    assert patients["sex"].value_counts().to_dict() == {"M": 79, "F": 46}


def test_mini_set_has_the_counts_of_its_page(shared: Callable[[str], Path]) -> None:
    root = shared("data/icbhi_mini")
    with pytest.raises(PartialDatasetError, match=r"42 of 920 recordings .*first missing: 101_1b1_Pr_sc_Meditron"):
        ICBHI(root)
    mini = ICBHI(root, split="all", partial=True)
    assert mini.partial
    assert len(mini.missing) == 878
    assert counts_of(mini) == MINI
    manifest = pd.read_csv(root / "MANIFEST.csv", dtype={"patient": str})
    table = mini.recordings.reset_index(drop=True)
    for ours, theirs in {
        "recording": "file", "patient": "patient", "split": "split", "device": "device", "location": "location",
        "mode": "mode", "sample_rate": "sr", "encoding": "subtype", "frames": "frames", "age": "age", "sex": "sex",
        "bmi": "bmi", "weight": "child_weight", "height": "child_height", "diagnosis": "diagnosis",
    }.items():  # fmt: skip
        pd.testing.assert_series_equal(table[ours], manifest[theirs], check_names=False, check_dtype=False)


def link_database(source: Path, target: Path) -> Path:
    """Every file of a database as a link, so that a test can exchange one."""
    (target / "ICBHI_final_database").mkdir()
    for path in [*(source / "ICBHI_final_database").iterdir(), *(source / name for name in SIDE_FILES)]:
        (target / path.relative_to(source)).symlink_to(path)
    return target


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        (
            "ICBHI_final_database/" + FIRST + ".txt", "\n", "\r\n",
            ["annotations SHA-256: .*line ends were converted"],
        ),
        (
            "ICBHI_Challenge_diagnosis.txt", "101\tURTI", "101\tAsthma",
            ["Asthma patients: expected 1, found 2", "URTI patients: expected 14, found 13", "^chronic cycles",
             "non-chronic cycles", "^chronic recordings", "non-chronic recordings",
             "diagnosis SHA-256: .*a diagnosis file with wrong values"],
        ),
        (
            "ICBHI_Challenge_demographic_information.txt", "101\t3\t", "101\t4\t",
            ["demographics SHA-256: expected abc062ae.*found .*other values"],
        ),
        (
            "ICBHI_challenge_train_test.txt", "102_1b1_Ar_sc_Meditron\ttest", "102_1b1_Ar_sc_Meditron\ttrain",
            ["train recordings: expected 539, found 540", "test recordings", "train patients", "test patients",
             "train cycles", "train normal", "test cycles", "test normal", "split SHA-256: .*not the official one"],
        ),
    ],
    ids=["line-ends", "wrong-diagnosis", "wrong-age", "other-side"],
)  # fmt: skip
def test_verify_finds_what_was_changed(
    shared: Callable[[str], Path], tmp_path: Path, name: str, old: str, new: str, expected: list[str]
) -> None:
    source = shared("data/icbhi_4k")
    text = (source / name).read_bytes().decode()
    assert old in text
    changed = link_database(source, tmp_path) / name
    changed.unlink()
    changed.write_bytes(text.replace(old, new).encode())
    with pytest.raises(VerificationError) as error:
        ICBHI(tmp_path).verify()
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(expected)
    for pattern in expected:
        assert any(re.search(pattern, line) for line in lines), pattern


VARIANTS = {
    "opera-split": ("ICBHI_challenge_train_test.opera_921lines.txt", 0),
    "patchmix-split": ("official_split.patchmix.txt", 0),
    "kaggle-demographics-crlf": ("demographic_info.kaggle_crlf.txt", 1),
    "kaggle-demographics-lf": ("demographic_info.kaggle_lf.txt", 1),
    "patchmix-demographics": ("metadata.patchmix.txt", 1),
    "kaggle-diagnosis": ("patient_diagnosis.kaggle.csv", 2),
    "patchmix-diagnosis": ("patient_diagnosis.patchmix.txt", 2),
}


@pytest.mark.parametrize(("name", "kind"), VARIANTS.values(), ids=VARIANTS)
def test_circulating_metadata_agree_with_the_official(
    full: ICBHI, shared: Callable[[str], Path], tmp_path: Path, name: str, kind: int
) -> None:
    root = link_database(shared("data/icbhi_4k"), tmp_path)
    side_file = root / SIDE_FILES[kind]
    side_file.unlink()
    side_file.symlink_to(shared("data/icbhi_variants") / name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*1 entries stand twice.*226_1b1_Pl")
        variant = ICBHI(root, split="all")
    variant.verify()
    pd.testing.assert_frame_equal(variant.all_cycles, full.all_cycles)


def test_cycles_agree_with_an_independent_table(full: ICBHI, shared: Callable[[str], Path]) -> None:
    path = shared("data/icbhi_variants") / "icbhi_metadata.percycle.gkont.csv"
    table = pd.read_csv(path, dtype={"PID": str}).sort_values(["Filename", "CycleIndex"], ignore_index=True)
    for ours, theirs in {
        "patient": "PID", "recording": "Filename", "cycle": "CycleIndex", "start": "CycleStart", "crackle": "Crackles",
        "wheeze": "Wheezes", "split": "Split", "device": "Device", "age": "Age", "sex": "Sex", "bmi": "BMI",
        "weight": "CW", "height": "CH", "diagnosis": "Disease", "location": "AuscLoc",
    }.items():  # fmt: skip
        pd.testing.assert_series_equal(full.all_cycles[ours], table[theirs], check_names=False, check_dtype=False)
    # The ends of the 4 kHz copy are clipped to its recordings, at most half a millisecond.
    assert (full.all_cycles["end"] - table["CycleEnd"]).abs().max() <= 5e-4
    folds = table.drop_duplicates("PID").set_index("PID")["Fold"].to_dict()
    assert folds == respirenet_folds()


def test_folds_of_respirenet(full: ICBHI, shared: Callable[[str], Path]) -> None:
    folds = respirenet_folds()
    lines = (shared("data/icbhi_variants") / "patient_list_foldwise.txt").read_text().splitlines()
    assert folds == {patient: int(fold) for patient, fold in map(str.split, lines)}
    cycles = full.all_cycles.assign(fold=full.all_cycles["patient"].map(folds))
    by_fold = cycles.groupby("fold").agg(
        patients=("patient", "nunique"), recordings=("recording", "nunique"), cycles=("label", "size")
    )
    assert by_fold.to_numpy().tolist() == [
        [26, 512, 3455],
        [25, 61, 704],
        [25, 50, 536],
        [25, 99, 759],
        [25, 198, 1444],
    ]
