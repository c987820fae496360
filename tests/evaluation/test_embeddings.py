from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from respiro.evaluation import plot_embeddings
from respiro.evaluation.embeddings import Projected, project

CLASSES = ("normal", "crackle", "wheeze", "both")
BLUE, GREY = "#0072b2", "#b8b8b8"


def embeddings(rows: int = 60, size: int = 12) -> np.ndarray:
    """Numbers whose variance differs from direction to direction, far from zero."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, size)) @ np.diag(np.linspace(3, 0.5, size)) + 10


def cycles(rows: int = 60, patients: int = 12) -> pd.DataFrame:
    numbers = np.arange(rows)
    return pd.DataFrame(
        {
            "class": np.array(CLASSES, dtype=object)[numbers % 4],
            "label": numbers % 4,
            "patient": (101 + numbers % patients).astype(str),
            "device": np.where(numbers % 3, "Meditron", "AKGC417L"),
        },
        index=numbers[::-1] + 1000,
    )


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def colours(axes: Axes) -> dict[tuple[float, float], str]:
    """Colour of each point, without its transparency."""
    (points,) = axes.collections
    places: Any = points.get_offsets()
    return {tuple(place): to_hex(colour) for place, colour in zip(places, points.get_facecolors(), strict=True)}


# -------------------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize(("rows", "size"), [(60, 12), (6, 40), (60, 2), (3, 5)], ids=["tall", "wide", "plane", "three"])
def test_pca_matches_scikit_learn(rows: int, size: int) -> None:
    x = embeddings(rows, size)
    oracle = PCA(2)
    expected = oracle.fit_transform(x)
    points, axes = project(x)
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-9)
    first, second = 100 * oracle.explained_variance_ratio_
    assert axes == (f"first component ({first:.1f} % of the variance)", f"second component ({second:.1f} %)")


def test_the_sign_of_a_component_is_fixed() -> None:
    """The largest entry of each component is positive, whatever the order of the embeddings."""
    x = embeddings()
    points = project(x).points
    loadings = np.linalg.lstsq(points, x - x.mean(0), rcond=None)[0]  # both components
    assert (loadings[[0, 1], np.abs(loadings).argmax(axis=1)] > 0).all()
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(project(x[order]).points, points[order], atol=1e-9)


def test_embeddings_on_a_line_have_no_second_component() -> None:
    points, axes = project(np.arange(5.0)[:, None] * [3.0, 4.0])
    np.testing.assert_allclose(points, [[-10, 0], [-5, 0], [0, 0], [5, 0], [10, 0]], atol=1e-9)
    assert axes[1] == "second component (0.0 %)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_are_taken(dtype: torch.dtype) -> None:
    x = torch.tensor(embeddings()).to(dtype)
    kept = x.clone()
    given = x.requires_grad_() if x.is_floating_point() else x
    np.testing.assert_allclose(project(given).points, project(kept.double().numpy()).points, atol=1e-9)
    assert torch.equal(x, kept)


def test_tsne_keeps_groups_together() -> None:
    groups = np.repeat(np.eye(3), 10, axis=0) * 50
    x = groups + embeddings(30, 3)
    points, axes = project(x, "tsne")
    np.testing.assert_array_equal(points, project(x, "tsne").points)
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    same = (groups[:, None] == groups).all(axis=2)
    assert distances[same].max() < distances[~same].min()
    assert axes == ("t-SNE", "")


@pytest.mark.parametrize("rows", [3, 4])
def test_tsne_of_few(rows: int) -> None:
    assert np.isfinite(project(embeddings(rows), "tsne").points).all()


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_equal_embeddings_are_one_point(projection: Any) -> None:
    with pytest.warns(UserWarning, match="all 4 embeddings are equal"):
        found = project(np.full((4, 3), 0.1), projection)
    assert found == Projected(found.points, ("all embeddings are equal", ""))
    assert (found.points == 0).all()


# ------------------------------------------------------------------------------------------------------------- figure


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_one_panel_for_each_column(projection: Any) -> None:
    x, table = embeddings(), cycles()
    figure = plot_embeddings(x, table, projection=projection)
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == ["class", "12 patients", "device"]
    assert legend(figure.axes[0]) == ["normal (15)", "crackle (15)", "wheeze (15)", "both (15)"]
    assert legend(figure.axes[1]) == []
    assert legend(figure.axes[2]) == ["AKGC417L (20)", "Meditron (40)"]
    points, names = project(x, projection)
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == names
        assert set(colours(axes)) == {tuple(point) for point in points}


def test_a_point_has_the_colour_of_its_row() -> None:
    x, table = embeddings(), cycles()
    points = project(x).points
    for axes, column, values in zip(
        plot_embeddings(x, table).axes, ("class", "patient", "device"), (4, 12, 2), strict=True
    ):
        of_points = pd.Series([colours(axes)[tuple(point)] for point in points], index=table.index)
        assert of_points.nunique() == values
        assert (of_points.groupby(table[column]).nunique() == 1).all()
        if column == "class":
            assert set(of_points[table["class"] == "normal"]) == {BLUE}


def test_missing_values_are_grey() -> None:
    x, table = embeddings(), cycles()
    table["device"] = table["device"].mask(table["device"] == "Meditron")
    table["patient"] = table["patient"].mask(table["patient"] == "101")
    table["sex"] = None
    patient, device, sex = plot_embeddings(x, table, ["patient", "device", "sex"]).axes
    assert legend(patient) == ["unknown (5)"]
    assert patient.get_title() == "11 patients"
    assert legend(device) == ["AKGC417L (20)", "unknown (40)"]
    grey = {place for place, colour in colours(device).items() if colour == GREY}
    assert grey == {tuple(point) for point in project(x).points[table["device"].isna()]}
    assert (legend(sex), sex.get_title()) == (["unknown (60)"], "sex")
    assert set(colours(sex).values()) == {GREY}


@pytest.mark.parametrize(("values", "listed"), [(8, True), (9, False)])
def test_a_legend_for_up_to_eight_values(values: int, listed: bool) -> None:
    (axes,) = plot_embeddings(embeddings(), cycles(patients=values), "patient").axes
    assert len(legend(axes)) == values * listed
    assert axes.get_title() == ("patient" if listed else "9 patients")
    assert len(set(colours(axes).values())) == values


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (np.arange(60) % 2 == 0, ["False (30)", "True (30)"]),
        (np.where(np.arange(60) % 3, 4000.0, np.nan), ["4000.0 (40)", "unknown (20)"]),
        (pd.Categorical(["old", "young"] * 30, categories=["young", "old"]), ["young (30)", "old (30)"]),
    ],
    ids=["flags", "numbers", "categories"],
)
def test_any_column_can_give_the_colours(values: Any, names: list[str]) -> None:
    (axes,) = plot_embeddings(embeddings(), cycles().assign(age_group=values), "age_group").axes
    assert legend(axes) == names
    assert axes.get_title() == "age group"


def test_classes_without_labels_are_sorted() -> None:
    (axes,) = plot_embeddings(embeddings(), cycles().drop(columns="label"), "class").axes
    assert legend(axes) == ["both (15)", "crackle (15)", "normal (15)", "wheeze (15)"]


@pytest.mark.parametrize("panels", [1, 4])
def test_the_figure_can_be_saved(panels: int, tmp_path: Any) -> None:
    path = tmp_path / "embeddings.png"
    figure = plot_embeddings(embeddings(), cycles(), ["class", "patient", "device", "label"][:panels])
    figure.savefig(path, dpi=30)
    assert path.read_bytes().startswith(b"\x89PNG")
    for axes in figure.axes:  # the legend covers no point
        bottom = axes.get_window_extent().y0
        assert axes.get_legend() is None or axes.get_legend().get_window_extent().y1 < bottom


def test_pyplot_is_not_touched() -> None:
    code = (
        "import sys, numpy, pandas; from respiro.evaluation import plot_embeddings; "
        "plot_embeddings(numpy.eye(4), pandas.DataFrame({'class': list('abab')}), 'class'); "
        "pyplot = sys.modules.get('matplotlib.pyplot'); print(pyplot.get_fignums() if pyplot else [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------- errors


def not_finite() -> np.ndarray:
    x = embeddings()
    x[3, 1], x[7] = np.nan, np.inf
    return x


@pytest.mark.parametrize(
    ("x", "changed", "message"),
    [
        (embeddings(59), {}, "59 embeddings do not fit a table of 60 rows; give one row for each embedding"),
        (embeddings(2), {}, "at least 3 embeddings, got 2"),
        (embeddings()[0], {}, r"shape \(N, D\), D at least 2, got \(12,\)"),
        (embeddings()[:, :1], {}, r"shape \(N, D\), D at least 2, got \(60, 1\)"),
        (not_finite(), {}, "2 of 60 embeddings are not finite"),
        (embeddings(), {"color_by": ["class", "age"]}, "no column 'age' to colour by; the table has class, label, pat"),
        (embeddings(), {"color_by": []}, r"color_by must name at least one column, got \[\]"),
        (embeddings(), {"projection": "umap"}, "projection must be one of 'pca', 'tsne', got 'umap'"),
    ],
    ids=["lengths", "two", "vector", "one-number", "not-finite", "absent", "no-column", "projection"],
)
def test_what_cannot_be_drawn_is_said(x: np.ndarray, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_embeddings(x, cycles(), **changed)
