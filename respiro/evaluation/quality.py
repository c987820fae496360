"""A picture of audio quality: what is recorded with one device, or of one class, may lie high or low as a whole.

Made without pyplot: nothing is shown, nothing stays open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from respiro.evaluation.embeddings import _ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_quality"]

#: What makes the groups of a panel, and what rows without a value are called.
_COLUMNS = {"device": "unknown", "class": "left out"}
_BLUE, _DARK = "#3b75af", "#222222"
_HEIGHT, _MARGIN, _BOX = 4.4, 1.1, 0.75  # inches: of the figure, beside the boxes of a panel, of a box
_MOST_UPRIGHT = 5  # labels in a panel that still fit side by side


def plot_quality(cycles: pd.DataFrame) -> Figure:
    """Draw the audio quality of cycles by device and, beside it, by class, each group with its number of cycles.

    A box reaches from the first quartile to the third, with a line at the median; whiskers reach to the farthest cycle
    within 1.5 times the height of the box, and cycles beyond are points. Classes stand in the order of their labels
    where the table has a column ``label``, devices in that of their names. A last box holds the cycles whose device or
    class is missing.

    Args:
        cycles: One row a cycle, with ``quality``, ``device`` and ``class``, such as ``data.train_set.cycles`` after
            ``data.add_quality(AudioQuality())``.

    Returns:
        A figure of matplotlib; ``figure.savefig("quality.png")`` keeps it.

    Raises:
        ValueError: If a column is absent, there are no cycles, or the quality of one was not computed.

    Example:
        >>> table = pd.DataFrame({"class": ["normal", "wheeze"] * 8, "device": "Meditron", "quality": 0.7})
        >>> figure = plot_quality(table)
        >>> print(*[label.get_text() for label in figure.axes[1].get_xticklabels()])
        normal
        n = 8 wheeze
        n = 8
    """
    from matplotlib.figure import Figure  # here, because importing matplotlib takes long

    quality = _checked(cycles)
    panels = {column: _grouped(quality, _ordered(cycles, column), missing) for column, missing in _COLUMNS.items()}
    widths = [_MARGIN + _BOX * len(groups) for groups in panels.values()]
    figure = Figure(figsize=(sum(widths), _HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, width_ratios=widths)
    for place, (column, groups) in zip(axes, panels.items(), strict=True):
        _draw(place, column, groups)
    axes[0].set(ylim=(-0.02, 1.02), ylabel="audio quality score")
    return figure


def _checked(cycles: pd.DataFrame) -> np.ndarray:
    """Return the quality of each cycle."""
    if absent := [column for column in ("quality", *_COLUMNS) if column not in cycles]:
        raise ValueError(
            f"the table must have the columns quality, device and class, {', '.join(absent)} is missing; take a table "
            f"of cycles such as data.train_set.cycles"
        )
    if not len(cycles):
        raise ValueError("there are no cycles to draw")
    quality = cycles["quality"].to_numpy("float64")
    if missing := int(np.isnan(quality).sum()):
        raise ValueError(
            f"the quality of {missing} of {len(quality)} cycles was not computed; call add_quality(AudioQuality()) of "
            f"the data set or datamodule, and take its table of cycles then"
        )
    return quality


def _grouped(quality: np.ndarray, values: pd.Series[Any], missing: str) -> dict[str, np.ndarray]:
    """Return the quality of the cycles of each group, the last those without a value."""
    codes, names = pd.factorize(values, sort=True)
    labels = [*map(str, names), missing]
    groups = {label: quality[codes == code] for label, code in zip(labels, [*range(len(names)), -1], strict=True)}
    return {label: group for label, group in groups.items() if len(group)}


def _draw(axes: Axes, column: str, groups: dict[str, np.ndarray]) -> None:
    axes.boxplot(
        list(groups.values()),
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": _BLUE, "edgecolor": _DARK, "alpha": 0.6},
        medianprops={"color": _DARK, "linewidth": 1.5},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": _DARK, "alpha": 0.4},
    )
    upright = len(groups) <= _MOST_UPRIGHT
    axes.set_xticks(
        range(1, len(groups) + 1),
        [f"{label}\nn = {len(group)}" for label, group in groups.items()],
        rotation=0 if upright else 35,
        ha="center" if upright else "right",
    )
    axes.set_title(f"by {column}")
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
