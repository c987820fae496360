from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from respiro.datasets import ICBHI
from respiro.evaluation import plot_quality
from respiro.transforms import AudioQuality

CLASSES = ("normal", "crackle", "wheeze", "both")


def cycles(rows: int = 80) -> pd.DataFrame:
    numbers = np.arange(rows)
    return pd.DataFrame(
        {
            "class": np.array(CLASSES, dtype=object)[numbers % 4],
            "label": numbers % 4,
            "device": np.where(numbers % 5 < 2, "Meditron", "AKGC417L"),
            "quality": np.random.default_rng(0).uniform(0.2, 0.9, rows).astype("float32"),
        },
        index=numbers[::-1] + 1000,
    )


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def medians(axes: Axes) -> list[float]:
    """Of the boxes from left to right: the line over the whole width of a box that lies within it."""
    lines = [np.asarray(line.get_xydata()) for line in axes.lines]
    level = [line for line in lines if len(line) == 2 and line[0, 1] == line[1, 1] and np.ptp(line[:, 0]) > 0.5]
    return [float(line[0, 1]) for line in sorted(level, key=lambda line: float(line[0, 0]))]


def test_groups_stand_side_by_side_with_their_counts_and_medians() -> None:
    table = cycles()
    figure = plot_quality(table)
    device, kind = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["by device", "by class"]
    assert labels(device) == ["AKGC417L\nn = 48", "Meditron\nn = 32"]
    assert labels(kind) == [f"{name}\nn = 20" for name in CLASSES]
    for axes, column, names in ((device, "device", ("AKGC417L", "Meditron")), (kind, "class", CLASSES)):
        expected = [float(table.loc[table[column] == name, "quality"].median()) for name in names]
        assert medians(axes) == pytest.approx(expected, abs=1e-6)
    assert device.get_ylabel() == "audio quality score"
    assert device.get_ylim() == kind.get_ylim() == (-0.02, 1.02)


def test_classes_without_labels_stand_in_the_order_of_their_names() -> None:
    assert [text.split("\n")[0] for text in labels(plot_quality(cycles().drop(columns="label")).axes[1])] == sorted(
        CLASSES
    )


def test_rows_without_a_device_or_a_class_are_shown() -> None:
    table = cycles()
    table.loc[table.index[:7], "device"] = None
    table.loc[table.index[:3], ["class", "label"]] = [None, -1]
    device, kind = plot_quality(table).axes
    assert labels(device)[-1] == "unknown\nn = 7"
    assert labels(kind)[-1] == "left out\nn = 3"
    assert len(labels(kind)) == 5


@pytest.mark.parametrize("rows", [1, 2])
def test_few_cycles(rows: int, tmp_path: Path) -> None:
    plot_quality(cycles(rows)).savefig(tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_many_devices_have_room(tmp_path: Path) -> None:
    table = cycles().assign(device=[f"device {number % 12:02d}" for number in range(80)])
    figure = plot_quality(table)
    figure.savefig(tmp_path / "quality.png")
    assert len(labels(figure.axes[0])) == 12
    assert figure.get_figwidth() > plot_quality(cycles()).get_figwidth()


def test_the_table_is_not_changed() -> None:
    table = cycles()
    before = table.copy()
    plot_quality(table)
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "quality"}, "must have the columns quality, device and class, quality is missing"),
        ({"drop": "device"}, "device is missing"),
        ({"missing": 80}, r"the quality of 80 of 80 cycles was not computed; call add_quality\(AudioQuality\(\)\)"),
        ({"missing": 1}, "the quality of 1 of 80 cycles was not computed"),
        ({"rows": 0}, "there are no cycles to draw"),
    ],
    ids=["no-quality", "no-device", "not-computed", "one-not-computed", "empty"],
)
def test_what_cannot_be_drawn_says_how_to_go_on(change: dict[str, Any], message: str) -> None:
    table = cycles(change.get("rows", 80))
    table.iloc[: change.get("missing", 0), table.columns.get_loc("quality")] = float("nan")  # type: ignore[index]
    with pytest.raises(ValueError, match=message):
        plot_quality(table.drop(columns=change.get("drop", [])))


def test_the_table_of_a_data_set(icbhi_root: Path) -> None:
    data = ICBHI(icbhi_root, split="train", sample_rate=4000)
    with pytest.raises(ValueError, match=r"was not computed; call add_quality"):
        plot_quality(data.cycles)
    data.add_quality(AudioQuality(4000))
    device, kind = plot_quality(data.cycles).axes
    counts = dict(zip(data.classes, data.class_counts, strict=True))
    assert labels(kind) == [f"{name}\nn = {count}" for name, count in counts.items() if count]
    assert sum(int(text.split("n = ")[1]) for text in labels(device)) == len(data)


def test_matplotlib_is_loaded_only_to_draw() -> None:
    # torchmetrics loads matplotlib where it is installed; nothing is opened either way.
    code = (
        "import sys, torchmetrics; before = set(sys.modules); import respiro.evaluation; "
        "print('matplotlib' in set(sys.modules) - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]
