"""Labels made of metadata columns: ids, names, counts, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from respiro.datasets import ICBHI, MetadataLabels, RespiratoryDataset, SPRSound, metadata_labels
from respiro.datasets.base import Batch
from respiro.errors import LabelError

NAN = float("nan")
TABLE = pd.DataFrame(
    {
        "sex": ["M", "F", "F", None, "M", "F"],
        "age": [70.0, 4.0, 17.9, 30.0, 18.0, NAN],
        "device": ["mic", "mic", "scope", "mic", "scope", "mic"],
        "class": ["normal", "both", "normal", "normal", "both", None],
        "patient": ["10", "9", "9", "3", "10", None],
        "bmi": [21.5, 17.0, NAN, 30.0, 24.0, 20.0],
        "number": [10, 9, 9, 3, 10, 3],
        "score": [10.0, 9.0, 9.0, NAN, 10.0, 3.0],
        "site": ["x"] * 6,
    },
    index=[7, 3, 5, 1, 2, 0],
)


@pytest.mark.parametrize(
    ("columns", "ids", "names"),
    [
        (["sex"], [1, 0, 0, -1, 1, 0], ("F", "M")),
        ("sex", [1, 0, 0, -1, 1, 0], ("F", "M")),
        (["age_group"], [1, 0, 0, 1, 1, -1], ("<18", ">=18")),
        (["sex", "age_group"], [1, 0, 0, -1, 1, -1], ("F,<18", "M,>=18")),
        (["age_group", "sex"], [1, 0, 0, -1, 1, -1], ("<18,F", ">=18,M")),
        (["device"], [0, 0, 1, 0, 1, 0], ("mic", "scope")),
        (["patient"], [0, 2, 2, 1, 0, -1], ("10", "3", "9")),
        (["class"], [1, 0, 1, 1, 0, -1], ("both", "normal")),
        (["sex", "class"], [3, 0, 1, -1, 2, -1], ("F,both", "F,normal", "M,both", "M,normal")),
        (["number"], [2, 1, 1, 0, 2, 0], ("3", "9", "10")),  # as numbers, not as text
        (["score"], [2, 1, 1, -1, 2, 0], ("3", "9", "10")),  # floats only because one is missing
        (["site", "sex"], [1, 0, 0, -1, 1, 0], ("x,F", "x,M")),  # a constant column beside one that is not
    ],
    ids=str,
)
def test_ids_are_sorted_combinations(columns: Any, ids: list[int], names: tuple[str, ...]) -> None:
    before = TABLE.copy()
    labels = metadata_labels(TABLE, columns)
    assert labels.ids.tolist() == ids
    assert labels.ids.index.equals(TABLE.index)
    assert labels.ids.dtype == np.int64
    assert labels.names == names
    assert labels.counts == dict(Counter(names[i] for i in ids if i >= 0))
    assert labels.unknown == ids.count(-1)
    assert (labels.merged, labels.problem) == ((), "")
    pd.testing.assert_frame_equal(TABLE, before)


@pytest.mark.parametrize(
    ("threshold", "ids", "names"),
    [
        (5.0, [1, 0, 1, 1, 1, -1], ("<5", ">=5")),
        (17.9, [1, 0, 1, 1, 1, -1], ("<17.9", ">=17.9")),
        (65, [1, 0, 0, 0, 0, -1], ("<65", ">=65")),
    ],
    ids=str,
)
def test_the_age_threshold_belongs_to_the_older(threshold: float, ids: list[int], names: tuple[str, ...]) -> None:
    labels = metadata_labels(TABLE, ["age_group"], age_threshold=threshold)
    assert (labels.ids.tolist(), labels.names) == (ids, names)


@pytest.mark.parametrize("ages", [{}, {"age": NAN}], ids=["no ages", "no known age"])
def test_age_groups_stand_in_for_ages_that_nobody_knows(ages: dict[str, Any]) -> None:
    table = pd.DataFrame({"age_group": ["child", None, "adult"]}).assign(**ages)
    assert metadata_labels(table, ["age_group"]).ids.tolist() == [1, -1, 0]
    with pytest.raises(LabelError, match="age_threshold 5 needs ages, and the table has age groups only"):
        metadata_labels(table, ["age_group"], age_threshold=5.0)


def test_ages_come_before_age_groups() -> None:
    table = pd.DataFrame({"age_group": ["child", "child", "adult"], "age": [3.0, 7.0, NAN]})
    assert metadata_labels(table, ["age_group"], age_threshold=5.0).ids.tolist() == [0, 1, -1]


@pytest.mark.parametrize("empty", [None, NAN, pd.NA], ids=str)
@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_every_kind_of_missing_is_unknown(empty: Any, dtype: Any) -> None:
    table = pd.DataFrame({"sex": pd.Series(["M", empty, "F"], dtype=object).astype(dtype)})
    assert metadata_labels(table, ["sex"]).ids.tolist() == [1, -1, 0]


def test_the_order_of_categories_does_not_count() -> None:
    sex = pd.Series(pd.Categorical(["M", "F", "M"], categories=["M", "X", "F"]))
    assert metadata_labels(sex.to_frame("sex"), ["sex"]).ids.tolist() == [1, 0, 1]


VALUES = st.sampled_from(["a", "b", "c", None])


@settings(max_examples=50, deadline=None)
@given(st.data(), st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=12))
def test_ids_depend_on_the_values_that_occur_and_not_on_the_order(data: st.DataObject, rows: list[Any]) -> None:
    table = pd.DataFrame(rows, columns=["one", "two"], dtype=object)
    labels = metadata_labels(table, ["one", "two"], strict=False)
    known = sorted({row for row in rows if None not in row})
    if len(known) < 2:
        assert labels.problem
        known = []
    assert labels.names == tuple(",".join(pair) for pair in known)
    assert labels.ids.tolist() == [known.index(row) if row in known else -1 for row in rows]
    order = data.draw(st.permutations(range(len(rows))))
    again = metadata_labels(table.iloc[[*order, order[0]]], ["one", "two"], strict=False)  # one row twice
    assert again.names == labels.names
    assert again.ids.tolist() == labels.ids.iloc[[*order, order[0]]].tolist()


@pytest.mark.parametrize(
    ("merge_below", "ids", "names", "merged"),
    [
        (0, [0, 0, 0, 1, 2, 2, 3, -1], ("a", "b", "c", "d"), ()),
        (1, [0, 0, 0, 1, 2, 2, 3, -1], ("a", "b", "c", "d"), ()),
        (2, [0, 0, 0, 2, 1, 1, 2, -1], ("a", "c", "other"), ("b", "d")),
        (3, [0, 0, 0, 1, 1, 1, 1, -1], ("a", "other"), ("b", "c", "d")),
    ],
    ids=str,
)
def test_small_combinations_share_the_last_label(
    merge_below: int, ids: list[int], names: tuple[str, ...], merged: tuple[str, ...]
) -> None:
    labels = metadata_labels(pd.DataFrame({"x": [*"aaabccd", None]}), ["x"], merge_below=merge_below)
    assert (labels.ids.tolist(), labels.names, labels.merged) == (ids, names, merged)
    assert sum(labels.counts.values()) + labels.unknown == 8
    assert tuple(labels.counts) == names


def test_only_reference_rows_are_counted() -> None:
    table = pd.DataFrame({"x": [*"aabbcc", None, None]}, index=range(10, 18))
    labels = metadata_labels(table, ["x"], merge_below=2, reference=[17, 10, 11, 12])
    assert labels.names == ("a", "other")
    assert labels.merged == ("b", "c")  # b has one row there, c none
    assert labels.counts == {"a": 2, "other": 1}
    assert labels.unknown == 1
    assert labels.ids.tolist() == [0, 0, 1, 1, 1, 1, -1, -1]
    unmerged = metadata_labels(table, ["x"], reference=pd.Index([10, 12]))
    assert unmerged.counts == {"a": 1, "b": 1, "c": 0}


def test_the_labels_tell_what_they_are() -> None:
    labels = metadata_labels(TABLE, ["sex", "class"], merge_below=1, reference=[7, 3, 1, 2, 0])
    assert str(labels) == (
        "4 labels from sex and class: F,both (1), M,both (1), M,normal (1), other (0); unknown (2); other: F,normal"
    )
    record = labels.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "columns": ["sex", "class"],
        "names": ["F,both", "M,both", "M,normal", "other"],
        "counts": {"F,both": 1, "M,both": 1, "M,normal": 1, "other": 0},
        "unknown": 2,
        "merged": ["F,normal"],
    }


OF_NO_USE = [
    ("absent", ["sexx"], {}, "no column 'sexx'.* the table has sex, age, device, class"),
    ("constant", ["site"], {}, "nothing to contrast: all 6 rows where they are known have 'x'"),
    ("constant in train", ["sex"], {"reference": [3, 5, 1]}, "all 2 rows where they are known have 'F'"),
    ("all merged", ["sex"], {"merge_below": 9}, "have 'other'; take other columns or a lower merge_below"),
    ("all unknown", ["sex"], {"reference": [1]}, "labels from sex are unknown in all 1 rows"),
    ("continuous", ["bmi"], {}, r"column 'bmi' is continuous \(5 different values\); bin it first \(pandas.cut\)"),
    ("age itself", ["sex", "age"], {}, "column 'age' is continuous .*; name 'age_group'"),
    ("one name twice", ["a", "b"], {}, "two labels from a and b have one name among x,y,z, x,y,z"),
    ("a value called other", ["c"], {"merge_below": 2}, "have one name among other, other"),
]


@pytest.mark.parametrize(
    ("columns", "options", "message"), [case[1:] for case in OF_NO_USE], ids=[case[0] for case in OF_NO_USE]
)
def test_labels_of_no_use_are_refused(columns: list[str], options: dict[str, Any], message: str) -> None:
    table = TABLE.assign(a=["x", "x,y"] * 3, b=["y,z", "z"] * 3, c=["other", "other", "other", "other", "few", "odd"])
    with pytest.raises(LabelError, match=message):
        metadata_labels(table, columns, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = metadata_labels(table, columns, **options, strict=False)
    assert labels.ids.tolist() == [-1] * 6
    assert labels.problem
    assert str(labels) == labels.problem == labels.to_dict()["problem"]
    assert labels.unknown == len(options.get("reference", table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": []}, r"columns must name at least one column, and none twice, got \[\]"),
        ({"columns": ["sex", "sex"]}, "none twice"),
        ({"age_threshold": 0.0}, "age_threshold must be a positive number of years, got 0.0"),
        ({"age_threshold": NAN}, "age_threshold must be"),
        ({"age_threshold": math.inf}, "age_threshold must be"),
        ({"merge_below": -1}, "merge_below must not be negative, got -1"),
        ({"reference": []}, "reference must hold row labels of the table, at least one, got none"),
        ({"reference": [7, 99]}, "reference must hold row labels of the table, at least one, got 7, 99"),
        ({"reference": TABLE["sex"] == "F"}, "reference must hold row labels"),
    ],
    ids=str,
)
def test_wrong_values_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metadata_labels(TABLE, **({"columns": ["sex"]} | arguments))


def test_mostly_missing_is_said() -> None:
    table = pd.DataFrame({"sex": ["M", "F", None, None, None]})
    with pytest.warns(UserWarning, match="labels from sex are unknown in 3 of 5 rows; only the other 2 count"):
        metadata_labels(table, ["sex"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metadata_labels(table, ["sex"], reference=[0, 1, 2, 3])  # just half


@pytest.fixture
def icbhi(icbhi_root: Path) -> ICBHI:
    return ICBHI(icbhi_root, split="all", duration=1.0)


def test_samples_and_batches_carry_the_labels(icbhi: ICBHI) -> None:
    _ = icbhi[0]  # what was cached before must not stay
    labels = icbhi.add_labels("sex_device", ["sex", "device"])
    assert isinstance(labels, MetadataLabels)
    assert icbhi.metadata == {"sex_device": labels}
    for workers in (0, 1):
        batch = next(iter(DataLoader(icbhi, batch_size=9, shuffle=True, num_workers=workers)))
        assert batch["sex_device"].dtype == batch["label"].dtype
        assert batch["sex_device"].tolist() == labels.ids.loc[batch["index"].tolist()].tolist()


def test_unknown_stays_minus_one_in_batches(icbhi: ICBHI) -> None:
    icbhi.all_cycles.loc[icbhi.cycles.index[:2], "sex"] = None
    icbhi.add_labels("which", "sex")
    assert default_collate([icbhi[row] for row in range(3)])["which"].tolist()[:2] == [-1, -1]


def test_subsets_keep_the_labels_and_their_own(icbhi: ICBHI) -> None:
    before = icbhi.subset(icbhi.cycles.index[::2])
    labels = icbhi.add_labels("where", ["location"])
    part = icbhi.subset(icbhi.cycles.index[[5, 3]])
    assert [int(part[row]["where"]) for row in range(2)] == labels.ids.iloc[[5, 3]].tolist()
    assert "where" not in before[0]
    part.add_labels("only here", ["device"])
    assert "only here" in part[0]
    assert "only here" not in icbhi[0]


def test_ids_are_those_of_every_split(icbhi_root: Path) -> None:
    sides: list[RespiratoryDataset] = [ICBHI(icbhi_root, split=side) for side in ("train", "test")]
    first, second = (side.add_labels("who", ["patient", "sex"], merge_below=15) for side in sides)
    pd.testing.assert_series_equal(first.ids, second.ids)
    assert first.merged


def test_a_name_can_be_given_again(icbhi: ICBHI) -> None:
    icbhi.add_labels("x", ["sex"])
    again = icbhi.add_labels("x", ["device"])
    assert [int(icbhi[row]["x"]) for row in range(len(icbhi))] == again.ids.loc[icbhi.cycles.index].tolist()


@pytest.mark.parametrize("name", Batch.__annotations__)
def test_no_key_of_a_batch_is_hidden(icbhi: ICBHI, name: str) -> None:
    with pytest.raises(ValueError, match=f"labels cannot be named '{name}', which every batch has already"):
        icbhi.add_labels(name, ["sex"])


LETTERS = {
    **{"F": "F", "M": "M", "<18": "C", ">=18": "A"},
    **{"normal": "N", "crackle": "C", "wheeze": "W", "both": "B"},
}
COMBINATIONS = {
    "class": ["class"],
    "device": ["device"],
    "sex": ["sex"],
    "age_group": ["age_group"],
    "sex_age": ["sex", "age_group"],
    "sex_class": ["sex", "class"],
    "age_class": ["age_group", "class"],
    "sex_age_class": ["sex", "age_group", "class"],
}


@pytest.fixture(scope="module")
def full(shared: Callable[[str], Path]) -> ICBHI:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*226_1b1_Pl_sc_LittC2SE")  # every real copy has it
        return ICBHI(shared("data/icbhi_4k"), split="all")


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("side", ["train", "test"])
def test_icbhi_counts_are_the_published_ones(
    full: ICBHI, shared: Callable[[str], Path], side: str, combination: str
) -> None:
    expected = json.loads((shared("golden/scl") / "metadata_counts.json").read_text())["split"][side][combination]
    columns = COMBINATIONS[combination]
    about_patient = [column for column in columns if column in ("sex", "age_group")]
    # The reference counts patient 223, who is unknown here, as a man: 29 normal, 19 crackle and 13 wheeze in test.
    imputed = {"N": 29, "C": 19, "W": 13} if side == "test" and about_patient else {}
    as_man = "".join({"sex": "M", "age_group": "A"}[column] for column in about_patient)
    published = Counter(expected)
    for letter, count in imputed.items():
        published[as_man + (letter if "class" in columns else "")] -= count
    cycles = full.all_cycles
    labels = metadata_labels(cycles, columns, reference=cycles.index[cycles["split"] == side])
    found = {"".join(LETTERS.get(part, part) for part in name.split(",")): n for name, n in labels.counts.items() if n}
    assert found == {name: count for name, count in published.items() if count}
    assert labels.unknown == sum(imputed.values())
    assert (labels.ids[cycles["patient"] == "223"] == -1).all() == bool(about_patient)


def test_icbhi_combinations_that_are_all_but_absent_are_merged(full: ICBHI) -> None:
    train = full.cycles.index[full.cycles["split"] == "train"]
    labels = full.add_labels("all", ["sex", "age_group", "class"], merge_below=10, reference=train)
    assert labels.merged == ("F,<18,both", "M,<18,both")  # 3 and 1 cycles
    assert labels.counts["other"] == 4
    assert len(labels.names) == 15


def test_sprsound_groups_are_those_of_the_released_code(shared: Callable[[str], Path]) -> None:
    """There id = 2 * gender + (age >= 5); ours are the same groups in sorted order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = SPRSound(shared("data/sprsound_mini"), split="all", partial=True)
    labels = data.add_labels("sex_age", ["sex", "age_group"], age_threshold=5.0)
    assert labels.names == ("F,<5", "F,>=5", "M,<5", "M,>=5")
    fields = data.all_cycles["recording"].str.split("_")
    released = 2 * fields.str[2].astype(int) + (fields.str[1].astype(float) >= 5)
    ours_of = {0: 2, 1: 3, 2: 0, 3: 1}  # gender 0 is male
    assert labels.ids.tolist() == released.map(ours_of).tolist()
    assert labels.unknown == 0
