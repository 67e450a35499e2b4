"""Figures: what is drawn where, what is refused, and that importing changes nothing."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")
plots = pytest.importorskip("diffnotes.plots")


@pytest.fixture(autouse=True)
def clean():
    with matplotlib.rc_context():
        yield
    plots.plt.close("all")


def test_importing_changes_no_setting():
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams); import diffnotes.plots as p;"
        "assert dict(matplotlib.rcParams) == before; p.style();"
        "assert dict(matplotlib.rcParams) != before"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "diffnotes.plots")
    with pytest.raises(ImportError, match=r"diffnotes\[plots\]"):
        __import__("diffnotes.plots")


def test_roles_keep_their_colours():
    assert list(plots.PALETTE) == ["data", "exact", "model", "noise"]
    ax = plots.curve([0, 1], [0, 1], "exact")
    plots.curve([0, 1], [1, 0], "model", linewidth=3)
    exact, model = ax.lines
    assert (exact.get_color(), exact.get_linestyle()) == (plots.PALETTE["exact"], "--")
    assert exact.get_zorder() > model.get_zorder() and model.get_linewidth() == 3
    assert model.get_linestyle() == "-"


@pytest.mark.parametrize(("size", "rows", "inches"), [
    ("narrow", 1, (4.2, 3.0)), ("wide", 2, (7.2, 5.6)), ("grid", 3, (5.0, 5.0))])
def test_figure_sizes(size, rows, inches):
    fig, axes = plots.figure(size, rows, 2)
    assert tuple(fig.get_size_inches()) == inches and axes.size == 2 * rows


def test_unknown_size():
    with pytest.raises(ValueError, match="narrow, wide, grid.*'huge'"):
        plots.figure("huge")


def test_helpers_draw_on_the_axes_given():
    _, (left, right) = plots.figure("wide", cols=2)
    assert plots.curve([0, 1], [0, 1], ax=left) is left
    assert plots.scatter2d(torch.randn(5, 2, requires_grad=True), ax=left, limit=3) is left
    assert plots.density2d(lambda x: -(x**2).sum(1), ax=left, size=20) is left
    assert plots.image_grid(torch.zeros(3, 1, 2, 2), ax=left) is left
    assert not right.has_data()


def test_scatter_is_square_and_flat():
    ax = plots.scatter2d(torch.zeros(4, 2), limit=2.5)
    assert ax.get_xlim() == ax.get_ylim() == (-2.5, 2.5) and ax.get_aspect() == 1
    for shape in [(4, 3), (4,)]:
        with pytest.raises(ValueError, match=r"\(n, 2\)"):
            plots.scatter2d(torch.zeros(shape))


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=4, unique=True))
def test_mass_levels_enclose_their_mass(masses):
    density = np.random.default_rng(0).random((30, 30))
    levels = plots.mass_levels(7 * density, masses)
    assert np.all(np.diff(levels) >= 0)
    inside = [density[7 * density >= level].sum() / density.sum() for level in levels]
    np.testing.assert_allclose(inside, sorted(masses)[::-1], atol=3 / density.sum())


def test_density_is_oriented_like_the_points():
    ax = plots.density2d(lambda x: -8 * ((x[:, 0] - 2) ** 2 + (x[:, 1] + 1) ** 2), masses=(0.5,))
    path = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose((path.min(0) + path.max(0)) / 2, [2, -1], atol=0.05)


@pytest.mark.parametrize(("n", "columns", "shape"), [
    (1, None, (4, 5)), (5, None, (9, 17)), (5, 5, (4, 29)), (6, 2, (14, 11))])
def test_tile_lays_images_row_by_row(n, columns, shape):
    images = torch.arange(n).float()[:, None, None].expand(n, 4, 5)
    page = plots.tile(images, columns, low=0, high=n)
    assert page.shape == shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    for i in range(n):
        corner = page[i // columns * 5, i % columns * 6]
        np.testing.assert_allclose(corner, i / n, rtol=1e-6)


def test_tile_takes_colour_and_clips():
    images = torch.tensor([-5.0, 0.0, 5.0])[None, :, None, None].expand(1, 3, 2, 2)
    np.testing.assert_allclose(plots.tile(images)[0, 0], [0, 0.5, 1])
    np.testing.assert_allclose(plots.tile(images, low=-5, high=5)[0, 0], [0, 0.5, 1])


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (0, 1, 4, 4), (4, 4), (1, 1, 1, 4, 4)])
def test_tile_refuses(shape):
    with pytest.raises(ValueError, match="images must have shape"):
        plots.tile(torch.zeros(shape))


def test_strip_labels():
    ax = plots.image_strip(torch.zeros(3, 1, 4, 4), ["a", 1, 2.5])
    assert [text.get_text() for text in ax.texts] == ["a", "1", "2.5"]
    assert [text.xy[0] for text in ax.texts] == [1.5, 6.5, 11.5]
    with pytest.raises(ValueError, match="3; got 2"):
        plots.image_strip(torch.zeros(3, 1, 4, 4), [0, 1])
