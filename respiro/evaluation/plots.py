"""Figures of an evaluation. They are made without pyplot: nothing is shown, nothing stays open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from respiro.evaluation._protocol import stamps
from respiro.evaluation.report import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from respiro.evaluation.evaluate import Evaluation

__all__ = ["confusion", "groups", "reliability"]

_BLUE, _ORANGE, _DARK, _GREY = "#3b75af", "#e08b3c", "#222222", "#b8b8b8"


def confusion(evaluation: Evaluation) -> Figure:
    """Draw the confusion matrix: colour and percent are shares of the true class, below them the counts."""
    from matplotlib import colormaps  # here and below, because importing matplotlib takes long

    counts = evaluation.confusion.to_numpy()
    support = counts.sum(1, keepdims=True)
    shares = np.divide(counts, support, out=np.full(counts.shape, np.nan), where=support > 0)
    size = len(evaluation.classes)
    figure = _figure(evaluation, 1.8 + 1.05 * size, 1.7 + 1.0 * size)
    axes = figure.subplots()
    axes.imshow(shares, cmap=colormaps["Blues"].with_extremes(bad="#eeeeee"), vmin=0, vmax=1)
    for row in range(size):
        for column in range(size):
            share, count = shares[row, column], counts[row, column]
            label = f"{100 * share:.1f} %\n{count}" if support[row, 0] else "0"
            axes.text(column, row, label, ha="center", va="center", color="white" if share > 0.55 else _DARK)
    axes.set_xticks(
        range(size), evaluation.classes, rotation=0 if size < 5 else 35, ha="center" if size < 5 else "right"
    )
    axes.set_yticks(
        range(size), [f"{name}\nn = {n}" for name, n in zip(evaluation.classes, support[:, 0], strict=True)]
    )
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    metrics = evaluation.metrics
    axes.set_title(
        f"Sp {percent(metrics['specificity'])} %   Se {percent(metrics['sensitivity'])} %   "
        f"Score {percent(metrics['score'])} %"
    )
    return figure


def reliability(evaluation: Evaluation) -> Figure:
    """Draw accuracy against confidence in 15 bins, and the share of cycles in each bin."""
    bins = evaluation.calibration
    width = bins["high"] - bins["low"]
    figure = _figure(evaluation, 5.4, 6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color=_GREY, linestyle="--", label="perfect calibration")
    above.bar(bins["low"], bins["accuracy"], width, align="edge", color=_BLUE, edgecolor="white", label="accuracy")
    above.plot(bins["confidence"], bins["accuracy"], "o", color=_DARK, markersize=4, label="mean confidence")
    above.set(
        ylim=(0, 1), ylabel="accuracy", title=f"expected calibration error {percent(evaluation.metrics['ece'])} %"
    )
    above.legend(loc="upper left", edgecolor="none")
    below.bar(bins["low"], bins["cycles"] / bins["cycles"].sum(), width, align="edge", color=_GREY, edgecolor="white")
    below.set(xlim=(0, 1), ylabel="share of cycles", xlabel="confidence (largest probability)")
    for axes in (above, below):
        _in_percent(axes, "y")
    _in_percent(below, "x")
    return figure


def groups(evaluation: Evaluation) -> Figure:
    """Draw specificity, sensitivity and score of each group; the broken line is the score of calling all normal."""
    table = evaluation.by_group
    first = ~table["group"].duplicated()
    places = np.arange(len(table)) + first.cumsum().to_numpy()  # a line for the name of each group
    last = float(places.max(initial=1))
    figure = _figure(evaluation, 7.6, 1.9 + 0.3 * last)
    axes = figure.subplots()
    axes.hlines(places, table["sensitivity"], table["specificity"], color=_GREY, linewidth=1.5, zorder=1)
    for name, marker, colour, label in (
        ("specificity", "s", _BLUE, "Sp"),
        ("sensitivity", "D", _ORANGE, "Se"),
        ("score", "o", _DARK, "Score"),
    ):
        style: dict[str, Any] = {"c": colour, "marker": marker, "edgecolors": "white", "linewidths": 0.6}
        axes.scatter(table[name], places, s=38, label=label, zorder=3, **style)
    axes.axvline(evaluation.metrics["score"], color=_DARK, linewidth=1, label="Score of all cycles")
    axes.axvline(evaluation.floor["score"], color=_DARK, linewidth=1, linestyle="--", label="all called normal")
    headings = table.loc[first, "group"].str.replace("_", " ").tolist()
    labels = [*headings, *_group_labels(table)]
    axes.set_yticks([*(places[first] - 1), *places], labels)
    for tick in axes.get_yticklabels()[: len(headings)]:
        tick.set_fontweight("bold")
    axes.set_ylim(last + 0.6, -0.6)
    axes.set_xlim(-0.02, 1.02)
    _in_percent(axes, "x")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def _figure(evaluation: Evaluation, width: float, height: float) -> Figure:
    """Return an empty figure that carries the stamps of the protocol."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    found = stamps(evaluation.protocol)
    if found:
        figure.suptitle("   ".join(found), color="#b22222", fontsize=11, fontweight="bold")
    return figure


def _in_percent(axes: Axes, which: str) -> None:
    from matplotlib.ticker import PercentFormatter

    (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _group_labels(table: pd.DataFrame) -> list[str]:
    columns = (table["value"], table["cycles"], table["patients"])
    return [f"{value}  (cycles {n}, patients {patients})" for value, n, patients in zip(*columns, strict=True)]
