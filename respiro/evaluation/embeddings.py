"""A picture of embeddings: what an encoder tells apart, and by what else it groups the cycles.

Made without pyplot: nothing is shown, nothing stays open.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from respiro.errors import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Projected", "plot_embeddings", "project"]

Floats = npt.NDArray[np.float64]
Projection = Literal["pca", "tsne"]

# Okabe and Ito (2008): told apart with every kind of colour vision.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#222222")
_UNKNOWN = "#b8b8b8"
_WIDTH, _HEIGHT, _PANELS_A_ROW = 4.0, 4.6, 3  # of a panel, in inches


class Projected(NamedTuple):
    """Embeddings in two dimensions.

    Attributes:
        points: Coordinates ``(N, 2)``.
        axes: What the two are.
    """

    points: Floats
    axes: tuple[str, str]


def plot_embeddings(
    embeddings: Tensor | npt.ArrayLike,
    table: pd.DataFrame,
    color_by: str | Sequence[str] = ("class", "patient", "device"),
    projection: Projection = "pca",
) -> Figure:
    """Draw embeddings in two dimensions, one panel for each column of a table, in which that column gives the colours.

    All panels show the same points. A column of up to 8 values has a legend with their counts; one of more, such as the
    patients, is coloured in the order of its values, and the title tells how many there are. Missing values are grey.

    Args:
        embeddings: Of any encoder, such as ``model.embed(data.test_set)``: ``(N, D)``, D at least 2.
        table: One row for each embedding, in the same order, such as ``data.test_set.cycles``.
        color_by: Columns of the table.
        projection: ``"pca"``: the first two principal components, with their share of the variance. The entry of
            a component that is largest in magnitude is positive, so that the same embeddings always give the same
            picture. ``"tsne"``: t-SNE with a fixed seed, which keeps neighbours together; distances between
            groups and their sizes then mean nothing.

    Returns:
        A figure of matplotlib; ``figure.savefig("embeddings.png")`` keeps it. Embeddings that are all equal give one
        point.

    Raises:
        ValueError: If a shape does not fit, there are fewer than three embeddings, one is not finite, a column is
            absent, or *projection* is unknown.

    Warns:
        UserWarning: If all embeddings are equal.

    Source:
        t-SNE: van der Maaten and Hinton, "Visualizing data using t-SNE", JMLR 9, 2008.

    Example:
        >>> table = pd.DataFrame({"class": ["normal", "wheeze"] * 8, "patient": range(101, 117)})
        >>> figure = plot_embeddings(np.random.default_rng(0).normal(size=(16, 4)), table, ["class", "patient"])
        >>> [axes.get_title() for axes in figure.axes]
        ['class', '16 patients']
    """
    from matplotlib.figure import Figure  # here and below, because importing matplotlib takes long

    columns = _check_columns(color_by, table)
    points, names = project(embeddings, projection)
    if len(points) != len(table):
        raise ValueError(
            f"{len(points)} embeddings do not fit a table of {len(table)} rows; give one row for each embedding, in "
            f"the same order, such as model.embed(side) and side.cycles"
        )
    wide = min(len(columns), _PANELS_A_ROW)
    high = -(-len(columns) // wide)
    figure = Figure(figsize=(_WIDTH * wide, _HEIGHT * high), layout="constrained")
    for number, column in enumerate(columns, start=1):
        axes = figure.add_subplot(high, wide, number, xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
        _draw(axes, points, column.replace("_", " "), _ordered(table, column))
    return figure


def project(embeddings: Tensor | npt.ArrayLike, projection: Projection = "pca") -> Projected:
    """Return embeddings ``(N, D)`` in two dimensions; see :func:`plot_embeddings`."""
    check_choice("projection", projection, get_args(Projection))
    x = _checked(embeddings)
    if not np.ptp(x, axis=0).any():
        warnings.warn(f"all {len(x)} embeddings are equal: this encoder tells nothing apart", UserWarning, stacklevel=3)
        return Projected(np.zeros((len(x), 2)), ("all embeddings are equal", ""))
    return _pca(x) if projection == "pca" else _tsne(x)


def _pca(x: Floats) -> Projected:
    x = x - x.mean(axis=0)
    variances, vectors = np.linalg.eigh(x.T @ x)  # ascending; far faster than singular values of many embeddings
    components = vectors[:, [-1, -2]]
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, [0, 1]])
    first, second = variances[[-1, -2]].clip(min=0) / variances.sum()
    axes = f"first component ({100 * first:.1f} % of the variance)", f"second component ({100 * second:.1f} %)"
    return Projected(x @ components, axes)


def _tsne(x: Floats) -> Projected:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)  # about a third of the neighbours that it needs
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x)
    return Projected(np.asarray(points, dtype="float64"), ("t-SNE", ""))


def _checked(embeddings: Tensor | npt.ArrayLike) -> Floats:
    given: Any = embeddings.detach().cpu().double() if isinstance(embeddings, Tensor) else embeddings
    x = np.asarray(given, dtype="float64")
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"embeddings must have shape (N, D), D at least 2, got {x.shape}")
    if len(x) < 3:
        raise ValueError(f"a projection needs at least 3 embeddings, got {len(x)}")
    if bad := int((~np.isfinite(x)).any(axis=1).sum()):
        raise ValueError(
            f"{bad} of {len(x)} embeddings are not finite; look for values that are not finite in the waveforms and in "
            f"the weights"
        )
    return x


def _check_columns(color_by: str | Sequence[str], table: pd.DataFrame) -> tuple[str, ...]:
    columns = (color_by,) if isinstance(color_by, str) else tuple(color_by)
    if not columns:
        raise ValueError(f"color_by must name at least one column, got {color_by!r}")
    for column in columns:
        if column not in table:
            raise ValueError(f"no column {column!r} to colour by; the table has {', '.join(map(str, table.columns))}")
    return columns


def _ordered(table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """Return a column; that of the classes with their own order, which is that of the labels."""
    if column == "class" and "label" in table:
        classes = table.sort_values("label")["class"].dropna().unique()
        return pd.Series(pd.Categorical(table["class"], categories=classes))
    return table[column]


def _draw(axes: Axes, points: Floats, title: str, values: pd.Series[Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba_array

    codes, names = pd.factorize(values, sort=True)
    few = len(names) <= len(_COLOURS)
    found = to_rgba_array(_COLOURS) if few else colormaps["viridis"](np.linspace(0, 1, len(names)))
    colours = np.concatenate([found[: len(names)], to_rgba_array(_UNKNOWN)])  # code -1, the last, is unknown
    order = np.random.default_rng(0).permutation(len(points))  # so that no value lies on top of the others
    size = float(np.clip(6000 / len(points), 5, 30))
    axes.scatter(points[order, 0], points[order, 1], s=size, c=colours[codes[order]], alpha=0.8, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")  # a distance means the same in both directions
    axes.set_title(title if few else f"{len(names)} {title}s")
    counts = np.bincount(codes + 1, minlength=len(names) + 1)
    labels = [f"{name} ({count})" for name, count in zip(names, counts[1:], strict=True)] if few else []
    styles = list(colours[: len(labels)])
    if counts[0]:
        labels, styles = [*labels, f"unknown ({counts[0]})"], [*styles, colours[-1]]
    _legend(axes, labels, styles)


def _legend(axes: Axes, labels: list[str], colours: list[Any]) -> None:
    from matplotlib.lines import Line2D

    if labels:
        handles = [Line2D([], [], linestyle="", marker="o", color=colour) for colour in colours]
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
